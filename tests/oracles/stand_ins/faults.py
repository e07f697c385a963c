"""What can go wrong while a code runs, done by a stand-in to itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def refuse(reason: str) -> None:
    """The input is not what the recorded run had: say why and fail."""
    sys.stderr.write(f"stand-in: {reason}\n")
    sys.exit(1)


def expect(condition: bool, reason: str) -> None:
    """As `assert`, also under python -O."""
    if not condition:
        refuse(reason)


def die(fault: str) -> None:
    """End as a crash, a signal or a launcher whose ranks hang; called with half of the output written."""
    sys.stdout.flush()
    if fault == "exit":
        sys.stderr.write("forrtl: severe (174): SIGSEGV, segmentation fault occurred\n")
        sys.exit(174)
    if fault == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        # as MPI does: a rank in a session of its own, deaf to SIGTERM
        rank = subprocess.Popen(
            [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"],
            start_new_session=True,
        )
        Path("pids").write_text(f"{os.getpid()} {rank.pid}")
        time.sleep(300)
