"""The picture of a run: uncertainty and oracle calls, errors at labels, cost, and reliability."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bnn_driver import units
from bnn_driver.records import Array
from bnn_driver.report.history import History, JudgedLabel, read_history
from bnn_driver.store.files import write_atomic

#: Okabe and Ito's palette, told apart by every kind of colour vision; the shapes differ as well.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
MARKERS = {
    "first": ("*", "black", "first frame"),
    "energy": ("o", RED, "asked (energy)"),
    "force": ("^", ORANGE, "asked (force)"),
    "audit": ("D", GREEN, "audit"),
}
BINS = 1200
"""Points of a line at most; beyond, the largest value of each bin is drawn, so that no peak is lost."""


def run_figure(run_path: Path, out_png: Path) -> None:
    """Draw a run, living or dead, into a PNG file.  Raises: EnvironmentProblem when there is no run or a file is damaged."""
    history = read_history(Path(run_path))
    figure = Figure(figsize=(11, 7.4), dpi=130, layout="constrained")
    panels = figure.subplots(2, 2)
    _uncertainty(panels[0, 0], history)
    _errors(panels[0, 1], history)
    _cost(panels[1, 0], history)
    _reliability(panels[1, 1], history)
    for panel in panels.ravel():
        panel.grid(True, which="major", color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomic(Path(out_png), buffer.getvalue())


def _uncertainty(panel: Axes, history: History) -> None:
    """What the model vouches for, step by step, against the accuracy; every call of the oracle and every swap of weights."""
    rows, factor = history.decisions, _per_unit(history)
    calibrated = history.promise.calibration is not None
    values = rows["bound" if calibrated else "sd"] * factor
    for step in history.swaps:
        panel.axvline(
            step, color=GREY, linewidth=0.7, alpha=0.35, zorder=0.5, label="new weights" if step == history.swaps[0] else None
        )
    known = np.isfinite(values) & (values > 0)
    panel.plot(*_largest_per_step(rows["step"][known], values[known]), color=BLUE, linewidth=0.9)
    at_step = _lookup(rows["step"][known], values[known])
    for criterion, (marker, colour, name) in MARKERS.items():
        steps = [x.step for x in history.labels if x.criterion == criterion and x.step in at_step]
        heights = [at_step[step] for step in steps]
        if steps:
            panel.plot(
                steps,
                heights,
                marker,
                color=colour,
                markersize=_size(marker),
                markeredgecolor="white",
                markeredgewidth=0.4,
                label=name,
            )
    _accuracy_line(panel, history)
    panel.set_yscale("log")
    confidence = 100 * (history.promise.confidence or 0.95)
    panel.set_ylabel(
        f"{confidence:g} % bound of energy error / {history.promise.unit}"
        if calibrated
        else f"predictive sd / {history.promise.unit}"
    )
    panel.set_xlabel("step")
    panel.set_title("What the model vouches for" if calibrated else "Uncertainty, not calibrated", loc="left", fontsize=11)
    _legend(panel, ncols=2)


def _errors(panel: Axes, history: History) -> None:
    """Error of every label before it was trained on, ours and the untouched foundation model's."""
    factor = _per_unit(history)
    judged = [x for x in history.labels if x.criterion != "first"]
    floor = _floor(np.array([x.error for x in judged] + [x.foundation_error for x in judged]))
    numbers = [x.number for x in judged]
    theirs = [factor * max(abs(x.foundation_error), floor) for x in judged]
    panel.plot(numbers, theirs, "x", color=GREY, markersize=4.5, label="foundation model")
    for is_audit, marker, colour, name in ((False, "o", RED, "ours, asked"), (True, "D", GREEN, "ours, audit")):
        some = [x for x in judged if x.audit == is_audit]
        if some:
            heights = [factor * max(abs(x.error), floor) for x in some]
            panel.plot(
                [x.number for x in some],
                heights,
                marker,
                color=colour,
                markersize=_size(marker),
                markeredgecolor="white",
                markeredgewidth=0.4,
                label=name,
            )
    _accuracy_line(panel, history)
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("label number")
    panel.set_ylabel(f"|energy error| / {history.promise.unit}")
    panel.set_title("Error at labels, before learning them", loc="left", fontsize=11)
    _legend(panel)


