"""Ctrl-C and SIGTERM, as one clean end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from bnn_driver.errors import CleanStop


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run cleanly, whatever it is doing: sockets are closed, so that i-PI can write its RESTART.

    A scheduler may send SIGTERM to every process of a job, so that some get it twice: the second one changes nothing.
    Raises: CleanStop.
    """
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise CleanStop("stopped on request; the same command goes on") from None
    finally:
        signal.signal(signal.SIGTERM, before)
