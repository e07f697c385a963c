"""Run directory -> tables: errors at labels before they were trained on, decisions, and what was promised."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bnn_driver import units
from bnn_driver.active.criteria import EnergyCriterion, ErrorCriterion, promised
from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.errors import ConfigError
from bnn_driver.records import Array, LabelledFrame
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import RunDirectory, read_json, read_segments


@dataclass(frozen=True)
class Promise:
    """What the run promised; None where its settings do not say."""

    accuracy: float | None
    """K, eV, of the total energy."""
    confidence: float | None
    force_accuracy: float | None
    """eV/Å, of the force on any atom."""
    unit: str
    """The unit in which the user gave the accuracy."""
    calibration: GammaCalibration | None
    """Prior, before any pair."""
    criteria: tuple[ErrorCriterion, ...] = ()
    """All that is promised; empty where the settings do not say."""


@dataclass(frozen=True, eq=False)
class JudgedLabel:
    """A label against what was believed of its frame before it came."""

    number: int
    frame_id: str
    step: int
    criterion: str
    audit: bool
    counts_for_calibration: bool
    """Neither of the first frame nor predicted by generation 0, whose members have no spread."""
    accuracy: float | None
    """eV, the promise under which the frame was served; None where the label does not say."""
    error: float
    """eV, predicted - (label + offset), of the model that was served."""
    foundation_error: float
    """eV, the same of the untouched foundation model; NaN when not recorded."""
    sd: float
    """eV, predictive sd of the energy before calibration."""
    force_error: Array | None
    """(A, 3) eV/Å."""
    foundation_force_error: Array | None
    """(A, 3) eV/Å."""
    exceeded: dict[str, bool] = field(default_factory=dict)
    """Criterion -> whether its promise was broken in this frame."""


@dataclass(eq=False)
class History:
    """All that the report draws or counts."""

    promise: Promise
    labels: list[JudgedLabel]
    total_labels: int
    """Also those that cannot be judged, such as imported ones."""
    decisions: dict[str, Array] = field(default_factory=dict)
    """step, sd (eV, not calibrated), sd_calibrated and bound (eV; NaN without calibration), each (n,), in order of time;
    the bound is the K with P(|error| < K) = confidence."""
    calibrated: dict[str, float] = field(default_factory=dict)
    """frame id -> eV, calibrated sd as it was before the label came."""
    swaps: list[int] = field(default_factory=list)
    """Steps at which new weights were taken."""
    segments: list[list[dict[str, Any]]] = field(default_factory=list)
    """Events other than decisions, by start."""
    last_step: int = 0
    """Of the walker that is ahead, or of the only simulation."""
    walkers: dict[str, int] = field(default_factory=dict)
    """Walker -> its last step; empty for a run of one simulation."""

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All events of one kind, except decisions, which stand in `decisions`."""
        return [event for events in self.segments for event in events if event["kind"] == kind]


def read_history(path: Path) -> History:
    """Everything from a run directory, of a living or a dead run.  Raises: EnvironmentProblem when it is none or is damaged."""
    run = RunDirectory.existing(path)
    promise = read_promise(run)
    items = LabelStore(run.labels_dir).all()
    history = History(promise, judge_labels(items, promise.criteria), len(items))
    _follow_events(history, run)
    return history


def read_promise(run: RunDirectory) -> Promise:
    """Accuracy, confidence and calibration from settings.json; the unit from the run's copy of the TOML, where there is one."""
    settings = read_json(run.settings_file)["effective"] if run.settings_file.exists() else {}
    accuracy = _section(settings, "accuracy", "energy")
    prior = _section(settings, "calibration", "a")
    calibration = None
    if isinstance(prior.get("a"), float | int) and isinstance(prior.get("b"), float | int):
        calibration = GammaCalibration(float(prior["a"]), float(prior["b"]), float(prior.get("forgetting", 1.0)))
    confidence = accuracy.get("confidence", settings.get("confidence"))
    return Promise(
        accuracy=_in_ev(accuracy.get("energy"), "energy"),
        confidence=None if confidence is None else float(confidence),
        force_accuracy=_in_ev(accuracy.get("forces"), "force"),
        unit=_unit(accuracy.get("energy")) or _unit_of_toml(run.path / "bnn.toml") or "eV",
        calibration=calibration,
        criteria=_criteria(accuracy),
    )


def _criteria(accuracy: dict[str, Any]) -> tuple[ErrorCriterion, ...]:
    energy = _in_ev(accuracy.get("energy"), "energy")
    if energy is None:
        return ()
    groups = {name: (group["atoms"], group["forces"]) for name, group in accuracy.get("groups", {}).items()}
    return promised(energy, _in_ev(accuracy.get("forces"), "force"), accuracy.get("species", {}), groups)


