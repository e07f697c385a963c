"""A run that must stop before its end saves everything, and the same command goes on: toy parts, real i-PI."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from small_run import program, write_run

from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import read_events

pytestmark = pytest.mark.ipi
ROOT = Path(__file__).resolve().parents[2]


def labels(config: Path) -> list[Any]:
    return LabelStore(config.parent / "run" / "labels").all()


def computed(config: Path) -> int:
    return len(list((config.parent / "run" / "oracle" / "spool" / "done").glob("*.json")))


def stops(config: Path) -> list[dict[str, Any]]:
    return [e for e in read_events(config.parent / "run" / "events") if e["kind"] == "stop"]


def end_of(config: Path) -> float:
    """The end that the last stop names."""
    found = re.search(r"wall limit, (\S+ \S+)", stops(config)[-1]["reason"])
    assert found
    return datetime.fromisoformat(found[1]).timestamp()


def restart_step(config: Path) -> int:
    text = (config.parent / "run" / "ipi" / "RESTART").read_text()
    return int(text.split("<step>")[1].split("<")[0])


def steps_done(config: Path) -> np.ndarray:
    return np.loadtxt(config.parent / "run" / "ipi" / "simulation.out", ndmin=2)


def with_margin(config: Path, margin: str = "1 s") -> Path:
    config.write_text(config.read_text().replace("seed = 7", f'seed = 7\nmargin = "{margin}"'))
    return config


def left_alive(config: Path) -> list[psutil.Process]:
    """Processes in the folder of a run."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if str(config.parent) in " ".join(process.info["cmdline"] or []) or str(config.parent) in (process.info["cwd"] or ""):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def until(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], str]:
    """A time that leaves so many seconds on a machine that starts and ends a run in five, and more on a slower one."""
    config = write_run(tmp_path_factory.mktemp("pace"), steps=2)
    begin = time.monotonic()
    assert program("run", config).returncode == 0
    slower = max(0.0, time.monotonic() - begin - 5.0)
    return lambda seconds: f"{seconds + slower:.0f} s"


def test_a_limit_in_the_middle_stops_cleanly_and_the_same_command_goes_on(tmp_path: Path, until: Callable[[float], str]) -> None:
    config = with_margin(write_run(tmp_path, steps=4000, delay="0.3 s"), "6 s")
    stopped = program("run", "--until", until(24), config)
    assert time.time() < end_of(config), "the margin sufficed"
    assert stopped.returncode == 75, stopped.stderr
    assert "wall limit" in stopped.stderr
    assert "the same command goes on" in stopped.stderr
    assert "wall limit" in stops(config)[-1]["reason"]
    assert not left_alive(config)
    reached, have = restart_step(config), len(labels(config))
    assert reached > 0
    assert steps_done(config)[-1, 0] <= reached
    text = (tmp_path / "input.xml").read_text()
    (tmp_path / "input.xml").write_text(text.replace("4000</total_steps>", f"{reached + 6}</total_steps>"))
    done = program("run", config)
    assert done.returncode == 0, done.stderr
    assert steps_done(config)[-1, 0] == reached + 6
    assert set(range(reached + 7)) <= set(steps_done(config)[:, 0].astype(int)), "no step is missing"
    ids = [item.label.frame_id for item in labels(config)]
    assert len(ids) == len(set(ids)) == computed(config) >= have, "no label was computed twice"


def test_a_label_that_cannot_finish_is_not_begun(tmp_path: Path, until: Callable[[float], str]) -> None:
    config = with_margin(write_run(tmp_path, steps=40, delay="4 s"))
    for _ in range(3):  # a limit may also be met while the chains learn, the more so on a busy machine
        stopped = program("run", "--until", until(20), config)
        assert stopped.returncode == 75, stopped.stderr
        if "cannot finish" in stopped.stderr:
            break
    assert "cannot finish" in stopped.stderr
    assert stops(config)[-1]["time"] < end_of(config) - 1.1, "the time in which no label could finish was given back"
    pending = list((tmp_path / "run" / "oracle" / "pending").glob("*.json"))
    asked = [item for item in labels(config) if not item.context["audit"]]
    assert asked
    assert not [p for p in pending if not json.loads(p.read_text())["scalars"]["audit"]], "nobody began on the frame"
    step_of_last = restart_step(config)
    config.write_text(config.read_text().replace('delay = "4 s"', 'delay = "0 s"'))
    assert program("run", config).returncode == 0
    new = [item for item in labels(config) if not item.context["audit"]][len(asked) :]
    assert new[0].context["step"] in (step_of_last, step_of_last + 1), "the frame that was left is asked for again"


def test_a_first_label_that_outlasts_the_job_is_said_to_need_more_time(tmp_path: Path, until: Callable[[float], str]) -> None:
    config = with_margin(write_run(tmp_path, steps=10, delay="60 s"))
    config.write_text(config.read_text().replace('timeout = "20 s"', 'timeout = "90 s"'))
    refused = program("run", "--until", until(10), config)
    assert refused.returncode == 7, refused.stderr
    assert "more time" in refused.stderr
    assert "wall limit" in stops(config)[-1]["reason"]
    assert not labels(config)
    config.write_text(config.read_text().replace('delay = "60 s"', 'delay = "0 s"'))
    assert program("run", config).returncode == 0


