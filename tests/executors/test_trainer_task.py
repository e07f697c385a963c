"""The trainer as a task of a real Parsl on this machine; it stands by for the lock of another, so that it costs next to nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("parsl")
from deployments import HEARTBEAT, ended, eventually, family, pools

from bnn_driver.errors import EnvironmentProblem
from bnn_driver.executors.pace import HourlyCap
from bnn_driver.executors.parsl import Deployment, on_this_machine
from bnn_driver.loops.remote_trainer import MARK, OnParsl
from bnn_driver.loops.trainer import TrainerProcess
from bnn_driver.loops.trainer_task import run_trainer
from bnn_driver.records import Generation
from bnn_driver.store import weights
from bnn_driver.store.run import RunDirectory

pytestmark = [
    pytest.mark.slow,
    # Parsl leaves sockets open where it looks for the addresses of this machine
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Callable[..., OnParsl]]:
    """Makes places for the trainer of one run; at the end nothing of them may live."""
    made: list[OnParsl] = []

    def make(drain: int | None = None, accelerators: tuple[str, ...] = ()) -> OnParsl:
        def deploy() -> Deployment:
            layout = on_this_machine(1, tmp_path / "parsl", HEARTBEAT, accelerators, "chains")
            layout.executor.drain_period = drain
            return Deployment(layout, HourlyCap(30), HEARTBEAT, run_trainer)

        made.append(OnParsl(RunDirectory(tmp_path / "run"), 1, deploy))
        return made[-1]

    yield make
    for item in made:
        item.stop()
    assert eventually(lambda: not family(tmp_path, os.getpid()), 3 * HEARTBEAT), family(tmp_path, os.getpid())


def mark(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "run" / MARK
    return json.loads(file.read_text()) if file.exists() else {}


def begun(item: OnParsl) -> bool:
    assert item.ended() == ""
    return not item.waits()


def test_the_trainer_sees_one_of_the_accelerators_and_ends_when_it_is_stopped(
    place: Callable[..., OnParsl], tmp_path: Path
) -> None:
    item = place(accelerators=("3", "5"))
    with item.run.lock("trainer"):
        item.start()
        assert item.waits()
        assert eventually(lambda: begun(item))
        trainer = psutil.Process(mark(tmp_path)["pid"])
        assert "bnn_driver.loops.trainer_main" in trainer.cmdline()
        assert trainer.environ()["CUDA_VISIBLE_DEVICES"] == mark(tmp_path)["accelerator"]
        assert trainer.environ()["CUDA_VISIBLE_DEVICES"] in ("3", "5")
        assert trainer.environ()["OMP_NUM_THREADS"] == "1"
        item.stop()
        assert ended(trainer.pid)


def test_a_killed_worker_takes_the_trainer_with_it_and_so_does_a_killed_pool(
    place: Callable[..., OnParsl], tmp_path: Path
) -> None:
    item = place()
    with item.run.lock("trainer"):
        item.start()
        assert eventually(lambda: begun(item))
        for victim in ("worker", "pool"):
            trainer, worker = (psutil.Process(mark(tmp_path)[key]) for key in ("pid", "worker"))
            (pool,) = pools(tmp_path)
            (worker if victim == "worker" else pool).kill()
            assert eventually(lambda trainer=trainer: ended(trainer.pid), 30), victim
            assert eventually(lambda: item.ended().startswith("was lost: "), 30), victim
            item.start()
            assert eventually(lambda: begun(item))
            assert mark(tmp_path)["pid"] != trainer.pid


def test_the_trainer_ends_in_time_for_the_end_of_its_job_and_goes_on_in_the_next(
    place: Callable[..., OnParsl], tmp_path: Path
) -> None:
    item = place(drain=20)
    with item.run.lock("trainer"):
        item.start()
        assert eventually(lambda: begun(item))
        (pool,) = pools(tmp_path)
        age = lambda: time.time() - pool.create_time()  # noqa: E731
        first = mark(tmp_path)["pid"]
        assert eventually(lambda: item.ended() == "was ended in time for the end of its job", 90)
        assert age() > 20 + 5
        assert ended(first)
        item.start()
        assert eventually(lambda: begun(item))
        assert pools(tmp_path) != [pool]


def test_a_second_driver_stands_by_and_takes_over(place: Callable[..., OnParsl], tmp_path: Path) -> None:
    first, second = place(), place()
    with first.run.lock("trainer"):
        first.start()
        second.start()
        assert second.ended() == ""
        assert second.waits()
        assert eventually(lambda: begun(first) and begun(second))
        assert len(pools(tmp_path)) == 1
        before = mark(tmp_path)["attempt"]
        first.stop()
        assert eventually(lambda: begun(second) and mark(tmp_path).get("attempt", before) != before)
        assert len(pools(tmp_path)) == 1


def test_time_in_a_queue_is_not_taken_for_a_hang(place: Callable[..., OnParsl], tmp_path: Path) -> None:
    item = place()
    weights.publish(item.run.generations_dir, Generation(0, {"w": np.zeros((2, 1))}, ()))
    process = TrainerProcess(item.run, item, stall_timeout=0.2, restarts=0)
    with item.run.lock("trainer"):
        process.begin()
        with pytest.raises(EnvironmentProblem, match=r"did nothing for 0\.2 s"):
            process.wait_until_learnt({"a"}, 0)
        assert mark(tmp_path)["pid"], "it had begun"


def test_a_trainer_that_no_worker_takes_ends_the_run_with_what_to_look_at(tmp_path: Path) -> None:
    layout = on_this_machine(1, tmp_path / "parsl", HEARTBEAT, label="chains")
    layout.executor.provider.worker_init = "sleep 300"  # type: ignore[union-attr]
    patient = replace(layout, queue_timeout=3.0)
    item = OnParsl(RunDirectory(tmp_path / "run"), 1, lambda: Deployment(patient, HourlyCap(30), HEARTBEAT, run_trainer))
    item.start()
    try:
        assert item.ended() == ""
        with pytest.raises(EnvironmentProblem, match=r"the trainer still waits .*queue_timeout"):
            eventually(item.ended, 20)
    finally:
        item.stop()


def test_a_trainer_that_fails_every_time_ends_the_run_with_its_words(place: Callable[..., OnParsl], tmp_path: Path) -> None:
    item = place()
    weights.publish(item.run.generations_dir, Generation(0, {"w": np.zeros((2, 1))}, ()))
    process = TrainerProcess(item.run, item, stall_timeout=60.0, restarts=1)
    process.begin()
    with pytest.raises(EnvironmentProblem, match=r"(?s)ended with status \d, after 1 starts in vain.*bnn\.toml"):
        process.wait_until_learnt({"a"}, 0)
    assert (item.run.log_dir / "trainer.log").read_text().count("is a task of Parsl") == 2
