"""The numbers of a run, against runs whose numbers are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom
from synthetic_run import ACCURACY, SETTINGS, Fact, make_live_run, make_run

from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.errors import EnvironmentProblem
from bnn_driver.report.history import read_history
from bnn_driver.report.numbers import render_summary, summary
from bnn_driver.store.run import EventLog

FIRST = Fact(0, "first", error=0.3, foundation_error=0.0, sd=0.1, generation=0)


def test_errors_are_about_the_offset_of_the_first_label_and_the_first_does_not_count(tmp_path: Path) -> None:
    facts = [
        FIRST,
        Fact(10, "energy", error=0.03, foundation_error=0.4, sd=0.02),
        Fact(20, "force", error=-0.01, foundation_error=-0.3, sd=0.02, force_error=0.04),
        Fact(25, "audit", error=0.005, foundation_error=0.1, sd=0.01, force_error=0.06),
    ]
    found = summary(make_run(tmp_path, facts).path)
    calls, audit = found["calls"], found["audit"]
    assert found["labels"] == 4
    assert (calls["count"], calls["exceeded"]) == (2, 1)
    # 1e-9 eV: the oracle's energies of -4000 eV leave 5e-13 eV of rounding
    assert calls["rmse"] == pytest.approx(np.sqrt((0.03**2 + 0.01**2) / 2), abs=1e-9)
    assert calls["foundation_rmse"] == pytest.approx(np.sqrt((0.4**2 + 0.3**2) / 2), abs=1e-9)
    assert calls["force_rmse"] == pytest.approx(np.sqrt((0.02**2 + 0.04**2) / 2), abs=1e-9)
    assert calls["foundation_force_rmse"] == pytest.approx(10 * calls["force_rmse"], abs=1e-9)
    assert (audit["count"], audit["exceeded"]) == (1, 0)
    assert audit["rmse"] == pytest.approx(0.005, abs=1e-9)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_foundation_error_of_the_first_label_is_part_of_the_offset(tmp_path: Path) -> None:
    shifted = Fact(0, "first", error=0.7, foundation_error=0.7, sd=0.1)
    facts = [shifted, Fact(1, "energy", error=0.71, foundation_error=0.9, sd=0.1)]
    found = summary(make_run(tmp_path, facts).path)["calls"]
    assert found["rmse"] == pytest.approx(0.01, abs=1e-9)
    assert found["foundation_rmse"] == pytest.approx(0.2, abs=1e-9)


@pytest.mark.parametrize(
    ("audits", "beyond", "promise"),
    [(0, 0, "not yet known"), (71, 0, "not yet known"), (72, 0, "holds"), (60, 3, "not yet known"), (60, 9, "broken")],
)
def test_the_promise_is_judged_by_audits_alone(tmp_path: Path, audits: int, beyond: int, promise: str) -> None:
    facts = [FIRST, *(Fact(1 + i, "energy", 5 * ACCURACY, 1.0, 0.1) for i in range(5))]
    facts += [Fact(100 + i, "audit", (2 if i < beyond else 0.1) * ACCURACY, 1.0, 0.01) for i in range(audits)]
    found = summary(make_run(tmp_path, facts).path)
    assert found["promise"] == promise
    assert found["audit"]["exceeded"] == beyond
    low, high = found["audit"]["interval"]
    if audits and beyond:
        assert binom.sf(beyond - 1, audits, low) == pytest.approx(0.025), "Clopper and Pearson's definition"
        assert binom.cdf(beyond, audits, high) == pytest.approx(0.025)
    assert found["calls"]["exceeded"] == 5


def test_every_criterion_has_its_own_coverage_and_one_broken_promise_breaks_the_whole(tmp_path: Path) -> None:
    # the force on each atom is wrong by sqrt(3) force_error; half of the audits lie beyond 0.1 eV/Å, none beyond 1 eV/Å
    audits = [Fact(100 + i, "audit", 0.1 * ACCURACY, 1.0, 0.01, force_error=(0.04, 0.08)[i % 2]) for i in range(80)]
    settings = SETTINGS | {"accuracy": SETTINGS["accuracy"] | {"forces": 0.1, "species": {"C": 1.0}}}
    run = make_run(tmp_path, [FIRST, *audits], settings)
    found = summary(run.path)
    counted = {name: (c["audits"], c["exceeded"], c["promise"]) for name, c in found["coverage"].items()}
    assert counted == {"energy": (80, 0, "holds"), "force": (80, 40, "broken"), "force C": (80, 0, "holds")}
    assert found["promise"] == "broken"
    text = render_summary(found)
    assert "promise     holds: 0 of 80" in text
    assert "  force     broken: 40 of 80 audited frames beyond the accuracy, 95 % interval 38.6 to 61.4 %" in text
    assert "  force C   holds: 0 of 80" in text


def test_wall_time_is_the_last_clock_of_every_start(tmp_path: Path) -> None:
    run = make_run(tmp_path, [FIRST])
    for start in range(2):
        with EventLog(run.events_dir) as events:
            events.append("start", step=100 * start)
            for tick in (1, 2):
                parts = {"ensemble": 3.0, "oracle": 4.0, "chains": 1.0, "ipi": 0.5}
                events.append(
                    "clock", steps=100 * start + 10 * tick, total=10.0 * tick, **{k: v * tick for k, v in parts.items()}
                )
    with EventLog(run.events_dir) as trainer:
        trainer.append("update", generation=1, labels=1, seconds=2.0, steps=2000)
    found = summary(run.path)
    assert found["seconds"] == {"total": 40.0, "ensemble": 12.0, "oracle": 16.0, "chains": 4.0, "ipi": 2.0}
    assert found["steps"] == 120
    assert found["starts"] == 2


def test_the_calibration_is_carried_along_as_the_driver_did(tmp_path: Path) -> None:
    run = make_live_run(tmp_path, steps=400)
    history = read_history(run.path)
    state = GammaCalibration(1.5, 10.0)
    for label in history.labels:
        assert history.calibrated[label.frame_id] == pytest.approx(float(state.calibrated_sd(label.sd)), rel=1e-12)
        if label.criterion != "first" and label.step > 0:
            state = state.observe(label.error, label.sd)
    assert len(history.labels) >= 5
    last = {key: value[-1] for key, value in history.decisions.items()}
    assert last["bound"] == pytest.approx(float(state.quantile(last["sd"], 0.95)), rel=1e-9)


def test_an_empty_run_has_numbers_too(tmp_path: Path) -> None:
    run = make_run(tmp_path, [], settings={})
    found = summary(run.path)
    assert found["labels"] == found["steps"] == found["calls"]["count"] == 0
    assert found["accuracy"] is None
    assert found["promise"] == "not yet known"
    assert "there are no audits yet" in render_summary(found)
    with pytest.raises(EnvironmentProblem, match="is no run directory"):
        summary(tmp_path / "absent")


def test_labels_without_a_prediction_are_counted_but_not_judged(tmp_path: Path) -> None:
    run = make_run(tmp_path, [FIRST, Fact(4, "energy", 0.01, 0.1, 0.02)])
    text = (run.labels_dir / "000001.extxyz").read_text()
    (run.labels_dir / "000001.extxyz").write_text(text.replace("predicted_energy=", "unused="))
    found = summary(run.path)
    assert (found["labels"], found["calls"]["count"]) == (2, 0)


def test_the_text_says_the_energy_in_the_users_unit_too(tmp_path: Path) -> None:
    facts = [FIRST, Fact(1, "energy", 2 * ACCURACY, 1.0, 0.1), Fact(2, "audit", 0.5 * ACCURACY, 1.0, 0.1)]
    run = make_run(tmp_path / "a", facts)
    assert "kcal" not in render_summary(summary(run.path))
    (run.path / "bnn.toml").write_text('[accuracy]\nenergy = "0.5 kcal/mol"\n')
    text = render_summary(summary(run.path))
    assert "accuracy    0.0217 eV (0.5 kcal/mol) with 95 % confidence" in text
    assert "0.0434 eV (1 kcal/mol)" in text
    assert "not yet known: 0 of 1 audited frames beyond the accuracy" in text
    settings = SETTINGS | {"accuracy": {"energy": "0.5 kcal/mol", "confidence": 0.95}}
    other = summary(make_run(tmp_path / "b", facts, settings).path)
    assert other["accuracy"] == pytest.approx(ACCURACY)
    assert other["accuracy_unit"] == "kcal/mol"
