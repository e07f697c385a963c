"""The right to compute one frame, held by one process among all that share a spool; it ends with the process that holds it.

SPOOL/running/FRAME_ID.lock    locked while the frame is computed; says by whom
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnn_driver.errors import EnvironmentProblem, FrameBusy, writing


@contextlib.contextmanager
def claim(spool: Path, name: str, attempt: str = "") -> Iterator[None]:
    """Hold the right to compute a frame.

    Args: attempt: shown to whoever looks, see `holder`.
    Raises: FrameBusy, at once, while another process or thread holds it; EnvironmentProblem where there are no locks, or
        the disk refuses.
    """
    path = _path(spool, name)
    facts = {"host": platform.node(), "pid": os.getpid(), "attempt": attempt}
    with writing(path):
        descriptor = _lock(path)
    try:
        with writing(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(facts).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):  # a disk that has become read-only; closing frees the frame all the same
            path.unlink()  # while it is still held
        os.close(descriptor)


def is_claimed(spool: Path, name: str) -> bool:
    """True while somebody computes the frame."""
    try:
        with claim(spool, name):
            return False
    except FrameBusy:
        return True


def holder(spool: Path, name: str) -> dict[str, Any]:
    """Who computes a frame, or did when it was killed: host, pid, attempt; empty if nobody says."""
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads(_path(spool, name).read_text(encoding="utf-8"))
        if isinstance(facts, dict):
            return facts
    return {}


def _path(spool: Path, name: str) -> Path:
    return spool / "running" / f"{name}.lock"


def _lock(path: Path) -> int:
    """An open descriptor of the file at `path`, locked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise FrameBusy(f"another process computes it, see {path}") from None
        except OSError as error:
            os.close(descriptor)
            raise EnvironmentProblem(
                f"{path} lies on a file system without locks ({error}); put the run directory on one that has them"
            ) from error
        os.close(descriptor)  # the one who held it has removed this file in the meantime


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
