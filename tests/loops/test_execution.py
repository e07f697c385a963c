"""[executor] from the config file to the labels of a run."""

from __future__ import annotations

import builtins
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import program, write_run

from bnn_driver.config import Config, read_config
from bnn_driver.errors import ConfigError, EnvironmentProblem
from bnn_driver.executors import LocalExecutor
from bnn_driver.loops.execution import make_executor, make_trainer_place
from bnn_driver.records import Frames
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import RunDirectory


def configured(tmp_path: Path, text: str) -> Path:
    config = write_run(tmp_path, steps=10)
    config.write_text(config.read_text().replace("workers = 1\n", "") + text)  # Parsl's jobs say how many there are
    return config


def test_processes_of_this_machine_are_the_default(tmp_path: Path) -> None:
    config = read_config(configured(tmp_path, ""))
    with make_executor(config, {}, tmp_path, tmp_path / "oracle", tmp_path / "spool") as executor:
        assert isinstance(executor, LocalExecutor)
        assert executor.workers == 1


def test_without_parsl_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.split(".")[0] == "parsl" or (name == "bnn_driver.executors" and "parsl" in (arguments[2] or ())):
            raise ModuleNotFoundError("No module named 'parsl'", name="parsl")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    config = read_config(configured(tmp_path, '[executor]\nkind = "parsl"\n'))
    with pytest.raises(EnvironmentProblem, match=r"pip install 'bnn-driver\[parsl\]'"):
        make_executor(config, {}, tmp_path, tmp_path / "oracle", tmp_path / "spool")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("parsl")
    config = read_config(configured(tmp_path, '[executor]\nkind = "parsl"\nconfig = "absent.py"\n'))
    with pytest.raises(ConfigError, match=r"there is no file .*absent\.py"):
        make_executor(config, {}, tmp_path, tmp_path / "oracle", tmp_path / "spool")


def test_slurm_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("parsl")
    monkeypatch.setenv("PATH", str(tmp_path))
    config = read_config(configured(tmp_path, '[executor]\nkind = "parsl"\n[executor.slurm]\nwalltime = "1 h"\n'))
    with pytest.raises(EnvironmentProblem, match="sbatch is no program here"):
        make_executor(config, {}, tmp_path, tmp_path / "oracle", tmp_path / "spool")


def chains(tmp_path: Path, text: str) -> Config:
    config = write_run(tmp_path, steps=10)
    config.write_text(config.read_text().replace("[trainer]", f'[trainer]\nexecutor = "parsl"\n{text}'))
    return read_config(config)


def test_a_file_for_the_trainer_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("parsl")
    with pytest.raises(ConfigError, match=r"\[trainer\] config: there is no file .*absent\.py"):
        make_trainer_place(chains(tmp_path, 'config = "absent.py"'), tmp_path, RunDirectory(tmp_path / "run"))


def test_slurm_for_the_trainer_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("parsl")
    monkeypatch.setenv("PATH", str(tmp_path))
    config = chains(tmp_path, 'slurm = { walltime = "1 h" }')
    with pytest.raises(EnvironmentProblem, match=r"\[trainer\.slurm\] sbatch is no program here"):
        make_trainer_place(config, tmp_path, RunDirectory(tmp_path / "run"))


OWN = """
from bnn_driver.executors.parsl import _pool_command
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider
config = Config(executors=[HighThroughputExecutor(
    address="127.0.0.1", max_workers_per_node=1, heartbeat_period=1, heartbeat_threshold=4, launch_cmd=_pool_command(),
    provider=LocalProvider(max_blocks=1),
)], strategy_period=1)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
def test_a_second_start_and_the_trainer_have_no_jobs_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("parsl")
    (tmp_path / "own.py").write_text(OWN)
    text = 'config = "own.py"\njobs_per_hour = 1\nheartbeat = "8 s"\n'
    path = configured(tmp_path, f'[executor]\nkind = "parsl"\n{text}')
    path.write_text(path.read_text().replace("[trainer]\n", f'[trainer]\nexecutor = "parsl"\n{text}'))
    config, run = read_config(path), RunDirectory(tmp_path / "run", "hot")
    frame = Frames(np.array([2]), np.zeros((1, 1, 3)))
    with make_executor(config, {}, tmp_path, run.oracle_dir, run.spool_dir) as executor:
        executor.submit(frame).result(timeout=120)
    assert "jobs_per_hour" not in caplog.text
    other = RunDirectory(tmp_path / "run", "cold")
    with make_executor(config, {}, tmp_path, other.oracle_dir, other.spool_dir) as executor:
        assert said(caplog, "1 were submitted within the hour (jobs_per_hour); the next one in 3")
        executor.shutdown(wait=False)
    caplog.clear()
    place = make_trainer_place(config, tmp_path, other)
    place.start()
    assert said(caplog, "(jobs_per_hour)")
    place.stop()
    assert len(json.loads((tmp_path / "run" / "oracle" / "jobs.json").read_text())) == 1


def said(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    end = time.monotonic() + 60
    while text not in caplog.text and time.monotonic() < end:
        time.sleep(0.05)
    return text in caplog.text


@pytest.mark.slow
@pytest.mark.ipi
def test_a_run_whose_labels_come_from_parsl(tmp_path: Path) -> None:
    pytest.importorskip("parsl")
    config = configured(tmp_path, '[executor]\nkind = "parsl"\nheartbeat = "8 s"\n')
    ended = program("run", config, timeout=300)
    assert ended.returncode == 0, ended.stderr
    labels = LabelStore(tmp_path / "run" / "labels").all()
    assert labels
    assert len(list((tmp_path / "run" / "oracle" / "spool" / "done").glob("*.json"))) == len(labels)
    assert list((tmp_path / "run" / "oracle" / "parsl" / "000").glob("parsl.log"))
    assert list((tmp_path / "run" / "oracle" / "work").iterdir())