def _cost(panel: Axes, history: History) -> None:
    """Labels spent so far against the step."""
    last = max(history.last_step, 1)
    for is_audit, colour, name in ((False, RED, "asked"), (True, GREEN, "audits")):
        steps = np.sort([x.step for x in history.labels if x.audit == is_audit])
        if len(steps):
            panel.step(
                [0, *steps, last],
                [0, *range(1, len(steps) + 1), len(steps)],
                where="post",
                color=colour,
                linewidth=1.6,
                label=name,
            )
    panel.set_xlim(0, None)
    panel.set_ylim(0, None)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("step")
    panel.set_ylabel("labels, cumulative")
    share = 100 * len(history.labels) / last
    panel.set_title(
        f"Cost: {len(history.labels)} oracle calls in {history.last_step} steps ({share:.2g} %)", loc="left", fontsize=11
    )
    _legend(panel)


def _reliability(panel: Axes, history: History) -> None:
    """|error| against its own predicted sd: two thirds of the points belong under the first line, 95 % under the second."""
    factor = _per_unit(history)
    judged = [x for x in history.labels if x.counts_for_calibration and _own_sd(x, history) > 0]
    sds = np.array([_own_sd(x, history) for x in judged])
    floor = _floor(np.array([x.error for x in judged]))
    for is_audit, marker, colour, name in ((False, "o", RED, "asked"), (True, "D", GREEN, "audit")):
        chosen = np.array([x.audit == is_audit for x in judged], dtype=bool)
        if chosen.any():
            errors = np.maximum(np.abs([x.error for x in judged]), floor)[chosen]
            panel.plot(
                factor * sds[chosen],
                factor * errors,
                marker,
                color=colour,
                markersize=_size(marker),
                markeredgecolor="white",
                markeredgewidth=0.4,
                label=name,
            )
    if len(sds):
        ends = factor * np.array([0.8 * sds.min(), 1.25 * sds.max()])
        panel.plot(ends, ends, "-", color="black", linewidth=1, label="1 sd")
        panel.plot(ends, 2 * ends, "--", color="black", linewidth=1, label="2 sd")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel(f"predicted sd, {'calibrated' if history.calibrated else 'not calibrated'} / {history.promise.unit}")
    panel.set_ylabel(f"|energy error| / {history.promise.unit}")
    panel.set_title("Reliability", loc="left", fontsize=11)
    _legend(panel)


def _own_sd(label: JudgedLabel, history: History) -> float:
    return history.calibrated.get(label.frame_id, np.nan) if history.calibrated else label.sd


def _accuracy_line(panel: Axes, history: History) -> None:
    if history.promise.accuracy is not None:
        panel.axhline(_per_unit(history) * history.promise.accuracy, color="black", linestyle="--", linewidth=1, label="accuracy")


def _per_unit(history: History) -> float:
    """The user's unit per eV."""
    return 1.0 / units.UNITS["energy"][history.promise.unit]


def _floor(values: Array) -> float:
    """The smallest |error| that a log axis shows, so that one lucky zero does not stretch it."""
    sizes = np.abs(values[np.isfinite(values)])
    return float(1e-3 * sizes.max(initial=0.0)) or 1e-12


def _largest_per_step(steps: Array, values: Array) -> tuple[Array, Array]:
    """One point per step (largest over the beads and over repeated starts), at most BINS points, sorted."""
    if not len(steps):
        return steps, values
    width = max(1.0, (steps.max() - steps.min() + 1) / BINS)
    bins, index = np.unique(np.floor(steps / width), return_inverse=True)
    largest = np.full(len(bins), -np.inf)
    np.maximum.at(largest, index, values)
    return bins * width, largest


def _lookup(steps: Array, values: Array) -> dict[int, float]:
    found: dict[int, float] = {}
    for step, value in zip(steps.astype(int).tolist(), values.tolist(), strict=True):
        found[step] = max(value, found.get(step, 0.0))
    return found


def _size(marker: str) -> float:
    return {"*": 11.0, "D": 4.6}.get(marker, 5.2)


def _legend(panel: Axes, ncols: int = 1) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8, frameon=True, framealpha=0.85, edgecolor="none", ncols=ncols)
    else:
        panel.text(0.5, 0.5, "nothing yet", transform=panel.transAxes, ha="center", color=GREY)
