"""The walking skeleton: toy potential, toy oracle, real i-PI, the whole loop through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_run import program, write_run

from bnn_driver.store.run import read_events

pytestmark = pytest.mark.ipi


def status(config: Path) -> dict:
    return json.loads(program("status", config, "--json").stdout)


def outputs(config: Path) -> np.ndarray:
    return np.loadtxt(config.parent / "run" / "ipi" / "simulation.out")


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
    events = list(read_events(config.parent / "run" / "events"))
    decisions = [e for e in events if e["kind"] == "decision"]
    assert [d["step"] for d in decisions] == list(range(41))
    assert decisions[0]["criterion"] == "first"
    asked = sum(d["ask"] for d in decisions)
    assert asked == facts["calls"]["count"] + 1
