"""Several real i-PI runs that share one label store, one trainer and one set of weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from small_run import command, program, write_run

from bnn_driver.config import read_config
from bnn_driver.errors import ConfigError
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import RunDirectory, read_events

pytestmark = pytest.mark.ipi


def outputs(config: Path, walker: str) -> np.ndarray:
    return np.loadtxt(config.parent / "run" / "walkers" / walker / "ipi" / "simulation.out")


def events(config: Path, walker: str, kind: str) -> list[dict[str, Any]]:
    found = read_events(RunDirectory(config.parent / "run", walker).events_dir)
    return [event for event in found if event["kind"] == kind]


def labels(config: Path) -> list[Any]:
    return LabelStore(config.parent / "run" / "labels").all()


def processes_of(config: Path, words: str) -> list[psutil.Process]:
    """Live processes of a run whose command line holds `words`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if words in line and str(config.parent) in line and process.pid != os.getpid():
            found.append(process)
    return found


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Two walkers, under way: both have made some steps."""
    config = write_run(tmp_path, steps=150, walkers=2, max_lag=2)
    process = subprocess.Popen(
        command("run", config),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + 240
    while not all(any(e["step"] >= 5 for e in events(config, f"w{n}", "decision")) for n in range(2)):
        assert time.monotonic() < end, process.communicate()[0] if process.poll() is not None else "no steps"
        time.sleep(0.05)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()
    for left in processes_of(config, "bnn_driver"):
        left.kill()


def check_all_finished(config: Path, steps: int) -> None:
    for walker in read_config(config).ipi.walkers:
        assert outputs(config, walker)[-1, 0] == steps
        assert np.isfinite(outputs(config, walker)).all()
    ids = [item.label.frame_id for item in labels(config)]
    assert len(ids) == len(set(ids))
    done = {file.stem for file in (config.parent / "run" / "oracle" / "spool" / "done").glob("*.json")}
    assert set(ids) == done, "labels on disk are the labels that were computed"


@pytest.mark.parametrize("max_lag", [0, 3])
def test_walkers_share_labels_trainer_and_weights(tmp_path: Path, max_lag: int) -> None:
    config = write_run(tmp_path, steps=60, walkers=3, max_lag=max_lag)
    done = program("run", config)
    assert done.returncode == 0, done.stderr
    check_all_finished(config, 60)
    owners = {item.context["walker"] for item in labels(config)}
    assert owners <= {"w0", "w1", "w2"}
    assert sum(item.context["criterion"] == "first" for item in labels(config)) == 1, "all begin on one frame: one label"
    updates = [e for e in read_events(config.parent / "run" / "events") if e["kind"] == "update"]
    steps = np.diff([0, *(e["generation"] for e in updates)])
    # 0: tried again after it diverged, or begun again by the trainer that took over from a walker at its end
    assert set(steps) <= {0, 1}, "one chain of updates"
    for walker in ("w0", "w1", "w2"):
        assert events(config, walker, "swap"), "every walker takes the common weights"
        told = {e["frame_id"] for kind in ("label", "shared") for e in events(config, walker, kind)}
        assert len(told) > 0
    trajectories = [outputs(config, walker)[:, 2] for walker in ("w0", "w1", "w2")]
    assert not np.allclose(trajectories[0], trajectories[1])
    status = json.loads(program("status", config, "--json").stdout)
    assert status["walkers"] == {"w0": 60, "w1": 60, "w2": 60}
    assert status["steps"] == 180
    assert status["labels"] == len(labels(config))
    assert "w1 60" in program("status", config).stdout


def test_the_same_command_goes_on_and_asks_nothing_again(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=30, walkers=2)
    assert program("run", config).returncode == 0
    before = {item.label.frame_id for item in labels(config)}
    again = program("run", config)
    assert again.returncode == 0, again.stderr
    assert {item.label.frame_id for item in labels(config)} == before
    for walker in ("w0", "w1"):
        file = config.parent / f"{walker}.xml"
        file.write_text(file.read_text().replace("<total_steps>30<", "<total_steps>60<"))
    assert program("run", config).returncode == 0
    check_all_finished(config, 60)
    assert before <= {item.label.frame_id for item in labels(config)}


def test_one_walker_by_name_and_unknown_names(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=20, walkers=3)
    alone = program("run", config, "--walker", "w1")
    assert alone.returncode == 0, alone.stderr
    assert outputs(config, "w1")[-1, 0] == 20
    assert not (config.parent / "run" / "walkers" / "w0").exists()
    wrong = program("run", config, "--walker", "w7")
    assert wrong.returncode == 2
    assert "there is no walker 'w7' in [ipi.walkers]; did you mean 'w" in wrong.stderr


def test_the_trainer_s_owner_dies_and_another_walker_s_trainer_takes_over(started: subprocess.Popen[str], tmp_path: Path) -> None:
    config = tmp_path / "bnn.toml"
    owner = json.loads((tmp_path / "run" / "LOCK.trainer").read_text())["pid"]
    psutil.Process(owner).kill()
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 0, output
    check_all_finished(config, 150)


def test_kill_9_of_a_walker_spares_the_others_and_the_same_command_brings_it_to_its_end(
    started: subprocess.Popen[str], tmp_path: Path
) -> None:
    config = tmp_path / "bnn.toml"
    (victim,) = [p for p in processes_of(config, "--walker w0") if "bnn_driver.cli" in p.cmdline()]
    victim.kill()
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 128 + signal.SIGKILL, output
    assert "w0 (exit code 137)" in output
    assert outputs(config, "w1")[-1, 0] == 150
    assert program("run", config).returncode == 0
    check_all_finished(config, 150)


def test_sigterm_stops_all_cleanly(started: subprocess.Popen[str], tmp_path: Path) -> None:
    for process in processes_of(tmp_path / "bnn.toml", "--walker"):  # as a scheduler does: everybody is told
        process.send_signal(signal.SIGTERM)
    started.send_signal(signal.SIGTERM)
    output, _ = started.communicate(timeout=120)
    assert started.returncode == 75, output
    assert output.count("stopped on request; the same command goes on") == 2, output
    assert not processes_of(tmp_path / "bnn.toml", "bnn_driver")
    assert program("run", tmp_path / "bnn.toml").returncode == 0
    check_all_finished(tmp_path / "bnn.toml", 150)


def test_kill_9_of_the_whole_leaves_no_orphan(started: subprocess.Popen[str], tmp_path: Path) -> None:
    started.kill()
    end = time.monotonic() + 60
    while processes_of(tmp_path / "bnn.toml", "bnn_driver"):
        assert time.monotonic() < end, processes_of(tmp_path / "bnn.toml", "bnn_driver")
        time.sleep(0.1)
    assert program("run", tmp_path / "bnn.toml").returncode == 0
    check_all_finished(tmp_path / "bnn.toml", 150)


@pytest.mark.parametrize(
    ("ipi", "message"),
    [
        ('input = "a.xml"\nwalkers = { x = "b.xml" }', "both are given"),
        ('walkers = { x = "b.xml", y = "b.xml" }', "same input"),
        ('walkers = { "../x" = "b.xml" }', "walkers"),
    ],
)
def test_settings_of_walkers_that_cannot_be_meant(tmp_path: Path, ipi: str, message: str) -> None:
    config = write_run(tmp_path)
    config.write_text(config.read_text().replace('input = "input.xml"', ipi))
    with pytest.raises(ConfigError, match=message):
        read_config(config)


def test_check_looks_at_every_walker(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=20, walkers=2)
    checked = program("check", config)
    assert checked.returncode == 0, checked.stderr
    assert "[w0] " in checked.stdout
    assert "[w1] " in checked.stdout
    assert checked.stdout.count("would begin") == 2
    assert not (tmp_path / "run").exists(), "nothing is made"
    assert "[w1]" not in program("check", config, "--walker", "w0").stdout
    second = tmp_path / "w1.xml"
    address = (tmp_path / "w0.xml").read_text().partition("<address>")[2].partition("<")[0]
    other = second.read_text().partition("<address>")[2].partition("<")[0]
    second.write_text(second.read_text().replace(other, address))
    clash = program("check", config)
    assert clash.returncode == 2
    assert "both listen on" in clash.stderr
