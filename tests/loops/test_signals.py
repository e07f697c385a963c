"""A request to stop is one clean end, also where Python loses what a signal raises."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from bnn_driver.errors import CleanStop
from bnn_driver.loops.signals import stop_on_signals
from bnn_driver.loops.walltime import TimeIsUp


class Signalled:
    """Gets SIGTERM while it is destroyed."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


class TimedOut:
    """Its destructor meets the end of the time."""

    def __del__(self) -> None:
        raise TimeIsUp


def test_a_second_request_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    saved = list[str]()

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            saved.append("all")

    with pytest.raises(CleanStop, match="the same command goes on"), stop_on_signals():
        work()
    assert saved == ["all"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("lost", [Signalled, TimedOut])
def test_a_request_that_python_loses_is_made_again(lost: type) -> None:
    hook, begin = sys.unraisablehook, time.monotonic()

    def work() -> None:
        lost()
        time.sleep(60)

    with pytest.raises(CleanStop), stop_on_signals():
        work()
    assert time.monotonic() - begin < 30, "the wait is interrupted"
    assert sys.unraisablehook is hook


class Broken:
    """Its destructor has a mistake."""

    def __del__(self) -> None:
        raise ValueError("a mistake")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_other_errors_of_destructors_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[object]()
    monkeypatch.setattr(sys, "unraisablehook", lambda what: seen.append(what.exc_type))
    with stop_on_signals():
        Broken()
        time.sleep(0.5)
    assert seen == [ValueError]
