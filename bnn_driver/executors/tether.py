"""Runs a command that ends when the process that asked for it ends, however that is (Linux).

A script, not a module, for it has to start quickly: `python tether.py PARENT_PID COMMAND...`.  The command is out of reach of Ctrl-C:
the parent ends it in its own time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h; it outlasts exec."""


def end_with_parent() -> None:
    """Have this process killed at the end of the thread that started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    end_with_parent()
    if os.getppid() != int(parent):
        os._exit(1)
    os.setsid()
    os.execvp(command[0], command)
