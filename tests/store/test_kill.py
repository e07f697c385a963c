"""Writers are killed with kill -9 at random moments; what they leave must be whole."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path

import numpy as np
from awkward import assert_same, make_label

from bnn_driver.oracle import read_done, write_done
from bnn_driver.records import Generation
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import EventLog, RunDirectory, read_events
from bnn_driver.store.weights import latest, load, prune, publish

KILLS = 15


def generation(number: int) -> Generation:
    return Generation(number, {"w": np.random.default_rng(number).standard_normal((8, 2000))}, ("a",) * number)


def write_for_ever(path: Path) -> None:
    run = RunDirectory(path)
    store = LabelStore(run.labels_dir)
    with run.lock("driver"), EventLog(run.events_dir) as events:
        events.append("start")
        for seed in itertools.count(len(store)):
            item = make_label(seed, atoms=30)
            write_done(run.oracle_dir, item.label)
            number = store.write(item)
            events.append("label", number=number, text="x" * 2000)
            publish(run.generations_dir, generation((latest(run.generations_dir) or 0) + 1))
            prune(run.generations_dir, keep=2)


def killed_after(path: Path, seconds: float) -> None:
    """Start the writer, wait until it owns the run, kill it `seconds` later."""
    pid = os.fork()
    if pid == 0:
        try:
            write_for_ever(path)
        finally:
            os._exit(1)
    lock = path / "LOCK"
    deadline = time.monotonic() + 30
    while not lock.exists() or f'"pid": {pid}' not in lock.read_text():
        assert time.monotonic() < deadline, "the writer did not start"
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the writer must still have been at work"


def test_nothing_is_torn_and_no_number_is_missing_after_kills(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    labels = 0
    for kill in range(KILLS):
        killed_after(tmp_path, rng.uniform(0.0, 0.08))
        store = LabelStore(tmp_path / "labels")
        assert sorted(p.name for p in store.folder.glob("*.extxyz")) == [f"{n:06d}.extxyz" for n in range(len(store))]
        for seed, item in enumerate(store.all()):
            assert_same(item, make_label(seed, atoms=30))
            assert_same(read_done(tmp_path / "oracle", item.label.frame_id), item.label)
        for file in (tmp_path / "oracle" / "done").glob("*.json"):
            assert read_done(tmp_path / "oracle", file.stem) is not None
        assert len(store) >= labels, "no label is ever lost"
        labels = len(store)
        number = latest(tmp_path / "generations")
        if number is not None:
            assert_same(load(tmp_path / "generations", number), generation(number))
        events = list(read_events(tmp_path / "events"))
        assert sum(e["kind"] == "start" for e in events) <= kill + 1
        assert labels - kill - 1 <= sum(e["kind"] == "label" for e in events) <= labels
    assert labels > 0, "the writer must have come to write"
    with RunDirectory(tmp_path).lock("driver"):
        pass