def test_no_time_but_the_margin_begins_nothing(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    refused = program("run", "--until", "1 min", config)
    assert refused.returncode == 2
    assert "margin" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_audits_that_are_waited_for_stop_at_the_limit_too(tmp_path: Path, until: Callable[[float], str]) -> None:
    config = with_margin(write_run(tmp_path, steps=3, delay="0 s"))
    text = config.read_text().replace("probability = 0.1", "probability = 1")
    config.write_text(text.replace('energy = "400 meV"', 'energy = "40 eV"'))
    assert program("run", config).returncode == 0, "the first frame is asked, all others are audited"
    (tmp_path / "input.xml").write_text((tmp_path / "input.xml").read_text().replace("3</total_steps>", "5</total_steps>"))
    have = len(labels(config))
    config.write_text(config.read_text().replace('delay = "0 s"', 'delay = "15 s"'))
    stopped = program("run", "--until", until(15), config)
    assert stopped.returncode == 75, stopped.stderr
    assert stops(config)[-1]["reason"].startswith("finished; stopped before the wall limit")
    assert len(labels(config)) == have
    config.write_text(config.read_text().replace('delay = "15 s"', 'delay = "0 s"'))
    assert program("run", config).returncode == 0
    assert len(labels(config)) == have + 2


def test_serve_asks_the_ipi_that_it_drove_to_stop(tmp_path: Path, until: Callable[[float], str]) -> None:
    config = with_margin(write_run(tmp_path, steps=100_000))
    address = (tmp_path / "input.xml").read_text().split("<address>")[1].split("<")[0]
    ipi = Path(sysconfig.get_path("scripts")) / "i-pi"
    with (tmp_path / "ipi.log").open("w") as log:
        simulation = subprocess.Popen([str(ipi), "input.xml"], cwd=tmp_path, stdout=log, stderr=log)
        try:
            served = program("serve", "-u", "-a", address, "--until", until(15), config)
            assert served.returncode == 75, served.stderr
            assert simulation.wait(timeout=10) == 0
        finally:
            simulation.kill()
            simulation.wait()
    assert (tmp_path / "RESTART").exists()
    assert not (tmp_path / "EXIT").exists()


SBATCH = """#!/bin/sh
# runs the job at once, with a time limit, as Slurm would later
echo "$@" >> "$RECORD"
[ "$(wc -l < "$RECORD")" -gt 20 ] && exit 1
while [ "${1#-}" != "$1" ]; do shift; done
SLURM_JOB_ID=$(wc -l < "$RECORD") SLURM_JOB_END_TIME=$(($(date +%s) + $JOB_SECONDS)) exec sh -c 'exec bash "$@"' job "$@"
"""


def cluster(folder: Path) -> dict[str, str]:
    """An environment in which sbatch is a stand-in, and bnn-driver is this program."""
    commands = folder / "commands"
    commands.mkdir()
    (commands / "sbatch").write_text(SBATCH)
    (commands / "bnn-driver").write_text(f'#!/bin/sh\nexec {sys.executable} -m bnn_driver.cli "$@"\n')
    for file in commands.iterdir():
        file.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return clean | {"PATH": f"{commands}:{os.environ['PATH']}", "RECORD": str(folder / "record"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_chain_of_jobs_reaches_the_last_step(tmp_path: Path, until: Callable[[float], str]) -> None:
    config = with_margin(write_run(tmp_path, steps=60, delay="2 s"))  # 16 labels: more than one job
    script = tmp_path / "submit.sh"
    script.write_text((ROOT / "examples" / "cluster" / "submit.sh").read_text())
    environment = cluster(tmp_path) | {"JOB_SECONDS": until(25).removesuffix(" s"), "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(
        [str(tmp_path / "commands" / "sbatch"), "submit.sh", config.name],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    submitted = (tmp_path / "record").read_text().splitlines()
    assert 2 <= len(submitted) < 20
    assert all(config.name in line for line in submitted)
    reasons = [stop["reason"] for stop in stops(config)]
    assert len(reasons) == len(submitted)
    assert all("Slurm job" in reason for reason in reasons[:-1])
    assert reasons[-1] == "finished"
    assert steps_done(config)[-1, 0] == 60
    ids = [item.label.frame_id for item in labels(config)]
    assert len(ids) == len(set(ids)) == computed(config)


@pytest.mark.parametrize(("code", "again"), [(0, False), (75, True), (2, False), (4, False), (7, False), (137, False)])
def test_only_75_is_submitted_again(tmp_path: Path, code: int, again: bool) -> None:
    environment = cluster(tmp_path) | {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1"}
    (tmp_path / "commands" / "sbatch").write_text('#!/bin/sh\necho "$@" >> "$RECORD"\n')
    (tmp_path / "commands" / "bnn-driver").write_text(f'#!/bin/sh\necho "$@" > called\nexit {code}\n')
    script = ROOT / "examples" / "cluster" / "submit.sh"
    done = subprocess.run(
        ["bash", str(script), "my.toml"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30
    )
    assert (tmp_path / "called").read_text().split() == ["run", "my.toml"]
    submitted = (tmp_path / "record").read_text().split() if (tmp_path / "record").exists() else []
    assert submitted == (["submit.sh", "my.toml"] if again else [])
    assert done.returncode == (0 if again else code)
