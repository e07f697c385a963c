"""A run in numbers: how often the oracle was asked, how wrong the model was there, and whether the promise holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnn_driver import units
from bnn_driver.bayes.calibration import clopper_pearson
from bnn_driver.records import Array
from bnn_driver.report.history import History, JudgedLabel, Promise, read_history
from bnn_driver.store import weights
from bnn_driver.store.run import RunDirectory

INTERVAL_CONFIDENCE = 0.95
"""Of the Clopper-Pearson interval of the share of audits beyond the accuracy."""
CLOCK = ("total", "ensemble", "oracle", "chains", "ipi")


def summary(run_path: Path) -> dict[str, Any]:
    """Numbers of a run from its directory alone, ready for JSON; energies eV, forces eV/Å, times s.

    Errors are those of the model before the label was trained on, E_model - (E_oracle + offset), with the offset from the first
    label.  `calls` are the frames whose uncertainty made the driver ask, a selected set; `audit` are served frames drawn by
    lot, the only unbiased measure of the promise.

    Raises: EnvironmentProblem when `run_path` holds no run, or a file of it is damaged.
    """
    history = read_history(Path(run_path))
    promise = history.promise
    calls = [x for x in history.labels if not x.audit and x.criterion != "first"]
    audits = [x for x in history.labels if x.audit]
    audit = _errors(audits, promise)
    if promise.accuracy is not None:
        audit["interval"] = list(clopper_pearson(audit["exceeded"], len(audits), INTERVAL_CONFIDENCE))
    else:
        audit["interval"] = [0.0, 1.0]
    coverage = {c.name: _coverage(c.name, audits, promise.confidence) for c in promise.criteria}
    stops = history.of_kind("stop")
    return {
        "steps": sum(history.walkers.values()) or history.last_step,
        "walkers": history.walkers,
        "labels": history.total_labels,
        "generation": weights.latest(RunDirectory.existing(Path(run_path)).generations_dir),
        "calls": _errors(calls, promise),
        "audit": audit,
        "seconds": seconds(history),
        "accuracy": promise.accuracy,
        "accuracy_unit": promise.unit,
        "confidence": promise.confidence,
        "promise": _overall([c["promise"] for c in coverage.values()] or [verdict(audit["interval"], promise.confidence)]),
        "coverage": coverage,
        "starts": len(history.of_kind("start")),
        "warnings": len(history.of_kind("warning")),
        "rewinds": len(history.of_kind("rewind")),
        "stopped": stops[-1].get("reason") if stops else None,
    }


def _coverage(name: str, audits: list[JudgedLabel], confidence: float | None) -> dict[str, Any]:
    """What the audits say of one criterion."""
    judged = [x.exceeded[name] for x in audits if name in x.exceeded]
    interval = list(clopper_pearson(sum(judged), len(judged), INTERVAL_CONFIDENCE))
    return {"audits": len(judged), "exceeded": sum(judged), "interval": interval, "promise": verdict(interval, confidence)}


def _overall(verdicts: Sequence[str]) -> str:
    """Broken with one criterion, kept with all."""
    if "broken" in verdicts:
        return "broken"
    return "holds" if set(verdicts) == {"holds"} else "not yet known"


def verdict(interval: Sequence[float], confidence: float | None) -> str:
    """What the audits say of P(|error| >= accuracy) <= 1 - confidence.

    Args: interval: of the exceeded share.   Returns: "holds" or "broken" when the interval lies on one side, else "not yet known".
    """
    if confidence is None:
        return "not yet known"
    if interval[0] > 1.0 - confidence:
        return "broken"
    return "holds" if interval[1] <= 1.0 - confidence else "not yet known"


def seconds(history: History) -> dict[str, float]:
    """Wall time by part, s: the last clock of every start, added up."""
    last = [[e for e in events if e["kind"] == "clock"][-1:] for events in history.segments]
    return {name: float(sum(clock.get(name, 0.0) for found in last for clock in found)) for name in CLOCK}


def _errors(labels: list[JudgedLabel], promise: Promise) -> dict[str, Any]:
    errors = np.array([x.error for x in labels])
    limits = [promise.accuracy if x.accuracy is None else x.accuracy for x in labels]
    exceeded = None
    if promise.accuracy is not None and all(limit is not None for limit in limits):
        exceeded = int(np.sum(np.abs(errors) >= np.array(limits, dtype=float)))
    return {
        "count": len(labels),
        "exceeded": exceeded,
        "rmse": _rms(errors),
        "foundation_rmse": _rms(np.array([x.foundation_error for x in labels])),
        "force_rmse": _rms(_flat([x.force_error for x in labels])),
        "foundation_force_rmse": _rms(_flat([x.foundation_force_error for x in labels])),
    }


def _flat(arrays: list[Array | None]) -> Array:
    return np.concatenate([x.ravel() for x in arrays if x is not None] or [np.zeros(0)])


def _rms(values: Array) -> float | None:
    return float(np.sqrt(np.mean(values**2))) if values.size and np.isfinite(values).all() else None


def render_summary(summary: dict[str, Any]) -> str:
    """The numbers of `summary` as a small table for a terminal."""
    unit = summary["accuracy_unit"]
    calls, audit, clock = summary["calls"], summary["audit"], summary["seconds"]
    lines = [
        _line("steps", f"{summary['steps']}" + _walkers(summary["walkers"])),
        _line("labels", f"{summary['labels']}  ({calls['count']} asked, {audit['count']} audits, the rest first or imported)"),
        _line("generation", "none" if summary["generation"] is None else f"{summary['generation']}"),
        _line("accuracy", f"{_energy(summary['accuracy'], unit)}" + _with_confidence(summary["confidence"])),
        "",
        f"{'before training':<18}{'frames':>7}{'beyond':>8}  {'energy rmse':<28}{'foundation model':<28}",
        _row("asked", calls, unit),
        _row("audited", audit, unit),
        "",
        f"{'':<33}  {'force rmse':<28}{'foundation model':<28}",
        _force_row("asked", calls),
        _force_row("audited", audit),
        "",
        *(_line(_titled(name), _promise(facts, summary["confidence"])) for name, facts in _promises(summary).items()),
        _line("wall time", _clock(clock)),
    ]
    if summary["rewinds"]:
        lines.append(
            _line("went back", f"{summary['rewinds']} times, around frames that could not be labelled: see oracle/quarantine")
        )
    if summary["warnings"]:
        lines.append(_line("warnings", f"{summary['warnings']}, see events/ and log/"))
    if summary["stopped"]:
        lines.append(_line("stopped", summary["stopped"]))
    return "\n".join(line.rstrip() for line in lines)


def _walkers(steps: dict[str, int]) -> str:
    return f"  ({', '.join(f'{name} {step}' for name, step in steps.items())})" if steps else ""


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"


def _row(name: str, errors: dict[str, Any], unit: str) -> str:
    beyond = "-" if errors["exceeded"] is None else errors["exceeded"]
    ours, theirs = _energy(errors["rmse"], unit), _energy(errors["foundation_rmse"], unit)
    return f"{name:<18}{errors['count']:>7}{beyond:>8}  {ours:<28}{theirs:<28}"


def _force_row(name: str, errors: dict[str, Any]) -> str:
    values = (errors["force_rmse"], errors["foundation_force_rmse"])
    return f"{name:<33}  " + "".join(f"{'-' if x is None else f'{x:.3g} eV/Å':<28}" for x in values)


def _energy(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    other = "" if unit == "eV" else f" ({_digits(value / units.UNITS['energy'][unit])} {unit})"
    return f"{_digits(value)} eV{other}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def _with_confidence(confidence: float | None) -> str:
    return "" if confidence is None else f" with {100 * confidence:g} % confidence"


def _promises(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Criterion -> coverage; that of the energy alone where the settings are not known."""
    return summary["coverage"] or {
        "energy": summary["audit"] | {"audits": summary["audit"]["count"], "promise": summary["promise"]}
    }


def _titled(criterion: str) -> str:
    return "promise" if criterion == "energy" else f"  {criterion}"


def _promise(coverage: dict[str, Any], confidence: float | None) -> str:
    if not coverage["audits"] or coverage["exceeded"] is None or confidence is None:
        return f"{coverage['promise']}: there are no audits yet"
    low, high = (100 * x for x in coverage["interval"])
    return (
        f"{coverage['promise']}: {coverage['exceeded']} of {coverage['audits']} audited frames beyond the accuracy, "
        f"95 % interval {low:.1f} to {high:.1f} %, promised at most {100 * (1 - confidence):.3g} %"
    )


def _clock(clock: dict[str, float]) -> str:
    total = clock["total"]
    if total <= 0:
        return "not recorded yet"
    parts = ", ".join(f"{name} {100 * clock[name] / total:.0f} %" for name in CLOCK[1:])
    return f"{_duration(total)}: {parts}"


def _duration(value: float) -> str:
    for limit, factor, unit in ((120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h")):
        if value < limit:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 86400:.3g} d"
