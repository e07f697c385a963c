"""The walking skeleton: toy potential, toy oracle, real i-PI, the whole loop through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from small_run import command, program, write_run

from bnn_driver.store import weights
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import read_events

pytestmark = pytest.mark.ipi
Start = Callable[[Path], subprocess.Popen[str]]


def status(config: Path) -> dict[str, Any]:
    return json.loads(program("status", config, "--json").stdout)


def outputs(config: Path) -> np.ndarray:
    return np.loadtxt(config.parent / "run" / "ipi" / "simulation.out")


def labels(config: Path) -> list[Any]:
    return LabelStore(config.parent / "run" / "labels").all()


def computed(config: Path) -> int:
    """Labels that the oracle's processes have ever computed."""
    return len(list((config.parent / "run" / "oracle" / "spool" / "done").glob("*.json")))


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def start() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts runs in the background; what is left of them at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(config: Path) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        arguments = command("run", config)
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def children_of_run(config: Path) -> list[psutil.Process]:
    """Live processes that belong to a run: trainer, oracle workers, i-PI."""
    folder = str(config.parent)
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        try:
            belongs = folder in " ".join(process.info["cmdline"] or []) or folder in (process.info["cwd"] or "")
            if belongs and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_run_labels_learns_serves_and_reports(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=40)
    done = program("run", config)
    assert done.returncode == 0, done.stderr
    facts = status(config)
    assert facts["steps"] == 40
    assert len(outputs(config)) == 41
    assert np.isfinite(outputs(config)).all()
    assert 2 <= facts["labels"] < 40, "some frames are asked and some are served"
    assert facts["generation"] >= 1
    assert facts["calls"]["count"] + facts["audit"]["count"] == facts["labels"] - 1
    assert set(facts["seconds"]) >= {"total", "ensemble", "oracle", "chains", "ipi"}
    decisions = [e for e in read_events(tmp_path / "run" / "events") if e["kind"] == "decision"]
    assert [d["step"] for d in decisions] == list(range(41))
    assert decisions[0]["criterion"] == "first"
    assert sum(d["ask"] for d in decisions) == facts["calls"]["count"] + 1
    served_by_oracle = [item.context["step"] for item in labels(config) if not item.context["audit"]]
    for step in served_by_oracle:  # the step moves with the oracle's energy, offset added
        item = next(x for x in labels(config) if x.context["step"] == step and not x.context["audit"])
        offset = labels(config)[0].context["foundation_energy"] - labels(config)[0].label.energy
        assert outputs(config)[step, 2] == pytest.approx(item.label.energy + offset, abs=1e-5)
    again = program("run", config)
    assert again.returncode == 0
    assert computed(config) == facts["labels"], "a finished run computes nothing more"


@pytest.mark.parametrize(("beads", "batch"), [(4, 4), (4, 1)], ids=["batched", "one by one"])
def test_ring_polymers_are_judged_bead_by_bead(tmp_path: Path, beads: int, batch: int) -> None:
    config = write_run(tmp_path, steps=8, beads=beads, batch=batch)
    done = program("run", config)
    assert done.returncode == 0, done.stderr
    assert len(outputs(config)) == 9
    assert status(config)["steps"] == 8
    assert {item.context["bead"] for item in labels(config)} - {0}, "other beads than the first are labelled too"


def test_updates_may_end_early_and_say_after_how_many_steps(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=20)
    config.write_text(config.read_text().replace("steps_per_update = 60", "steps_per_update = 120\nstop_when_learnt = true"))
    done = program("run", config)
    assert done.returncode == 0, done.stderr
    assert len(outputs(config)) == 21
    made = [e["steps"] for e in read_events(tmp_path / "run" / "events") if e["kind"] == "update"]
    assert made
    assert set(made) <= set(range(38 + 30, 121)), "a test every 2 steps from 30 on, five are needed, and 30 steps follow"
    assert min(made) < 120


def test_chains_may_lag_behind(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=30, max_lag=3)
    done = program("run", config)
    assert done.returncode == 0, done.stderr
    assert len(outputs(config)) == 31
    swaps = [e for e in read_events(tmp_path / "run" / "events") if e["kind"] == "swap"]
    assert swaps
    assert [s["generation"] for s in swaps] == sorted(s["generation"] for s in swaps)


@pytest.mark.parametrize("when", [1, 3], ids=["early", "later"])
def test_a_killed_run_resumes_and_computes_no_label_twice(tmp_path: Path, start: Start, when: int) -> None:
    config = write_run(tmp_path, steps=30, delay="0.2 s")
    process = start(config)
    wait_for(lambda: computed(config) >= when)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for(lambda: not children_of_run(config), 30)
    before = computed(config)
    done = program("run", config)
    assert done.returncode == 0, done.stderr
    ids = [item.label.frame_id for item in labels(config)]
    assert len(ids) == len(set(ids)) == computed(config) >= before
    assert outputs(config)[-1, 0] == 30
    assert not list((tmp_path / "run" / "oracle" / "pending").glob("*.json"))


