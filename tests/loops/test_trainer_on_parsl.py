"""Whole runs whose trainer is a task of a real Parsl on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_run import command, program, write_run

from bnn_driver.store import weights

pytest.importorskip("parsl")
pytestmark = [pytest.mark.slow, pytest.mark.ipi]
HEARTBEAT = 6.0
ON_PARSL = f'[trainer]\nexecutor = "parsl"\nheartbeat = "{HEARTBEAT:g} s"\n'


def configured(folder: Path, steps: int, table: str = ON_PARSL, updates: int = 60) -> Path:
    folder.mkdir(exist_ok=True)
    config = write_run(folder, steps=steps)
    text = config.read_text().replace("probability = 0.1", "probability = 0.0").replace("[trainer]\n", table)
    config.write_text(text.replace("steps_per_update = 60", f"steps_per_update = {updates}"))
    return config


def eventually(condition: Callable[[], object], seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def mark(config: Path) -> dict[str, Any]:
    file = config.parent / "run" / "trainer.began"
    return json.loads(file.read_text()) if file.exists() else {}


def family(config: Path) -> list[psutil.Process]:
    """Everything that names the folder of a run, with all that it has started."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if str(config.parent) in " ".join(process.cmdline()) and process.pid != os.getpid():
                found |= {p.pid: p for p in (process, *process.children(recursive=True))}
        except psutil.Error:
            continue
    return [p for p in found.values() if alive(p)]


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run in the background that says what it says to the file `said`; nothing is left of it afterwards."""
    with (config.parent / "said").open("wb") as said:
        process = subprocess.Popen(command("run", config), stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        for item in family(config):
            item.kill()
        process.wait()


def in_an_update(config: Path, other_than: str = "") -> bool:
    """Whether a trainer of another attempt has the lock and was seen alive after it could see the first label."""
    run = config.parent / "run"
    labels = list((run / "labels").glob("*.extxyz"))
    pulse, lock = run / "generations" / "trainer.alive", run / "LOCK.trainer"
    if mark(config).get("attempt", other_than) == other_than or not labels or not lock.exists() or not pulse.exists():
        return False
    since = max(file.stat().st_mtime for file in (run / "trainer.began", *labels))
    return f'"pid": {mark(config)["pid"]}' in lock.read_text() and pulse.stat().st_mtime > since


def test_weights_and_trajectory_are_those_of_a_local_trainer_to_the_last_bit(tmp_path: Path) -> None:
    local, remote = configured(tmp_path / "local", 12, "[trainer]\n"), configured(tmp_path / "remote", 12)
    for config in (local, remote):
        done = program("run", config)
        assert done.returncode == 0, done.stderr
    assert eventually(lambda: not family(remote), 2 * HEARTBEAT), family(remote)
    ours, theirs = (config.parent / "run" / "generations" for config in (local, remote))
    assert weights.latest(ours) == weights.latest(theirs) >= 2
    for number in range(max(0, weights.latest(ours) - 2), weights.latest(ours) + 1):
        one, other = weights.load(ours, number), weights.load(theirs, number)
        assert one.label_ids == other.label_ids
        assert {k: v.tobytes() for k, v in one.weights.items()} == {k: v.tobytes() for k, v in other.weights.items()}
    trajectories = {(config.parent / "run" / "ipi" / "simulation.out").read_bytes() for config in (local, remote)}
    assert len(trajectories) == 1
    assert "the trainer is a task of Parsl" in (remote.parent / "run" / "log" / "trainer.log").read_text()
    assert mark(local) == {}


def test_a_run_goes_on_whoever_is_killed_in_the_middle_of_an_update(tmp_path: Path) -> None:
    config = configured(tmp_path, 1, updates=2000)
    generations = tmp_path / "run" / "generations"
    with running(config) as process:
        seen = ""
        for key in ("pid", "worker"):
            assert eventually(lambda seen=seen: in_an_update(config, seen)), key
            seen, trainer = mark(config)["attempt"], psutil.Process(mark(config)["pid"])
            psutil.Process(mark(config)[key]).kill()
            assert eventually(lambda trainer=trainer: not alive(trainer), 30), "a trainer without a worker goes on"
        assert weights.latest(generations) == 0, "both were in the middle of the first update"
        assert process.wait(timeout=300) == 0, (tmp_path / "said").read_text()
        assert weights.latest(generations) >= 1


def test_a_killed_driver_leaves_nothing_after_the_heartbeat(tmp_path: Path) -> None:
    config = configured(tmp_path, 50, updates=100000)
    with running(config) as process:
        assert eventually(lambda: in_an_update(config))
        members = family(config)
        assert mark(config)["pid"] in [p.pid for p in members]
        process.kill()
        process.wait()
        assert eventually(lambda: not any(alive(p) for p in members), 5 * HEARTBEAT), [p for p in members if alive(p)]
        assert not family(config)


def test_sigterm_ends_the_trainer_with_its_accelerator(tmp_path: Path) -> None:
    config = configured(tmp_path, 50, ON_PARSL + 'accelerators = ["3", "5"]\n', updates=100000)
    with running(config) as process:
        assert eventually(lambda: in_an_update(config))
        assert psutil.Process(mark(config)["pid"]).environ()["CUDA_VISIBLE_DEVICES"] in ("3", "5")
        members = family(config)
        process.terminate()
        assert process.wait(timeout=120) == 75, (tmp_path / "said").read_text()
        assert eventually(lambda: not any(alive(p) for p in members), 30), [p for p in members if alive(p)]


def test_walkers_share_one_worker_and_the_next_takes_over(tmp_path: Path) -> None:
    (tmp_path / "walkers").mkdir()
    config = write_run(tmp_path / "walkers", steps=8, walkers=2)
    config.write_text(config.read_text().replace("[trainer]\n", ON_PARSL))
    done = program("run", config)
    assert done.returncode == 0, done.stderr
    logs = [config.parent / "run" / "walkers" / name / "log" / "trainer.log" for name in ("w0", "w1")]
    starts = [log.read_text().count("is a task of Parsl") if log.exists() else 0 for log in logs]
    assert max(starts) == 1
    assert eventually(lambda: not family(config), 2 * HEARTBEAT), family(config)
