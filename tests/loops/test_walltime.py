"""The end of a start is read rightly, and what cannot finish before it is not begun."""

from __future__ import annotations

import signal
import time
from datetime import datetime

import pytest

from bnn_driver.errors import ConfigError, GuardStop, WallLimit
from bnn_driver.loops.walltime import HEADROOM, End, TimeIsUp, WallClock, find_end, parse_until

NOW = datetime.fromisoformat("2026-11-21T22:45:00").timestamp()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("23:30", "2026-11-21T23:30:00"),
        ("22:44", "2026-11-22T22:44:00"),
        ("6:00:30", "2026-11-22T06:00:30"),
        ("2 h", "2026-11-22T00:45:00"),
        ("90 min", "2026-11-22T00:15:00"),
        ("2026-12-01 06:00", "2026-12-01T06:00:00"),
        ("2026-12-01T06:00:00", "2026-12-01T06:00:00"),
    ],
)
def test_times_as_people_write_them(text: str, expected: str) -> None:
    assert parse_until(text, NOW) == datetime.fromisoformat(expected).timestamp()


def test_a_date_may_carry_its_own_zone() -> None:
    assert parse_until("2026-12-01T06:00:00+02:00", NOW) == datetime.fromisoformat("2026-12-01T04:00:00+00:00").timestamp()


@pytest.mark.parametrize("text", ["soon", "25:00", "12:61", "3 fortnights", "", "7"])
def test_other_words_are_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="23:30"):
        parse_until(text, NOW)


@pytest.mark.parametrize("text", ["2026-11-21 22:00", "-5 min", "0 s"])
def test_the_past_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="past"):
        parse_until(text, NOW)


def test_the_users_word_goes_before_the_schedulers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1900000000")
    by_job = find_end(None)
    assert by_job is not None
    assert by_job.moment == 1900000000
    assert "Slurm job 5" in str(by_job)
    by_user = find_end("2 h")
    assert by_user is not None
    assert by_user.moment == pytest.approx(time.time() + 7200, abs=5)


def clock(seconds: float, margin: float = 0.0) -> WallClock:
    return WallClock(End(time.time() + seconds, "test"), margin)


def test_nothing_is_begun_in_the_margin() -> None:
    with pytest.raises(ConfigError, match="margin"):
        clock(30, 60)


@pytest.mark.parametrize(
    ("count", "workers", "slowest", "limit", "fits"),
    [
        (1, 1, 90 / HEADROOM, 1e4, True),
        (1, 1, 110 / HEADROOM, 1e4, False),
        (2, 1, 60 / HEADROOM, 1e4, False),
        (2, 2, 60 / HEADROOM, 1e4, True),
        (3, 2, 60 / HEADROOM, 1e4, False),
        (1, 1, 1e4, 90, True),
        (1, 1, None, 1e4, True),
    ],
)
def test_labels_begin_only_when_they_can_finish(
    count: int, workers: int, slowest: float | None, limit: float, fits: bool
) -> None:
    ours = clock(160, 60)
    if fits:
        ours.check_labels(count, slowest, workers, limit)
    else:
        with pytest.raises(TimeIsUp, match="cannot finish"):
            ours.check_labels(count, slowest, workers, limit)


def test_without_an_end_everything_may_begin() -> None:
    WallClock(None, 60.0).check_labels(99, 1e9, 1, 1e9)


@pytest.fixture
def own_alarm() -> object:
    """The timer of the process, which the test runner may use, kept."""
    handler, (left, interval) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    yield None
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, left, interval)


@pytest.mark.usefixtures("own_alarm")
def test_whatever_waits_is_stopped_in_time() -> None:
    begin = time.monotonic()
    ours = clock(1.3, 1.0)
    ours.progressed = lambda: True
    with pytest.raises(WallLimit, match="the same command goes on") as stopped:
        with ours.armed():
            time.sleep(20)
    assert 0.2 < time.monotonic() - begin < 15
    assert stopped.value.exit_code == 75


@pytest.mark.usefixtures("own_alarm")
def test_a_start_without_progress_is_not_worth_another() -> None:
    ours = clock(0.3)
    with pytest.raises(GuardStop, match="more time"):
        with ours.armed():
            time.sleep(20)


@pytest.mark.usefixtures("own_alarm")
def test_a_clock_that_is_disarmed_stops_nothing() -> None:
    ours = clock(0.2)
    with ours.armed():
        ours.disarm()
        time.sleep(0.4)
