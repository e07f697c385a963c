"""Whatever happens to a child process, every frame gets its label once, or an error that says what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from third_party import DIES_ONCE, EXITS, FORKS, PRINTS, RAISES, SLEEPS, UNCONVERGED, calls, helium, install

from bnn_driver import errors
from bnn_driver.errors import OracleConfigError, OracleCrashed, OracleError, OracleTimeout, SCFNotConverged
from bnn_driver.executors import LocalExecutor
from bnn_driver.oracle import Limits, label, load_oracle, read_failures, write_done
from bnn_driver.records import Frames


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalExecutor]]:
    """Executors of an oracle that a third party installed, with one worker and a limit of 20 s."""
    install(tmp_path / "site", monkeypatch)
    started: list[LocalExecutor] = []

    def start(timeout: float = 20.0, workers: int = 1) -> LocalExecutor:
        started.append(LocalExecutor("faulty", {}, workers, timeout, tmp_path / "work", 1, tmp_path / "spool"))
        return started[-1]

    yield start
    for executor in started:
        executor.shutdown(wait=False)


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "bnn_driver.oracle_worker" in p.cmdline()]


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def test_the_child_gives_the_label_that_the_oracle_gives_here(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [Frames(np.array([8, 1, 1]), rng.normal(0, 1.5, (1, 3, 3))) for _ in range(6)]
    limits = Limits(min_distance=0.01, covalent_fraction=0.0, max_force=1e6)
    with LocalExecutor("toy", {}, 2, 20.0, tmp_path / "work", 1, tmp_path / "spool", limits=limits) as executor:
        labels = [future.result() for future in [executor.submit(frame) for frame in frames]]
    for frame, got in zip(frames, labels, strict=True):
        wanted = label(load_oracle("toy", {}), frame, limits)
        assert got.energy == wanted.energy
        assert got.forces.tobytes() == wanted.forces.tobytes()
        assert got.frame_id == frame.content_id(executor.fingerprint)
    assert not children()


def test_a_child_computes_with_the_given_threads_and_lives_on(faulty: Callable[..., LocalExecutor]) -> None:
    executor = faulty()
    assert executor.submit(helium()).result().evidence == "1"
    before = [p.pid for p in children()]
    executor.submit(helium(x=1.0)).result()
    assert [p.pid for p in children()] == before


def test_a_label_in_the_spool_is_never_computed_again(faulty: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    first = faulty()
    known = first.submit(helium()).result()
    first.shutdown()
    write_done(tmp_path / "spool", replace(known, energy=-123.25))
    assert faulty().submit(helium()).result().energy == -123.25
    assert calls(tmp_path / "work") == 1


def test_one_frame_in_flight_is_one_future(faulty: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    executor = faulty()
    futures = [executor.submit(helium()) for _ in range(3)]
    assert futures[0] is futures[1]
    wait(futures)
    assert calls(tmp_path / "work") == 1


def test_urgent_frames_overtake_audits(faulty: Callable[..., LocalExecutor]) -> None:
    executor, done = faulty(), []
    running = executor.submit(helium(DIES_ONCE))
    assert eventually(running.running)
    for name, x, priority in [("audit", 1.0, 1), ("upgraded", 2.0, 1), ("asked", 3.0, 0), ("asked later", 4.0, 0)]:
        future = executor.submit(helium(x=x), priority=priority)
        future.add_done_callback(lambda _, name=name: done.append(name))
    executor.submit(helium(x=2.0), priority=-1)
    executor.shutdown()
    assert done == ["upgraded", "asked", "asked later", "audit"]


def test_a_cancelled_frame_costs_nothing_and_can_be_asked_again(faulty: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    executor = faulty()
    running = executor.submit(helium())
    waiting = executor.submit(helium(x=1.0))
    assert waiting.cancel()
    again = executor.submit(helium(x=1.0))
    assert again.result().energy == 0.0
    running.result()
    assert calls(tmp_path / "work") == 2


def test_a_hanging_calculation_is_killed_and_tried_once_more_with_twice_the_limit(
    faulty: Callable[..., LocalExecutor], tmp_path: Path
) -> None:
    executor = faulty(timeout=1.0)
    executor.submit(helium()).result()  # the start of the process does not count
    start = time.monotonic()
    with pytest.raises(OracleTimeout, match="killed after 2 s"):
        executor.submit(helium(SLEEPS)).result()
    assert 2.9 < time.monotonic() - start < 30
    assert executor.submit(helium(x=1.0)).result().energy == 0.0
    (failure,) = read_failures(tmp_path / "spool").values()
    assert (failure["class"], failure["count"]) == ("OracleTimeout", 2)


def test_what_the_code_started_dies_with_it(faulty: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    with pytest.raises(OracleTimeout):
        faulty(timeout=3.0).submit(helium(FORKS)).result()
    grandchild = int((tmp_path / "work" / "worker-0" / "grandchild").read_text())
    assert eventually(lambda: not alive(grandchild))


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_frame_whose_child_dies_once_is_tried_again(faulty: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    assert faulty().submit(helium(DIES_ONCE)).result().energy == -3.0
    assert calls(tmp_path / "work", "deaths") == 2
    assert read_failures(tmp_path / "spool") == {}


def test_a_child_killed_from_outside_is_replaced(tmp_path: Path) -> None:
    water = Frames(np.array([8, 1, 1]), np.array([[[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]]))
    with LocalExecutor("toy", {"delay": "1 s"}, 1, 20.0, tmp_path / "work", 1, tmp_path / "spool") as executor:
        future = executor.submit(water)
        assert eventually(lambda: len(children()) == 1)
        (victim,) = children()
        time.sleep(0.5)
        os.kill(victim.pid, signal.SIGKILL)
        assert future.result().energy == label(load_oracle("toy", {}), water).energy
        (replacement,) = children()
        os.kill(replacement.pid, signal.SIGKILL)  # idle: noticed when the next frame comes, without a failed attempt
        executor.submit(replace(water, charge=1)).result()
    assert read_failures(tmp_path / "spool") == {}


def test_a_child_that_always_dies_is_reported_with_its_status(faulty: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    executor = faulty()
    with pytest.raises(OracleCrashed, match=r"exit status 3.*stderr\.log"):
        executor.submit(helium(EXITS)).result()
    assert calls(tmp_path / "work") == 3
    assert read_failures(tmp_path / "spool")[helium(EXITS).content_id(executor.fingerprint)]["count"] == 3


def test_a_failed_scf_is_final_and_keeps_its_class(faulty: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    executor = faulty()
    with pytest.raises(SCFNotConverged, match="no rung of the ladder"):
        executor.submit(helium(UNCONVERGED)).result()
    assert calls(tmp_path / "work") == 1
    (failure,) = read_failures(tmp_path / "spool").values()
    assert failure == {"class": "SCFNotConverged", "message": "no rung of the ladder", "count": 1}


def test_a_defect_of_an_oracle_is_an_oracle_error(faulty: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    with pytest.raises(OracleCrashed, match="ValueError: a defect of the oracle"):
        faulty().submit(helium(RAISES)).result()
    assert "Traceback" in (tmp_path / "work" / "worker-0" / "stderr.log").read_text()


def test_a_code_that_prints_or_reads_does_not_disturb(faulty: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    executor = faulty()
    assert executor.submit(helium(PRINTS)).result().energy == -5.0
    executor.shutdown()
    assert "more noise" in (tmp_path / "work" / "worker-0" / "stderr.log").read_text()


def test_settings_that_cannot_work_are_reported_not_retried(tmp_path: Path) -> None:
    pytest.importorskip("tblite")
    radical = Frames(np.array([8, 1]), np.array([[[0.0, 0, 0], [0.97, 0, 0]]]))
    with LocalExecutor("tblite", {}, 1, 20.0, tmp_path / "work", 1, tmp_path / "spool") as executor:
        with pytest.raises(OracleConfigError, match="9 electrons"):
            executor.submit(radical).result()


def test_shutdown_without_waiting_ends_everything_at_once(faulty: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    executor = faulty()
    running = executor.submit(helium(SLEEPS))
    waiting = executor.submit(helium(x=1.0))
    assert eventually(lambda: (tmp_path / "work" / "calls").exists())
    start = time.monotonic()
    executor.shutdown(wait=False)
    assert time.monotonic() - start < 40
    assert waiting.cancelled()
    assert isinstance(running.exception(), OracleCrashed)
    assert not children()
    assert read_failures(tmp_path / "spool") == {}  # the frame is not to blame
    with pytest.raises(OracleError, match="shut down"):
        executor.submit(helium(x=2.0))


def test_leaving_with_an_error_does_not_wait(faulty: Callable[..., LocalExecutor]) -> None:
    def interrupted() -> None:
        with faulty() as executor:
            executor.submit(helium(SLEEPS))
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - start < 40


def test_two_workers_label_at_once(faulty: Callable[..., LocalExecutor]) -> None:
    executor = faulty(timeout=4.0, workers=2)
    stuck, free = executor.submit(helium(SLEEPS)), executor.submit(helium())
    assert free.result().energy == 0.0
    assert not stuck.done()


PARENT = """
import sys
from pathlib import Path
import numpy as np
from bnn_driver.executors import LocalExecutor
from bnn_driver.records import Frames

