"""Ctrl-C and SIGTERM, as one clean end."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from bnn_driver.errors import CleanStop

AGAIN_SECONDS = 0.1
"""A request that Python lost is made again after so long."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run cleanly, whatever it is doing: sockets are closed, so that i-PI can write its RESTART.

    A scheduler may send SIGTERM to every process of a job, so that some get it twice: the second one changes nothing.
    Raises: CleanStop.
    """
    stopping = False
    over = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise KeyboardInterrupt

    def swallowed(what: Any) -> None:
        """Python prints what is raised in a destructor or a callback of the garbage collector, and goes on."""
        nonlocal stopping
        if not issubclass(what.exc_type, KeyboardInterrupt):
            hook(what)
            return
        stopping = False
        _thread.start_new_thread(repeat, ())  # takes no lock that what was interrupted may hold

    def repeat() -> None:
        time.sleep(AGAIN_SECONDS)
        if not over:
            os.kill(os.getpid(), signal.SIGTERM)

    before, hook = signal.signal(signal.SIGTERM, stop), sys.unraisablehook
    sys.unraisablehook = swallowed
    try:
        yield
    except KeyboardInterrupt:
        raise CleanStop("stopped on request; the same command goes on") from None
    finally:
        over = True
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)