def judge_labels(items: list[LabelledFrame], criteria: Sequence[ErrorCriterion] = ()) -> list[JudgedLabel]:
    """Errors of energy and forces of all labels that carry a prediction, and which promises they break.

    The offset between model and oracle, E_foundation - E_oracle, is fixed by the first label (criterion "first").
    """
    first = next((item for item in items if item.context.get("criterion") == "first"), None)
    if first is None:
        return []
    reference = first.context.get("foundation_energy", first.context.get("predicted_energy", np.nan))
    offset = float(reference) - first.label.energy
    return [_judge(number, item, offset, criteria) for number, item in enumerate(items) if "predicted_energy" in item.context]


def _judge(number: int, item: LabelledFrame, offset: float, criteria: Sequence[ErrorCriterion]) -> JudgedLabel:
    known, true = item.context, item.label
    criterion = str(known.get("criterion", "none"))

    def force_error(key: str) -> Array | None:
        return np.asarray(known[key]) - true.forces if key in known else None

    return JudgedLabel(
        number=number,
        frame_id=true.frame_id,
        step=int(known.get("step", number)),
        criterion=criterion,
        audit=bool(known.get("audit", criterion == "audit")),
        counts_for_calibration=criterion != "first" and int(known.get("generation", 0)) > 0,
        accuracy=None if known.get("accuracy") is None else float(known["accuracy"]),
        error=float(known["predicted_energy"]) - (true.energy + offset),
        foundation_error=float(known.get("foundation_energy", np.nan)) - (true.energy + offset),
        sd=float(known.get("energy_predictive_sd", np.nan)),
        force_error=force_error("predicted_forces"),
        foundation_force_error=force_error("foundation_forces"),
        exceeded={c.name: _then(c, known).exceeded(item, offset) for c in criteria if c.needs <= known.keys()},
    )


def _then(criterion: ErrorCriterion, known: dict[str, Any]) -> ErrorCriterion:
    """The criterion with the accuracy under which the frame was served, where the label says it."""
    if isinstance(criterion, EnergyCriterion) and known.get("accuracy") is not None:
        return replace(criterion, accuracy=float(known["accuracy"]))
    return criterion


def _follow_events(history: History, run: RunDirectory) -> None:
    """Walk through the events in order, and carry the calibration along as the driver did."""
    judged = {label.frame_id: label for label in history.labels}
    state = history.promise.calibration
    confidence = history.promise.confidence or 0.95
    rows: list[tuple[float, float, float, float]] = []
    steps: dict[str, int] = {}
    segments: dict[str, list[dict[str, Any]]] = {}
    for walker, start, event in _events_in_order(run):
        kept = segments.setdefault(start, [])
        steps[walker] = max(steps.get(walker, 0), int(event.get("steps" if event["kind"] == "clock" else "step", 0)))
        if event["kind"] == "decision":
            sd = float(event["energy_predictive_sd"])
            spread = (
                (np.nan, np.nan) if state is None else (float(state.calibrated_sd(sd)), float(state.quantile(sd, confidence)))
            )
            rows.append((float(event["step"]), sd, *spread))
            continue
        kept.append(event)
        label = judged.get(event.get("frame_id", "")) if event["kind"] == "label" else None
        if label is not None and state is not None and label.frame_id not in history.calibrated:
            history.calibrated[label.frame_id] = float(state.calibrated_sd(label.sd))
            if label.counts_for_calibration and label.sd > 0:
                state = state.observe(label.error, label.sd)
        if event["kind"] == "swap":
            history.swaps.append(int(event["step"]))
    history.segments = list(segments.values())
    history.last_step = max(steps.values(), default=0)
    history.walkers = {name: steps[name] for name in run.walkers() if name in steps}
    table = np.array(rows).reshape(-1, 4)
    history.decisions = dict(zip(("step", "sd", "sd_calibrated", "bound"), table.T, strict=True))


def _events_in_order(run: RunDirectory) -> list[tuple[str, str, dict[str, Any]]]:
    """Every event with its walker and the name of its start: start by start, or in order of time when there are several walkers."""
    walkers = run.walkers()
    found = [
        (walker, f"{walker}/{number}", event)
        for walker in ["", *walkers]
        for number, segment in enumerate(read_segments(RunDirectory(run.path, walker).events_dir))
        for event in segment
    ]
    return sorted(found, key=lambda item: float(item[2]["time"])) if walkers else found


def _section(settings: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    """The table `name`; a bare value stands for {key: value}."""
    value = settings.get(name, {})
    return value if isinstance(value, dict) else {key: value}


def _in_ev(value: Any, kind: str) -> float | None:
    if value is None:
        return None
    return units.parse_quantity(value, kind) if isinstance(value, str) else float(value)


def _unit(value: Any) -> str | None:
    words = value.split() if isinstance(value, str) else []
    return words[1] if len(words) == 2 and words[1] in units.UNITS["energy"] else None


def _unit_of_toml(path: Path) -> str | None:
    try:
        return _unit(_section(tomllib.loads(path.read_text(encoding="utf-8")), "accuracy", "energy").get("energy"))
    except (OSError, ValueError, ConfigError):
        return None
