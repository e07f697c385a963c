"""Generations of weights: published whole by rename, named by a small file `current`, checked when loaded."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as tensors_from_bytes
from safetensors.numpy import save as tensors_to_bytes

from bnn_driver.errors import BnnError, EnvironmentProblem
from bnn_driver.records import Array, Generation
from bnn_driver.store.files import TEMPORARY, folder_lock, read_json, sync_folder, temporary_beside, write_atomic, write_synced

_log = logging.getLogger(__name__)
_NAME = re.compile(r"^(\d{6,})$")
_WEIGHTS, _STATE, _CURRENT = "weights.safetensors", "state.json", "current"


def publish(folder: Path, generation: Generation) -> Path:
    """Write a generation and make it current; until the last rename every reader sees the one before.

    Publishing the same content again is allowed (a restart repeats its last step); a generation that a crash left behind
    without becoming current is replaced.

    Returns: its folder.
    Raises: BnnError when another generation of that number, or a later one, is current; EnvironmentProblem when the disk refuses.
    """
    folder = Path(folder)
    content = _tensors(generation.weights)
    state = _state(generation, content)
    target = folder / f"{generation.number:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder, wait=True):
            _sweep(folder)
            now = _read_current(folder)
            if now is not None and generation.number <= now:
                if _bytes_or_none(target / _STATE) == state:
                    return target
                raise BnnError(f"generation {generation.number} cannot be published in {folder}: generation {now} is current")
            _write_folder(target, content, state)
            write_atomic(folder / _CURRENT, f"{generation.number}\n".encode())
    except OSError as error:
        raise EnvironmentProblem(f"generation {generation.number} could not be written to {folder}: {error}") from error
    return target


def latest(folder: Path) -> int | None:
    """Number of the current generation, or of the newest whole one when `current` is missing or wrong; None without any.

    Cheap enough for every step: two small reads; the content is checked by `load`.
    """
    now = _read_current(Path(folder))
    if now is not None and _is_whole(Path(folder) / f"{now:06d}"):
        return now
    whole = [n for n in _numbers(Path(folder)) if _is_whole(Path(folder) / f"{n:06d}")]
    if whole:
        _log.warning("%s: the current generation (%s) is damaged or not named; going on with %d", folder, now, whole[-1])
    return whole[-1] if whole else None


def load(folder: Path, number: int) -> Generation:
    """Generation `number` exactly as published.  Raises: EnvironmentProblem when it is missing or damaged in any bit."""
    place = Path(folder) / f"{number:06d}"
    state = read_json(place / _STATE)
    try:
        content = (place / _WEIGHTS).read_bytes()
        if hashlib.sha256(content).hexdigest() != state["sha256"]:
            raise ValueError(f"the checksum of {len(content)} bytes differs from the {state['bytes']} bytes published")
        weights = tensors_from_bytes(content)
        return Generation(state["number"], weights, tuple(state["label_ids"]), state["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise EnvironmentProblem(
            f"{place / _WEIGHTS} is damaged: {error}. Restore it, or delete {place}: the generation before is then used."
        ) from error


def load_latest(folder: Path) -> Generation | None:
    """The current generation, or with a warning the newest earlier one that is undamaged; None when nothing was ever published.

    Raises: EnvironmentProblem when there are generations but all are damaged.
    """
    folder = Path(folder)
    first = latest(folder)
    candidates = [n for n in _numbers(folder) if first is not None and n <= first]
    for number in reversed(candidates):
        try:
            return load(folder, number)
        except EnvironmentProblem as error:
            _log.warning("%s Going back to an earlier generation.", error)
    if _numbers(folder):
        raise EnvironmentProblem(
            f"no generation in {folder} can be read; restore one, or delete the folder to start from the labels"
        )
    return None


def settle(folder: Path) -> Generation | None:
    """`load_latest`, and make it the current one where that is damaged or was never named: the next update takes its place.

    Raises: EnvironmentProblem, as `load_latest`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    with folder_lock(folder, wait=True):  # nobody publishes between the reading and the naming
        generation = load_latest(folder)
        if generation is not None and generation.number != _read_current(folder):
            write_atomic(folder / _CURRENT, f"{generation.number}\n".encode())
    return generation


def label_ids(folder: Path, number: int) -> frozenset[str]:
    """Frame ids of the labels that a generation has learnt, without reading its weights.  Raises: EnvironmentProblem."""
    return frozenset(read_json(Path(folder) / f"{number:06d}" / _STATE)["label_ids"])


def prune(folder: Path, keep: int) -> tuple[int, ...]:
    """Delete all but the newest `keep` generations; 0, the current one and the one before it always stay.

    The one before, because a reader may just have been told of it and not have opened it yet.

    Returns: the numbers deleted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return ()
    with folder_lock(folder, wait=True):
        _sweep(folder)
        numbers = _numbers(folder)
        now = latest(folder)
        before = max((n for n in numbers if now is not None and n < now), default=None)
        stay = {0, now, before, *numbers[max(len(numbers) - keep, 0) :]}
        gone = tuple(n for n in numbers if n not in stay)
        for number in gone:
            _remove(folder / f"{number:06d}")
    return gone


def _tensors(weights: dict[str, Array]) -> bytes:
    # safetensors writes the memory as it lies: strided arrays and foreign byte orders must be laid out first.
    arrays = {name: np.asarray(x, dtype=x.dtype.newbyteorder("="), order="C") for name, x in weights.items()}
    return bytes(tensors_to_bytes(arrays))


def _state(generation: Generation, content: bytes) -> bytes:
    facts: dict[str, Any] = {
        "number": generation.number,
        "label_ids": list(generation.label_ids),
        "state": generation.state,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    try:
        return json.dumps(facts, indent=1).encode() + b"\n"
    except TypeError as error:
        raise BnnError(
            f"the state of generation {generation.number} is not JSON: {error}; use numbers, text and lists"
        ) from error


def _write_folder(target: Path, content: bytes, state: bytes) -> None:
    temporary = temporary_beside(target)
    temporary.mkdir()
    try:
        write_synced(temporary / _WEIGHTS, content)
        write_synced(temporary / _STATE, state)
        sync_folder(temporary)
        _remove(target)
        os.rename(temporary, target)
        sync_folder(target.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove(target: Path) -> None:
    """Take a generation away by rename first, so that nobody sees half of it."""
    if target.exists():
        aside = temporary_beside(target)
        os.rename(target, aside)
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(folder: Path) -> None:
    for path in folder.glob(f".*{TEMPORARY}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_whole(place: Path) -> bool:
    try:
        state = json.loads((place / _STATE).read_bytes())
        return bool((place / _WEIGHTS).stat().st_size == state["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_current(folder: Path) -> int | None:
    text = _bytes_or_none(folder / _CURRENT)
    return int(text) if text is not None and text.endswith(b"\n") and text.strip().isdigit() else None


def _bytes_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _numbers(folder: Path) -> list[int]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if _NAME.match(name))
