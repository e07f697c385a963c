"""Frames that wait for the oracle are judged again when new weights come, and not labelled when they have become certain."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
from small_run import program, write_run

from bnn_driver.executors import LocalExecutor
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.quarantine import Quarantine
from bnn_driver.oracle import fingerprint, load_oracle
from bnn_driver.records import Frames
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import read_events

WATER = np.array([[0.0, 0.0, 0.0], [0.76, 0.59, 0.0], [-0.76, 0.59, 0.0]])


def test_frames_that_have_not_begun_are_taken_back_and_leave_nothing_behind(tmp_path: Path) -> None:
    """One worker, four frames: at the first label new weights come; at most the next frame has begun by then."""
    settings = {"delay": "0.5 s"}
    spool = tmp_path / "spool"
    frames = [Frames(np.array([8, 1, 1]), WATER[None] * (1 + 0.01 * n)) for n in range(4)]
    contexts = [{"step": n, "bead": 0, "criterion": "energy", "audit": False} for n in range(4)]
    with LocalExecutor("toy", settings, 1, 60.0, tmp_path / "work", 1, spool) as executor:
        name = fingerprint(load_oracle("toy", settings))
        labelling = Labelling(
            LabelStore(tmp_path / "labels"), executor, tmp_path / "pending", name, None, Quarantine(tmp_path / "quarantine", "")
        )
        answers = labelling.ask(frames, contexts, lambda: any((spool / "done").glob("*.json")))
        labelled = [n for n, answer in enumerate(answers) if answer is not None]
        assert labelled in ([0], [0, 1])
        assert len(labelling.store) == len(labelled)
        assert list((tmp_path / "pending").iterdir()) == []
        time.sleep(1.2)  # two more labels, if they had been left in the queue
        assert len(list((spool / "done").glob("*.json"))) == len(labelled)
        again = labelling.ask(frames[2:], contexts[2:], lambda: False)
        assert all(again), "what was taken back can be asked again"
        assert len(labelling.store) == len(labelled) + 2


def test_without_new_weights_all_are_labelled(tmp_path: Path) -> None:
    frames = [Frames(np.array([8, 1, 1]), WATER[None] * (1 + 0.01 * n)) for n in range(3)]
    contexts = [{"step": n, "bead": 0, "criterion": "energy", "audit": False} for n in range(3)]
    with LocalExecutor("toy", {}, 1, 60.0, tmp_path / "work", 1, tmp_path / "spool") as executor:
        name = fingerprint(load_oracle("toy", {}))
        labelling = Labelling(
            LabelStore(tmp_path / "labels"), executor, tmp_path / "pending", name, None, Quarantine(tmp_path / "quarantine", "")
        )
        assert all(labelling.ask(frames, contexts, lambda: False))


@pytest.mark.ipi
def test_asking_only_the_worst_bead_spares_labels_and_serves_each_ring_by_one_generation(tmp_path: Path) -> None:
    spent, dropped = {}, {}
    for ask in ("all", "worst"):
        folder = tmp_path / ask
        folder.mkdir()
        config = write_run(folder, steps=12, beads=6, batch=6, ask=ask)
        done = program("run", config)
        assert done.returncode == 0, done.stderr
        events = list(read_events(folder / "run" / "events"))
        spent[ask] = sum(e["kind"] == "label" and e["criterion"] != "audit" for e in events)
        dropped[ask] = [e for e in events if e["kind"] == "dropped"]
        last = {(e["step"], e["bead"]): e for e in events if e["kind"] == "decision"}  # the last judgement counts
        for step in range(1, 13):
            served = {e["generation"] for (s, _), e in last.items() if s == step and not e["ask"]}
            assert len(served) <= 1, "beads of one ring are not served by different weights"
    assert dropped["all"] == []
    assert dropped["worst"], "some beads became certain when the worst one was learnt"
    assert all(e["probability"] <= 0.05 < e["was"] for e in dropped["worst"])
    assert spent["worst"] < spent["all"]


@pytest.mark.ipi
def test_the_foundation_alone_never_judges_the_rest_of_the_first_ring(tmp_path: Path) -> None:
    """A run that begins with spread beads: with labels allowed to be unlearnt, their second judgement waits for the first weights."""
    (before := tmp_path / "before").mkdir()
    assert program("run", write_run(before, steps=3, beads=4, batch=4)).returncode == 0
    (folder := tmp_path / "after").mkdir()
    config = write_run(folder, steps=6, beads=4, batch=4, ask="worst", max_lag=5)
    restart = (before / "run" / "ipi" / "RESTART").read_text()
    (folder / "input.xml").write_text(re.sub(r"<total_steps>[^<]*<", "<total_steps>6<", restart))
    done = program("run", config)
    assert done.returncode == 0, done.stderr
    decisions = [e for e in read_events(folder / "run" / "events") if e["kind"] == "decision"]
    assert sum(e["generation"] == 0 for e in decisions) == 4, "one ring is judged without any weights"
    assert all(e["ask"] for e in decisions if e["generation"] == 0)
