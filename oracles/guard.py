"""Runs one command in a session of its own and ends everything it started when the parent is gone.

A script, not a module: `python guard.py OUTPUT ERRORS COMMAND...`.  The parent holds a pipe to standard input; at its end, however
the parent died, the command gets SIGTERM (launchers such as mpirun and srun pass it on), then SIGKILL.  One line of JSON on standard
output says how the command ended: {"status": code} with Popen's sign, or {"error": text} if it could not be started.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""From linux/prctl.h."""
GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL."""


def main() -> None:
    """Start, wait, report."""
    output, errors, *command = sys.argv[1:]
    die_with_guard = None
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        # what a launcher leaves behind becomes a child of the guard, so that it can be found and ended
        prctl(PR_SET_CHILD_SUBREAPER, 1)

        def die_with_guard() -> None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    try:
        with Path(output).open("wb") as out, Path(errors).open("wb") as err:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=die_with_guard,  # before any thread exists
            )
    except OSError as error:
        _report({"error": str(error)})
        return
    threading.Thread(target=_watch, args=(child,), daemon=True).start()
    # seen but not yet waited for: its number cannot belong to another group
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    _signal_group(child, signal.SIGKILL)
    status = child.wait()
    if _has_children():
        _signal_descendants(signal.SIGKILL)
    _report({"status": status})


def _report(facts: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(facts).encode() + b"\n")


def _watch(child: subprocess.Popen[bytes]) -> None:
    """Nothing is ever written to the pipe: a read returns when the parent is gone."""
    os.read(0, 1)
    _signal_group(child, signal.SIGTERM)
    _signal_descendants(signal.SIGTERM)
    end = time.monotonic() + GRACE
    while time.monotonic() < end and _signal_descendants(0):
        time.sleep(0.05)
    _signal_group(child, signal.SIGKILL)
    _signal_descendants(signal.SIGKILL)
    os._exit(1)


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _signal_descendants(number: int) -> bool:
    """Reach also those that left the group; True when there was one alive."""
    import psutil

    found = False
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, PermissionError):
            if process.status() != psutil.STATUS_ZOMBIE:
                found = True
                process.send_signal(number)
    return found


if __name__ == "__main__":
    main()
