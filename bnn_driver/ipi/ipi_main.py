"""The process that is i-PI: it ends with what started it, and writes RESTART however often it is told to end.

A script that imports nothing of ours: `python ipi_main.py PARENT_PID I-PI ARGUMENT...`.  To i-PI a second SIGTERM means: at once, without
RESTART.  Second ones are usual: the kernel sends one for each thread of a parent that is killed, a scheduler tells every process of
a job, and so does the next driver.  So SIGTERM is waited for here, and i-PI gets one SIGINT for all of them.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def interrupt_once() -> None:
    """Send SIGINT to this process at its first SIGTERM, and nothing at those that follow."""
    signal.sigwait({signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of all threads to come too: pending until it is waited for
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until i-PI has a handler; behind a shell's & it would be ignored
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent died before this process started")
    threading.Thread(target=interrupt_once, daemon=True, name="sigterm").start()
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
