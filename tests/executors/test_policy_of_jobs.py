"""The arithmetic of jobs: who is tried again, how many jobs an hour, and when a job takes no more labels."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path

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
from bnn_driver.executors.pace import BOOT, HOUR, HourlyCap, Instant
from bnn_driver.executors.retries import LONGEST_PAUSE, Retries
from bnn_driver.store.files import shared_list


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


def at(wall: float, uptime: float | None = None, boot: str = "this") -> Instant:
    return Instant(wall, boot, wall if uptime is None else uptime)


def test_no_window_of_an_hour_has_more_jobs_than_the_cap() -> None:
    now = [at(0.0)]
    cap, granted = HourlyCap(3, clock=lambda: now[0]), []
    for minute in range(300):
        now[0] = at(60.0 * minute)
        granted += [now[0].wall] * cap.take(2 if minute % 7 else 1)
    assert len(granted) == 15  # 3 in each of the 5 hours: nothing is wasted either
    for start in granted:
        assert sum(start <= time < start + HOUR for time in granted) <= 3
    assert all(a <= b for a, b in pairwise(granted))


def test_the_cap_says_when_the_next_job_may_go() -> None:
    now = [at(100.0)]
    cap = HourlyCap(2, clock=lambda: now[0])
    assert (cap.next_in(), cap.take(5), cap.take(1)) == (0.0, 2, 0)
    now[0] = at(700.0)
    assert cap.next_in() == HOUR - 600.0
    now[0] = at(100.0 + HOUR)
    assert (cap.next_in(), cap.take(1)) == (0.0, 1)


def shared(file: Path, limit: int, now: Instant) -> HourlyCap:
    """As a process that starts at this moment has it."""
    return HourlyCap(limit, partial(shared_list, file), lambda: now)


def test_processes_and_restarts_share_one_cap(tmp_path: Path) -> None:
    file = tmp_path / "oracle" / "jobs.json"
    assert shared(file, 4, at(0.0)).take(3) == 3
    assert shared(file, 4, at(60.0)).take(3) == 1
    assert shared(file, 4, at(120.0)).take(1) == 0
    assert shared(file, 2, at(120.0)).next_in() == HOUR - 120.0  # a smaller cap: two of the first three must be an hour old
    assert shared(file, 1, at(120.0)).next_in() == HOUR - 60.0
    assert shared(file, 4, at(HOUR)).take(9) == 3
    assert len(json.loads(file.read_text())) == 4
    assert not [path for path in file.parent.iterdir() if path.name not in (".lock", "jobs.json")]


SUBMITS = """
import sys
from functools import partial
from pathlib import Path
from bnn_driver.executors.pace import HourlyCap
from bnn_driver.store.files import shared_list
cap = HourlyCap(20, partial(shared_list, Path(sys.argv[1])))
print(sum(cap.take(1) for _ in range(20)))
"""


def test_real_processes_at_the_same_time_get_no_more_than_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUBMITS, str(tmp_path / "jobs.json")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sum(int(process.communicate(timeout=120)[0]) for process in processes) == 20
    assert HourlyCap(20, partial(shared_list, tmp_path / "jobs.json")).take(1) == 0


@pytest.mark.parametrize("jump", [-90_000.0, -5.0, 90_000.0])
def test_a_clock_that_jumps_neither_lifts_the_cap_nor_holds_jobs_for_longer_than_an_hour(tmp_path: Path, jump: float) -> None:
    file = tmp_path / "jobs.json"
    assert shared(file, 2, at(0.0, 50.0)).take(2) == 2
    assert shared(file, 2, at(jump + 600.0, 650.0)).take(1) == 0
    assert shared(file, 2, at(jump + 600.0, 650.0)).next_in() == HOUR - 600.0
    assert shared(file, 2, at(jump + HOUR, 50.0 + HOUR)).take(3) == 2


@pytest.mark.parametrize("boot", ["that", ""])
def test_on_another_machine_or_after_a_boot_the_wall_clock_counts(tmp_path: Path, boot: str) -> None:
    file = tmp_path / "jobs.json"
    assert shared(file, 2, at(0.0, 1e6, boot)).take(2) == 2
    assert shared(file, 2, at(600.0, 5.0)).take(1) == 0
    assert shared(file, 2, at(HOUR, 5.0)).take(1) == 1
    shared(file, 2, at(1e9, 5.0, boot)).take(2)  # its clock was wrong
    assert shared(file, 2, at(HOUR + 60.0, 65.0)).take(1) == 0
    assert shared(file, 2, at(HOUR + 61.0 + HOUR, 66.0 + HOUR)).take(3) == 2


def test_this_machine_knows_its_boot() -> None:
    first, second = Instant.now(), Instant.now()
    assert 0.0 <= second.since(asdict(first)) < 10.0
    assert first.boot == second.boot
    assert first.boot or not BOOT.exists()


@pytest.mark.parametrize(
    "damaged",
    [b"", b'[{"wall": 1.0, "bo', b"{}", b"\xff\xfe\x00", b'[1, null, "x", {"wall": "y", "boot": "this", "uptime": "z"}, {"a": 1}]',
     b'[{"wall": NaN, "boot": "", "uptime": 0.0}]'],
)  # fmt: skip
def test_a_damaged_file_does_not_stop_a_run(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "jobs.json").write_bytes(damaged)
    assert shared(tmp_path / "jobs.json", 2, at(0.0)).take(1) == 1
    assert shared(tmp_path / "jobs.json", 2, at(1.0)).take(2) == 1


def test_what_is_held_back_is_said_once_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [at(0.0)]
    cap = HourlyCap(1, partial(shared_list, tmp_path / "jobs.json"), lambda: now[0])
    assert [cap.grant(1) for _ in range(4)] == [1, 0, 0, 0]
    assert [r.getMessage() for r in caplog.records] == [
        "1 more jobs are wanted, but 1 were submitted within the hour (jobs_per_hour); the next one in 3600 s"
    ]
    now[0] = at(HOUR)
    assert [cap.grant(1) for _ in range(3)] == [1, 0, 0]
    assert len(caplog.records) == 2


def test_jobs_that_cannot_be_counted_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "oracle").write_text("no folder")
    cap = HourlyCap(1, partial(shared_list, tmp_path / "oracle" / "jobs.json"))
    assert cap.grant(1) == 0
    assert str(tmp_path / "oracle") in caplog.text
    (tmp_path / "oracle").unlink()
    assert cap.grant(1) == 1


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
