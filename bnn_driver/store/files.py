"""Files that are whole or absent: atomic writes, JSON of arrays, locks of folders."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bnn_driver.errors import BnnError, EnvironmentProblem, writing

_log = logging.getLogger(__name__)

LOCK_SECONDS = 120.0
"""How long a writer waits for another one, whose writes take milliseconds."""
LOCK_POLL_SECONDS = 1e-3
#: Suffix of everything that is not finished; readers ignore it, the next owner of the folder's lock removes it.
TEMPORARY = ".tmp"


def write_atomic(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that at every moment, also after a power loss, the old or the new file is there in full.

    Temporary file in the same folder, fsync, rename, fsync of the folder.

    Raises: EnvironmentProblem when the disk refuses (full, read-only, gone).
    """
    temporary = temporary_beside(path)
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise EnvironmentProblem(
            f"{path} could not be written ({len(content)} bytes): {error}; the old or the new file is there in full. "
            "Free space or mend the folder's permissions, then run the same command again."
        ) from error


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that no reader takes for finished and no other writer uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")


def write_synced(path: Path, content: bytes) -> None:
    """Create `path`, which must not exist, and return when the disk has it.  Raises: OSError."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power loss.  Raises: OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Content of a JSON file.  Raises: EnvironmentProblem when it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EnvironmentProblem(f"{path} is missing; is its folder part of a run directory?") from None
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"{path} cannot be read as JSON: {error}; restore it from a copy or move it away.") from error


def read_series(folder: Path, name: str) -> list[Any]:
    """What stands in NAME_000.json, NAME_001.json and so on.  Raises: as `read_json`."""
    return [read_json(path) for path in sorted(folder.glob(f"{name}_*.json"))]


def write_json(path: Path, facts: Any) -> None:
    """What `plain` makes of `facts`, written as `write_atomic` does."""
    write_atomic(path, json.dumps(plain(facts)).encode())


def plain(value: Any) -> Any:
    """The same value out of dict, list, str, float, int, bool and None only, as JSON needs it; arrays become lists.

    Raises: BnnError for a type that has no such form.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    raise BnnError(f"expected numbers, text, arrays, lists or tables for JSON, but got {value!r} of type {type(value).__name__}")


def holder(role: str) -> dict[str, Any]:
    """Who this process is, for messages: role, host, pid."""
    return {"role": role, "host": platform.node(), "pid": os.getpid()}


@contextlib.contextmanager
def folder_lock(folder: Path, wait: bool) -> Iterator[bool]:
    """Hold the right to write in `folder` against other processes and threads; yields False when it was not to be had.

    Args: wait: True waits until the other writer is done, LOCK_SECONDS at most; False tries once.
    Raises: EnvironmentProblem when `wait` and the lock is not to be had: no locks, no permission, a writer that hangs.
    """
    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if wait:
            raise EnvironmentProblem(f"{folder} cannot be written in: {error}") from error
        yield False
        return
    try:
        try:
            _take(descriptor, folder, LOCK_SECONDS if wait else 0.0)
        except OSError as error:
            if wait:
                raise EnvironmentProblem(
                    f"{folder} lies on a file system without locks ({error}); put the run directory on one that has them"
                ) from error
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path, seconds: float) -> None:
    """Raises: BlockingIOError when it cannot be had at once and `seconds` is 0; EnvironmentProblem after them; OSError."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if seconds == 0:
                raise
        if time.monotonic() > end:
            raise EnvironmentProblem(
                f"another process has held {folder / '.lock'} for {seconds:g} s: it hangs or was stopped. Find it with "
                f"`fuser {folder / '.lock'}`, end it, and run the same command again"
            )
        time.sleep(LOCK_POLL_SECONDS)


@contextlib.contextmanager
def shared_list(path: Path) -> Iterator[list[Any]]:
    """The list in a JSON file, for one process and thread at a time; changes are written at the end of the context.

    A file that is missing or damaged holds an empty list, for what is kept so is no reason to stop.
    Raises: EnvironmentProblem when the disk refuses, or as `folder_lock`.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(path.parent, wait=True):
        before = _list_in(path)
        items = list(before or [])
        yield items
        if items != before:
            write_atomic(path, json.dumps(items).encode())


def _list_in(path: Path) -> list[Any] | None:
    try:
        items = json.loads(path.read_bytes())
        if isinstance(items, list):
            return items
        _log.warning("%s is damaged and begun anew: expected a list, got %s", path, type(items).__name__)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _log.warning("%s is damaged and begun anew: %s", path, error)
    return None


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed writer left in `folder`, unless a writer is at work or the folder is read-only."""
    with folder_lock(folder, wait=False) as held:
        if held:
            for path in folder.glob(f".*{TEMPORARY}"):
                if path.is_file():
                    path.unlink(missing_ok=True)
