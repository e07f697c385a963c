"""What selections and explorations both tell: how well disagreement ranks errors, why they ended, and numbers that may be missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bnn_driver.bayes import scores
from bnn_driver.errors import BnnError
from bnn_driver.records import Array
from bnn_driver.report import figures

BINS = 8
"""Of the reliability, at most."""


def judged_spread(error: Array, spread: Array, energy: Array, sd: Array, accuracy: float) -> dict[str, float | None]:
    """How the spread of frames tells their errors; None where it cannot be said.

    Args: error, spread: (N,) eV/Å, force error and disagreement; errors above their median count as large.   energy, sd: (N,) eV, error
        and calibrated predictive sd.   accuracy: eV, above which an error of the energy counts as large.
    """
    names = ("force_auroc", "force_rank", "energy_auroc", "energy_rank", "energy_scale")
    if not len(error):
        return dict.fromkeys(names)
    try:
        values = (
            scores.auroc(error, spread, float(np.median(error))), scores.rank_correlation(error, spread),
            scores.auroc(energy, sd, accuracy), scores.rank_correlation(energy, sd), scores.rms_ratio(energy, sd),
        )  # fmt: skip
    except BnnError:  # members that agree on a frame to the last bit have no spread to be judged
        return dict.fromkeys(names)
    return {name: value if np.isfinite(value) else None for name, value in zip(names, values, strict=True)}


def last_stop(events: Iterable[Mapping[str, Any]]) -> str | None:
    """Why the last start ended; None while it runs, or when it was killed."""
    ends = [event for event in events if event["kind"] in ("start", "stop")]
    return ends[-1].get("reason") if ends else None


def reliability_panel(panel: figures.Axes, error: Array, spread: Array, judged: Mapping[str, float | None], label: str) -> None:
    """Error of frames against the disagreement on them; root mean squares of equally filled bins.

    Args: error, spread: (N,) meV/Å.   judged: has force_auroc and force_rank where there are frames.   label: what a point is.
    """
    if len(error):
        panel.plot(spread, error, ".", color=figures.BLUE, alpha=0.5, markersize=5.5, label=label)
        if spread.min() > 0 and len(error) >= 2:
            rows = scores.reliability(error, spread, min(BINS, len(error)))
            panel.plot(
                rows[:, 0], rows[:, 1], "D-", color="black", markersize=4.5, linewidth=1, label="rms of equally filled bins"
            )
        known = [
            f"{name} {x:.2f}" for name, x in (("AUROC", judged["force_auroc"]), ("rank", judged["force_rank"])) if x is not None
        ]
        panel.annotate(", ".join(known), (0.03, 0.97), xycoords="axes fraction", va="top", fontsize=9)
    figures.style(panel, "force disagreement / meV/Å", "force error / meV/Å", "Reliability of the spread", log="xy")


def milli(value: float | None) -> str:
    """eV as meV, a digit after the point."""
    return "-" if value is None else f"{1e3 * value:.1f}"


def plain(value: float | None) -> str:
    """Two digits after the point."""
    return "-" if value is None else f"{value:.2f}"