def test_ctrl_c_leaves_a_restart_and_the_same_command_goes_on(tmp_path: Path, start: Start) -> None:
    config = write_run(tmp_path, steps=400, delay="0.05 s")
    process = start(config)
    wait_for(lambda: computed(config) >= 2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "the same command goes on" in said
    assert (tmp_path / "run" / "ipi" / "RESTART").exists()
    assert not children_of_run(config)
    (tmp_path / "input.xml").write_text((tmp_path / "input.xml").read_text().replace("400</total_steps>", "12</total_steps>"))
    assert program("run", config).returncode == 0


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path, start: Start) -> None:
    config = write_run(tmp_path, steps=4000, delay="0.3 s")
    process = start(config)
    try:
        wait_for(lambda: computed(config) >= 1)
        second = program("run", config)
        assert second.returncode == 3
        assert str(process.pid) in second.stderr
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_other_physics_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=3)
    assert program("run", config).returncode == 0
    config.write_text(config.read_text().replace("[oracle.toy]", '[oracle.toy]\ndepth = "2 eV"'))
    refused = program("run", config)
    assert refused.returncode == 2
    assert "depth" in refused.stderr
    assert "directory" in refused.stderr


def test_the_budget_of_labels_stops_the_run_and_keeps_what_is_there(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=30)
    config.write_text(config.read_text().replace('kind = "toy"\n', 'kind = "toy"\nmax_labels = 2\n'))
    stopped = program("run", config)
    assert stopped.returncode == 7, stopped.stderr
    assert "max_labels" in stopped.stderr
    assert len(labels(config)) == 2
    assert (tmp_path / "run" / "ipi" / "RESTART").exists()


def test_an_oracle_that_does_not_converge_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=10)
    text = config.read_text().replace('kind = "toy"', 'kind = "tblite"')
    config.write_text(text.replace('[oracle.toy]\ndelay = "0 s"', "[oracle.tblite]\nmax_iterations = 2"))
    failed = program("run", config)
    assert failed.returncode == 4, failed.stderr
    assert "converge" in failed.stderr
    assert not labels(config)
    assert not children_of_run(config)


def test_a_first_update_that_diverges_can_be_mended(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=4)
    good = config.read_text()
    config.write_text(good.replace("step_size = 3e-3", "step_size = 1e6"))
    failed = program("run", config)
    assert failed.returncode == 5, failed.stderr
    assert "step_size" in failed.stderr
    assert len(labels(config)) == 1
    config.write_text(good)
    mended = program("run", config)
    assert mended.returncode == 0, mended.stderr
    assert labels(config)[0].context["criterion"] == "first"


def test_ctrl_c_before_the_first_label_is_a_clean_stop(tmp_path: Path, start: Start) -> None:
    config = write_run(tmp_path, steps=10, delay="30 s")
    process = start(config)
    wait_for(lambda: list((tmp_path / "run" / "oracle" / "pending").glob("*.json")))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert not children_of_run(config)


def test_a_killed_ipi_is_noticed_and_the_run_resumes(tmp_path: Path, start: Start) -> None:
    config = write_run(tmp_path, steps=30, delay="0.1 s")
    process = start(config)
    wait_for(lambda: computed(config) >= 2)
    record = json.loads((tmp_path / "run" / "ipi" / "ipi.pid").read_text())
    os.kill(record["pid"], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 6, said
    assert program("run", config).returncode == 0


def test_serve_waits_for_an_ipi_and_says_when_none_comes(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    config.write_text(config.read_text().replace('"20 s"\n[system]', '"1 s"\n[system]'))
    gone = program("serve", "-u", "-a", "nobody-listens-here", config)
    assert gone.returncode == 6
    assert "nobody-listens-here" in gone.stderr


def test_serve_drives_an_ipi_that_the_user_started(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=15)
    text = (tmp_path / "input.xml").read_text()
    address = text.split("<address>")[1].split("<")[0]
    ipi = Path(sysconfig.get_path("scripts")) / "i-pi"
    with (tmp_path / "ipi.log").open("w") as log:
        simulation = subprocess.Popen([str(ipi), "input.xml"], cwd=tmp_path, stdout=log, stderr=log)
        served = program("serve", "-u", "-a", address, config)
        assert simulation.wait(timeout=60) == 0
    assert served.returncode == 0, served.stderr
    assert len(np.loadtxt(tmp_path / "simulation.out")) == 16


def test_generations_hold_every_label_that_was_learnt(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=10)
    assert program("run", config).returncode == 0
    folder = tmp_path / "run" / "generations"
    newest = weights.load(folder, weights.latest(folder) or 0)
    asked = [item.label.frame_id for item in labels(config) if not item.context["audit"]]
    assert set(asked) <= set(newest.label_ids)


def test_the_published_recipe_by_name_and_the_default_do_not_share_a_directory(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=4)
    default = config.read_text()
    config.write_text(default.replace("[ensemble]", '[ensemble]\nrecipe = "rensmeyer2026"'))
    assert program("run", config).returncode == 0
    folder = tmp_path / "run" / "generations"
    first = weights.load(folder, 1)
    assert first.state["dispersion"] == 0
    assert any(name.startswith("noise.") for name in first.weights)
    config.write_text(default)
    refused = program("run", config)
    assert refused.returncode == 2
    assert "predicted_noise" in refused.stderr
    config.write_text(default.replace("[run]", '[run]\ndirectory = "other"'))
    assert program("run", config).returncode == 0
    other = tmp_path / "other" / "generations"
    numbers = [n for n in (1, 2) if (other / f"{n:06d}").exists()]
    kept = [weights.load(other, n).state["dispersion"] for n in numbers]
    assert all(0 < x <= 0.2 for x in kept), "chosen from the first label, at most the prior's sd"
    assert len(set(kept)) == 1, "and kept"
    assert not any(name.startswith("noise.") for name in weights.load(other, numbers[0]).weights)