folder = Path(sys.argv[1])
executor = LocalExecutor("toy", {"delay": "60 s"}, 1, 100.0, folder / "work", 1, folder / "spool")
executor.submit(Frames(np.array([2]), np.zeros((1, 1, 3)))).result()
"""


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_the_death_of_the_driver_leaves_no_orphan(tmp_path: Path, death: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        process = psutil.Process(parent.pid)
        assert eventually(lambda: bool(process.children()))
        (child,) = process.children()
        time.sleep(0.5)
        assert child.is_running()
        parent.send_signal(death)
        parent.wait(10)
        assert eventually(lambda: not alive(child.pid), 30)
    finally:
        parent.kill()


def test_a_label_written_just_before_the_end_is_kept(faulty: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    executor = faulty()
    known = executor.submit(helium()).result()
    spool, name = tmp_path / "spool", helium(EXITS).content_id(executor.fingerprint)
    future = executor.submit(helium(EXITS))
    write_done(spool, replace(known, frame_id=name, energy=-77.0))
    assert future.result().energy == -77.0


def test_every_error_of_the_oracle_tree_keeps_its_class() -> None:
    from bnn_driver.executors.messages import error_from_facts, error_to_facts

    tree = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, OracleError)]
    assert len(tree) > 6
    for kind in tree:
        assert type(error_from_facts(error_to_facts(kind("text")))) is kind
    assert type(error_from_facts({"error": "SystemExit", "message": "text"})) is OracleCrashed
