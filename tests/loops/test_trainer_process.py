"""The driver's view of the trainer: one that hangs is noticed, by whatever clock."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from bnn_driver.errors import EnvironmentProblem
from bnn_driver.loops import trainer
from bnn_driver.loops.trainer import Here, Pulse, TrainerProcess, pulse_file
from bnn_driver.records import Generation
from bnn_driver.store import weights
from bnn_driver.store.run import RunDirectory


def test_the_pulse_beats_while_there_is_work_and_not_more_often_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    touched = []
    monkeypatch.setattr(Path, "touch", lambda self: touched.append(now[0]))
    pulse = Pulse(tmp_path / "alive")
    for now[0] in (100.0, 100.5, 101.5, 101.6, 110.0):
        pulse.beat(3, None)
    assert touched == [100.0, 101.5, 110.0]


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Starting it takes a process that sleeps."""
    started: list[str] = []
    popen = trainer.subprocess.Popen

    def sleeper(command: list[str], **options: object) -> object:
        started.append(command[2])
        return popen(["sleep", "60"], **options)

    monkeypatch.setattr(trainer.subprocess, "Popen", sleeper)
    return started


def test_a_trainer_that_does_nothing_is_started_again_a_few_times(tmp_path: Path, no_process: list[str]) -> None:
    run = RunDirectory(tmp_path)
    process = TrainerProcess(run, Here(run, 1), stall_timeout=0.2, restarts=2)
    weights.publish(process.run.generations_dir, Generation(0, {"w": np.zeros((2, 1))}, ()))
    process.begin()
    try:
        with pytest.raises(
            EnvironmentProblem, match=r"did nothing for 0\.2 s \(\[trainer\] stall_timeout\), after 2 starts in vain"
        ):
            process.wait_until_learnt({"a"}, 0)
        assert len(no_process) == 3
    finally:
        process.stop()


def test_a_beating_trainer_is_left_alone_though_the_clock_goes_back(tmp_path: Path, no_process: list[str]) -> None:
    run = RunDirectory(tmp_path)
    process = TrainerProcess(run, Here(run, 1), stall_timeout=1.5)
    process.begin()
    try:
        for n in range(20):  # a day earlier with every beat, for longer than that
            pulse_file(process.run).touch()
            os.utime(pulse_file(process.run), (1e9 - 86400 * n, 1e9 - 86400 * n))
            process._keep_alive()
            time.sleep(0.12)
        assert len(no_process) == 1
    finally:
        process.stop()
