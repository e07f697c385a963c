"""The end of a process whose parent is gone; imports nothing heavy, so that it can begin before what does."""

from __future__ import annotations

import os
import threading

# argv: this process, then a command that is ended (SIGTERM) when this process dies, however it dies
LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent died before this process started")
os.execv(sys.argv[2], sys.argv[2:])
"""


def end_with_parent() -> None:
    """End this process at once when standard input closes, which it does when the parent is gone, however it ended."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
