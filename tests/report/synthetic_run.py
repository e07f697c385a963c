"""A run made through the store alone, whose numbers are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnn_driver.records import Frames, Generation, Label, LabelledFrame
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import EventLog, RunDirectory
from bnn_driver.store.weights import publish
from bnn_driver.units import KCAL_PER_MOL

ACCURACY = 0.5 * KCAL_PER_MOL
SETTINGS = {
    "accuracy": {"energy": ACCURACY, "confidence": 0.95, "forces": None},
    "calibration": {"a": 1.5, "b": 10.0, "forgetting": 1.0},
}
ORACLE_ZERO = -4000.0
"""eV, the oracle's energy where the model's is zero."""


@dataclass(frozen=True)
class Fact:
    """One label: what was believed and how wrong it was, eV and eV/Å."""

    step: int
    criterion: str
    error: float
    foundation_error: float
    sd: float
    force_error: float = 0.02
    generation: int = 1

    @property
    def audit(self) -> bool:
        return self.criterion == "audit"


def make_item(fact: Fact, number: int) -> LabelledFrame:
    """A methane-like frame; the first label's foundation energy fixes the offset."""
    rng = np.random.default_rng(number)
    frame = Frames(np.array([6, 1, 1, 1, 1]), rng.standard_normal((1, 5, 3)))
    true_on_model_scale = float(rng.standard_normal())
    forces = rng.standard_normal((5, 3))
    label = Label(true_on_model_scale + ORACLE_ZERO, forces, None, "toy", "f", frame.content_id("f"), "exact", seconds=1.5)
    context = {
        "step": fact.step,
        "bead": 0,
        "criterion": fact.criterion,
        "audit": fact.audit,
        "generation": fact.generation,
        "probability": 0.1,
        "predicted_energy": true_on_model_scale + fact.error,
        "energy_predictive_sd": fact.sd,
        "foundation_energy": true_on_model_scale + fact.foundation_error,
        "predicted_forces": forces + fact.force_error,
        "force_predictive_sd": np.full((5, 3), 0.03),
        "foundation_forces": forces - 10 * fact.force_error,
    }
    return LabelledFrame(frame, label, context)


def make_run(path: Path, facts: Sequence[Fact], settings: dict | None = None) -> RunDirectory:
    """A run directory with these labels and nothing else."""
    run = RunDirectory(path)
    run.fix_settings(SETTINGS if settings is None else settings, {"oracle": "f"})
    store = LabelStore(run.labels_dir)
    for number, fact in enumerate(facts):
        store.write(make_item(fact, number))
    publish(run.generations_dir, Generation(0, {"w": np.zeros((2, 3))}, ()))
    return run


def make_live_run(path: Path, steps: int = 6000, seed: int = 3) -> RunDirectory:
    """A run as it would go: uncertainty falls with labels, grows between them, jumps at a reaction; audits now and then."""
    rng = np.random.default_rng(seed)
    run = RunDirectory(path)
    run.fix_settings(SETTINGS, {"oracle": "f"})
    (run.path / "bnn.toml").write_text('[accuracy]\nenergy = "0.5 kcal/mol"\n')
    store = LabelStore(run.labels_dir)
    n, drift, generation = 0, 0.0, 0
    publish(run.generations_dir, Generation(0, {"w": np.zeros((2, 3))}, ()))
    with EventLog(run.events_dir) as events:
        events.append("start", version="0", pid=1, step=0)
        for step in range(0, steps, 4):
            drift = 0.97 * drift + 0.2 * rng.standard_normal() + (1.2 if step in (2400, 2404) else 0.0)
            sd = 0.0028 * (1 + 9 / (1 + n)) * np.exp(0.35 * drift)
            ask = step == 0 or sd > 0.0085 * (0.45 + 0.5 * min(n, 20) / 20)
            criterion = "first" if step == 0 else ("force" if ask and rng.random() < 0.2 else "energy") if ask else "none"
            criterion = "audit" if not ask and rng.random() < 0.02 else criterion
            facts = {"step": step, "bead": 0, "criterion": criterion, "ask": ask, "probability": 0.1, "generation": generation}
            if step % 8 == 0 or criterion != "none":
                events.append("decision", energy_predictive_sd=sd, max_force_sd=0.1, **facts)
            if criterion != "none":
                error = 0.0 if step == 0 else 1.15 * sd * rng.standard_normal()
                foundation = 0.0 if step == 0 else 0.11 * rng.standard_normal() + 0.08
                item = make_item(Fact(step, criterion, error, foundation, sd, generation=generation), n)
                number = store.write(item)
                events.append("label", number=number, frame_id=item.label.frame_id, step=step, criterion=criterion, seconds=1.5)
                n, generation, drift = n + 1, generation + 1, drift - (0.8 if ask else 0.0)
                events.append("swap", generation=generation, step=step)
        events.append("clock", ensemble=60.0, oracle=300.0, chains=240.0, ipi=12.0, total=615.0, steps=steps)
        events.append("stop", reason="finished")
    return run
