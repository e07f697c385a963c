"""Results of the oracle, written by the worker itself before it returns; plain functions, light to import."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bnn_driver.errors import BnnError, EnvironmentProblem, OracleInconsistent
from bnn_driver.records import Label
from bnn_driver.store.files import folder_lock, holder, plain, read_json, write_atomic

_ID = re.compile(r"^[A-Za-z0-9_-]+$")


def begin(folder: Path, frame_id: str) -> None:
    """Note in running/ that this process works on a frame."""
    note = holder("oracle") | {"start": time.time()}
    write_atomic(_file(folder, "running", frame_id), json.dumps(note).encode())


def finish(folder: Path, frame_id: str, label: Label) -> None:
    """Keep a label in done/ in full precision; from here on no crash can lose it.

    Raises: BnnError when the label is of another frame, OracleInconsistent for NaN, EnvironmentProblem when the disk refuses.
    """
    if label.frame_id != frame_id:
        raise BnnError(f"the label belongs to frame {label.frame_id}, but frame {frame_id} was asked for")
    try:
        content = json.dumps(plain(asdict(label)), allow_nan=False).encode()
    except ValueError:
        raise OracleInconsistent(f"{label.code}: the label of frame {frame_id} holds numbers that are not finite") from None
    write_atomic(_file(folder, "done", frame_id), content)
    _file(folder, "running", frame_id).unlink(missing_ok=True)


def fail(folder: Path, frame_id: str, kind: str, message: str) -> int:
    """Note a failure in failed/; returns how often this frame has failed.

    Args: kind: class of the error, such as "SCFNotConverged".
    """
    path = _file(folder, "failed", frame_id)
    with folder_lock(path.parent, wait=True):
        attempts = read_json(path) if path.exists() else []
        attempts.append({"kind": kind, "message": message, "time": time.time()})
        write_atomic(path, json.dumps(attempts).encode())
    _file(folder, "running", frame_id).unlink(missing_ok=True)
    return len(attempts)


def take(folder: Path, frame_id: str) -> Label | None:
    """The label of a frame, bit by bit as it was finished, or None.  Raises: EnvironmentProblem when its file is damaged."""
    path = _file(folder, "done", frame_id)
    if not path.exists():
        return None
    facts = read_json(path)
    try:
        stress = None if facts["stress"] is None else np.array(facts["stress"], dtype=np.float64)
        return Label(**{**facts, "forces": np.array(facts["forces"], dtype=np.float64).reshape(-1, 3), "stress": stress})
    except (TypeError, KeyError, ValueError) as error:
        raise EnvironmentProblem(f"{path} is not a label: {error}; delete it and its frame is computed again") from error


def failures(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """frame id -> its failures in order, each {"kind", "message", "time"}."""
    return {path.stem: read_json(path) for path in _files(folder, "failed")}


def running(folder: Path) -> dict[str, dict[str, Any]]:
    """frame id -> {"host", "pid", "start"} of work begun and neither finished nor failed; after a crash it may be dead."""
    return {path.stem: read_json(path) for path in _files(folder, "running")}


def done(folder: Path) -> tuple[str, ...]:
    """Ids of all frames with a finished label."""
    return tuple(path.stem for path in _files(folder, "done"))


def _files(folder: Path, state: str) -> list[Path]:
    return sorted(path for path in (Path(folder) / state).glob("*.json") if not path.name.startswith("."))


def _file(folder: Path, state: str, frame_id: str) -> Path:
    if not _ID.match(frame_id):
        raise BnnError(f"{frame_id!r} is no frame id: expected letters, digits, _ and - only")
    place = Path(folder) / state
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{place} cannot be made: {error}") from error
    return place / f"{frame_id}.json"
