"""A run that is far too sure of itself finds out by its audits, says so, and asks more: real i-PI, toy parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import program, write_run

from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import read_events

pytestmark = pytest.mark.ipi


def test_audits_that_break_the_promise_are_told_and_make_the_run_ask(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=20)
    text = config.read_text().replace("probability = 0.1", "probability = 1.0")
    # errors are expected to be a hundredth of what the sds say, with the weight of a hundred pairs
    config.write_text(text + "[calibration]\na = 50\nb = 5e-3\nforgetting = 1.0\n")
    done = program("run", config)
    assert done.returncode == 0, done.stderr
    told = [e for e in read_events(tmp_path / "run" / "events") if e["kind"] == "warning" and "promise" in e["message"]]
    assert len(told) == 1, "said once, at the moment when it was refuted"
    assert "the promise on the energy is broken" in told[0]["message"]
    assert "audits enter the calibration" in told[0]["message"]
    assert told[0]["message"] in done.stderr
    asked = [item.context["step"] for item in LabelStore(tmp_path / "run" / "labels").all() if not item.context["audit"]]
    before = [step for step in asked if step <= told[0]["step"]]
    after = [step for step in asked if step > told[0]["step"]]
    rates = [len(before) / (told[0]["step"] + 1), len(after) / (20 - told[0]["step"])]
    assert rates[1] > 2 * rates[0], f"asked per step before and after: {rates}"
    counted = json.loads(program("status", config, "--json").stdout)["coverage"]["energy"]
    assert counted["exceeded"] >= 2
