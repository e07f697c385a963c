"""Runs one command in a session of its own and ends everything it started when the parent is gone.

A script with nothing but the standard library: `python -I -S guard.py OUTPUT ERRORS LEFTOVER INPUT COMMAND...`, started by
guarded.py.  The parent holds a pipe to standard input; at its end, however the parent died, the command and all it started get SIGTERM
(launchers such as mpirun and srun pass it on), and SIGKILL after `GRACE`.  On Linux the guard adopts what its descendants leave behind
(PR_SET_CHILD_SUBREAPER), so ranks that a launcher put into sessions of their own are found too; elsewhere it ends the command's group.
One line of JSON on standard output says how the command ended: {"status": code} with Popen's sign, or {"error": text} if it could not
be started.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL: mpirun and srun end their ranks in that time."""
LAST_WAIT = 10.0
"""Seconds for killed processes to go; one that waits for a disk may take longer and is left to the kernel."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""From linux/prctl.h."""


def guard(output: str, errors: str, leftover: str, reads: str, command: Sequence[str]) -> dict[str, object]:
    """Run the command until it or the other end of standard input is gone; says how it ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        child = _start(output, errors, reads, command)
        status = _watch(child, woken)
        _end_descendants(child.pid)
    except OSError as error:
        return {"error": str(error)}
    finally:
        if leftover:
            with contextlib.suppress(OSError):
                os.unlink(leftover)
    return {"status": status}


def _start(output: str, errors: str, reads: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
    source = int(reads) if reads else subprocess.DEVNULL
    with Path(output).open("wb") as out, Path(errors).open("wb") as err:
        child = subprocess.Popen(command, stdin=source, stdout=out, stderr=err, start_new_session=True, preexec_fn=_as_command)
    if reads:
        os.close(source)  # or whoever writes to it would not notice the end of the command
    return child


def _as_command() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # should the guard itself be killed


def _watch(child: subprocess.Popen[bytes], woken: int) -> int:
    """Popen's status of the command at its end; -SIGKILL when the parent is gone first.  Nothing is ever written to the pipe 0."""
    poller = select.poll()
    for descriptor in (0, woken):
        poller.register(descriptor, select.POLLIN | select.POLLHUP)
    while (status := child.poll()) is None:
        ready = [descriptor for descriptor, _ in poller.poll()]
        if woken in ready:
            os.read(woken, 4096)
        if 0 in ready and child.poll() is None:
            return -signal.SIGKILL
    return status


def _end_descendants(command: int) -> None:
    """SIGTERM, SIGKILL after GRACE, until none is left; orphans become children of this process and are found again."""
    start, asked = time.monotonic(), set[int]()
    while _reap() and time.monotonic() - start < GRACE + LAST_WAIT:
        late = time.monotonic() - start > GRACE
        for process in _descendants() if sys.platform == "linux" else [-command]:
            if late or process not in asked:
                asked.add(process)
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.02)


def _reap() -> bool:
    """Bury the dead; whether children are left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _descendants() -> list[int]:
    """Living processes that stem from this one."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # the name of a program may hold blanks and brackets: what follows the last bracket is well-formed
            parent = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found, front = [], [os.getpid()]
    while front:
        front = [child for parent in front for child in children.get(parent, [])]
        found += front
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    out, err, left, source, *words = sys.argv[1:]
    facts = json.dumps(guard(out, err, left, source, words))
    with contextlib.suppress(BrokenPipeError):
        os.write(1, facts.encode() + b"\n")
