"""The arithmetic of jobs: who is tried again, how many jobs an hour, and when a job takes no more labels."""

from __future__ import annotations

from itertools import pairwise

import pytest

from bnn_driver.errors import (
    BnnError,
    ConfigError,
    EnvironmentProblem,
    GeometryRejected,
    OracleCrashed,
    OracleInconsistent,
    OracleTimeout,
    SCFNotConverged,
    WorkerLost,
)
from bnn_driver.executor_config import SHORTEST_USE, drain_period
from bnn_driver.executors.pace import HOUR, HourlyCap
from bnn_driver.executors.retries import LONGEST_PAUSE, Retries


@pytest.mark.parametrize("kind", [OracleTimeout, SCFNotConverged, GeometryRejected, OracleInconsistent, EnvironmentProblem])
def test_what_would_recur_is_final(kind: type[BnnError]) -> None:
    assert Retries(pause=1.0).after(kind("text")) is None


def test_a_timeout_is_tried_once_more_where_there_is_patience() -> None:
    patient, hasty = Retries(0.0, patience=2.0), Retries(0.0)
    assert patient.after(OracleTimeout("")) == 0.0
    assert patient.limits == 2.0
    assert patient.after(OracleTimeout("")) is None
    assert hasty.after(OracleTimeout("")) is None


def test_a_dead_code_gets_two_more_chances_and_a_lost_node_four() -> None:
    crashes, losses = Retries(pause=0.0), Retries(pause=2.0)
    assert [crashes.after(OracleCrashed("")) for _ in range(3)] == [0.0, 0.0, None]
    assert [losses.after(WorkerLost("")) for _ in range(5)] == [2.0, 4.0, 8.0, 16.0, None]


def test_losses_and_crashes_share_one_budget() -> None:
    retries = Retries(pause=1.0)
    assert retries.after(WorkerLost("")) == 1.0
    assert retries.after(OracleCrashed("")) == 2.0
    assert retries.after(OracleCrashed("")) is None


def test_pauses_double_up_to_a_longest() -> None:
    retries = Retries(pause=50.0)
    pauses = [retries.after(WorkerLost("")) for _ in range(4)]
    assert pauses == [50.0, 100.0, LONGEST_PAUSE, LONGEST_PAUSE]


def test_no_window_of_an_hour_has_more_jobs_than_the_cap() -> None:
    now = [0.0]
    cap, granted = HourlyCap(3, lambda: now[0]), []
    for minute in range(300):
        now[0] = 60.0 * minute
        granted += [now[0]] * cap.take(2 if minute % 7 else 1)
    assert len(granted) == 15  # 3 in each of the 5 hours: nothing is wasted either
    for start in granted:
        assert sum(start <= time < start + HOUR for time in granted) <= 3
    assert all(a <= b for a, b in pairwise(granted))


def test_the_cap_says_when_the_next_job_may_go() -> None:
    now = [100.0]
    cap = HourlyCap(2, lambda: now[0])
    assert (cap.next_in(), cap.take(5), cap.take(1)) == (0.0, 2, 0)
    now[0] += 600.0
    assert cap.next_in() == HOUR - 600.0
    now[0] += HOUR - 600.0
    assert (cap.next_in(), cap.take(1)) == (0.0, 1)


@pytest.mark.parametrize(("walltime", "timeout", "period"), [(86400.0, 3600.0, 82080.0), (3600.0, 60.0, 3510.0)])
def test_a_label_that_is_started_last_still_ends_in_time(walltime: float, timeout: float, period: float) -> None:
    assert drain_period(walltime, timeout) == period
    assert period + timeout + 30.0 <= walltime


@pytest.mark.parametrize(("walltime", "timeout"), [(60.0, 3600.0), (3600.0, 3600.0), (3600.0, 2990.0)])
def test_jobs_in_which_no_label_could_finish_are_refused(walltime: float, timeout: float) -> None:
    with pytest.raises(ConfigError, match="walltime must be at least") as caught:
        drain_period(walltime, timeout)
    enough = float(str(caught.value).split("at least ")[1].split(" s")[0])
    assert drain_period(enough, timeout) == pytest.approx(SHORTEST_USE)
