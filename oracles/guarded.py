"""A command that never outlives the process that wants it: the command runs under a guard, and the guard watches a pipe.

The other end of the pipe is closed by `Guarded.stop`, or by the kernel when that process dies, also by SIGKILL.  The guard then ends
the command and everything that the command started: SIGTERM, and SIGKILL after `GRACE`.  On Linux it adopts what its descendants
leave behind (PR_SET_CHILD_SUBREAPER), so ranks that mpirun put into groups of their own are found too; elsewhere it ends the command
alone.  Run as a script, this file is the guard; it needs the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL: mpirun and srun end their ranks in that time."""
LAST_WAIT = 10.0
"""Seconds for killed processes to go; one that waits for a disk may take longer and is left to the kernel."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""From linux/prctl.h."""


class Guarded:
    """One running command."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        output: Path,
        errors: Path,
        leftover: Path | None,
    ) -> None:
        """Start it.

        Args: folder: where it runs.   output, errors: files for what it prints.   leftover: a file to remove at its end, such as
            a socket.
        """
        watched, pipe = os.pipe()
        try:
            with output.open("wb") as out, errors.open("wb") as err:
                self._guard = subprocess.Popen(
                    [sys.executable, "-I", "-S", __file__, str(watched), str(leftover or ""), *command],
                    cwd=folder,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    pass_fds=(watched,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(pipe)
            raise
        finally:
            os.close(watched)
        self._pipe: IO[bytes] | None = os.fdopen(pipe, "wb")

    @property
    def is_running(self) -> bool:
        """Whether the command still runs."""
        return self._guard.poll() is None

    @property
    def end(self) -> str:
        """How the command ended, in words."""
        status = self._guard.poll()
        if status is None:
            return "it still runs"
        return f"signal {signal.Signals(status - 128).name}" if 128 < status < 160 else f"exit status {status}"

    def wait(self, seconds: float) -> bool:
        """Wait for the command to end by itself; False when it still runs after `seconds`."""
        try:
            self._guard.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """End the command with all it started; returns within GRACE + LAST_WAIT seconds and a little."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if not self.wait(GRACE + LAST_WAIT + 2.0):
            self._guard.kill()
            self._guard.wait()


def guard(watched: int, leftover: str, command: Sequence[str]) -> int:
    """Run the command until it or the other end of the pipe `watched` is gone; its exit status, 128 + signal when killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    os.set_inheritable(watched, False)
    status = 127
    try:
        child = subprocess.Popen(command, preexec_fn=_as_command)
        status = _watch(child, watched, woken)
        _end_descendants(child.pid)
    except OSError as error:
        print(f"cannot start {command[0]!r}: {error}", file=sys.stderr)
    finally:
        if leftover:
            with contextlib.suppress(OSError):
                os.unlink(leftover)
    return status


def _as_command() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # should the guard itself be killed


def _watch(child: subprocess.Popen[bytes], watched: int, woken: int) -> int:
    poller = select.poll()
    for descriptor in (watched, woken):
        poller.register(descriptor, select.POLLIN | select.POLLHUP)
    while (status := child.poll()) is None:
        ready = [descriptor for descriptor, _ in poller.poll()]
        if woken in ready:
            os.read(woken, 4096)
        if watched in ready and child.poll() is None:
            return 128 + signal.SIGKILL
    return 128 - status if status < 0 else status


def _end_descendants(command: int) -> None:
    """SIGTERM, SIGKILL after GRACE, until none is left; orphans become children of this process and are found again."""
    start, asked = time.monotonic(), set[int]()
    while _reap() and time.monotonic() - start < GRACE + LAST_WAIT:
        late = time.monotonic() - start > GRACE
        for process in _descendants() if sys.platform == "linux" else [command]:
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
    sys.exit(guard(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
