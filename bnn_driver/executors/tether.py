"""Runs a command that ends when the process that asked for it ends, however that is (Linux).

A script too, which has to start quickly and imports nothing of ours: `python tether.py PARENT_PID COMMAND...`.  The command is out of
reach of Ctrl-C: the parent ends it in its own time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h; it outlasts exec."""


def end_with(parent: int) -> None:
    """Have this process killed at the end of the thread of `parent` that started it (Linux), now if that is over."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    end_with(int(parent))
    os.setsid()
    os.execvp(command[0], command)
