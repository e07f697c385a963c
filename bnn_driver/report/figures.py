"""The picture of a run: uncertainty and oracle calls, errors at labels, cost, and reliability."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

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
    figure, panels = blank(2, 2, (11, 7.6))
    _uncertainty(panels[0], history)
    _errors(panels[1], history)
    _cost(panels[2], history)
    _reliability(panels[3], history)
    save(figure, panels, out_png)


def blank(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure and its empty panels, row by row."""
    figure = Figure(figsize=inches, dpi=130, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel().tolist()


def save(figure: Figure, panels: list[Axes], out_png: Path, columns: int = 7) -> None:
    """Finish all panels, give them one legend of so many columns, and write the file."""
    for panel in panels:
        panel.grid(True, which="major", color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    _one_legend(figure, panels, columns)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomic(Path(out_png), buffer.getvalue())


def _uncertainty(panel: Axes, history: History) -> None:
    """What the model vouches for, step by step, against the accuracy; every call of the oracle and every swap of weights."""
    rows, promise = history.decisions, history.promise
    calibrated = promise.calibration is not None
    values = rows["bound" if calibrated else "sd"] * _per_unit(history)
    if history.swaps:
        whole = panel.get_xaxis_transform()
        panel.vlines(history.swaps, 0, 1, GREY, transform=whole, linewidth=0.7, alpha=0.35, zorder=0.5, label="new weights")
    known = np.isfinite(values) & (values > 0)
    panel.plot(*_largest_per_step(rows["step"][known], values[known]), color=BLUE, linewidth=0.9)
    at_step = _largest_at(rows["step"][known], values[known])
    shown = [x for x in history.labels if x.step in at_step]
    _points(panel, shown, [x.step for x in shown], [at_step[x.step] for x in shown])
    _accuracy_line(panel, history)
    _log_axis(panel, "y")
    bound = f"{100 * (promise.confidence or 0.95):g} % bound of |energy error|"
    panel.set_ylabel(f"{bound if calibrated else 'predictive sd of energy'} / {promise.unit}")
    panel.set_xlabel("step")
    _title(panel, "Uncertainty, step by step" + ("" if calibrated else " (not calibrated)"))


def _errors(panel: Axes, history: History) -> None:
    """Error of every label before it was trained on, ours and the untouched foundation model's."""
    factor = _per_unit(history)
    judged = [x for x in history.labels if x.criterion != "first"]
    numbers = [x.number for x in judged]
    theirs = np.array([x.foundation_error for x in judged])
    ours = np.array([x.error for x in judged])
    floor = _floor(np.concatenate([ours, theirs]))
    panel.plot(numbers, factor * np.maximum(np.abs(theirs), floor), "x", color=GREY, markersize=4.5, label="foundation model")
    _points(panel, judged, numbers, factor * np.maximum(np.abs(ours), floor))
    _accuracy_line(panel, history)
    _log_axis(panel, "y")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("label number")
    panel.set_ylabel(f"|energy error| / {history.promise.unit}")
    _title(panel, "Error at labels, before they are learnt")


def _cost(panel: Axes, history: History) -> None:
    """Labels spent so far against the step."""
    last = max(history.last_step, 1)
    lines = [(np.sort([x.step for x in history.labels if x.audit == is_audit]), colour, name)
             for is_audit, colour, name in ((False, RED, "asked"), (True, GREEN, "audits"))]  # fmt: skip
    sides = ("bottom", "top") if len(lines[0][0]) >= len(lines[1][0]) else ("top", "bottom")
    for (steps, colour, name), side in zip(lines, sides, strict=True):  # the names of lines that end together must not meet
        total = len(steps)
        if total:
            panel.step([0, *steps, last], [0, *range(1, total + 1), total], where="post", color=colour, linewidth=1.6)
            panel.annotate(name, (last, total), (3, 0), textcoords="offset points", color=colour, fontsize=9, ha="left", va=side)
    panel.set_xlim(0, last)
    panel.set_ylim(0, None)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("step")
    panel.set_ylabel("oracle calls so far")
    _title(panel, f"Cost: {len(history.labels)} labels in {history.last_step} steps")


def _reliability(panel: Axes, history: History) -> None:
    """|error| against its own predicted sd: two thirds of the points belong under the first line, 95 % under the second."""
    factor = _per_unit(history)
    judged = [x for x in history.labels if x.counts_for_calibration and _own_sd(x, history) > 0]
    sds = factor * np.array([_own_sd(x, history) for x in judged])
    errors = factor * np.array([x.error for x in judged])
    _points(panel, judged, sds, np.maximum(np.abs(errors), _floor(errors)))
    if len(sds):
        ends = np.array([0.8 * sds.min(), 1.25 * sds.max()])
        for times, style in ((1, "-"), (2, ":")):
            panel.plot(ends, times * ends, style, color="black", linewidth=1)
            panel.annotate(f"{times} sd", (ends[1], times * ends[1]), (3, 0), textcoords="offset points", va="center", fontsize=9)
    _log_axis(panel, "x")
    _log_axis(panel, "y")
    panel.set_xlabel(f"predicted sd ({'calibrated' if history.calibrated else 'not calibrated'}) / {history.promise.unit}")
    panel.set_ylabel(f"|energy error| / {history.promise.unit}")
    _title(panel, "Reliability")


def _points(panel: Axes, labels: list[JudgedLabel], x: Sequence[float] | Array, y: Sequence[float] | Array) -> None:
    """One marker per label, by criterion.  Args: x, y: (n,) places of the n labels."""
    for criterion, (marker, colour, name) in MARKERS.items():
        chosen = [i for i, label in enumerate(labels) if label.criterion == criterion]
        if chosen:
            size = {"*": 11.0, "D": 4.6}.get(marker, 5.4)
            xs, ys = [x[i] for i in chosen], [y[i] for i in chosen]
            panel.plot(xs, ys, marker, color=colour, markersize=size, markeredgecolor="white", markeredgewidth=0.4, label=name)


def _log_axis(panel: Axes, which: str) -> None:
    """Logarithmic, with plain decimals.  Args: which: "x" or "y"."""
    panel.set(**{f"{which}scale": "log"})
    axis: Axis = getattr(panel, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = sorted(axis.get_view_interval())
    if high < 30 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())


def style(panel: Axes, x: str, y: str, title: str, log: str = "") -> None:
    """Names of axes and panel.  Args: log: the logarithmic axes, such as "y" or "xy"."""
    for which in log:
        _log_axis(panel, which)
    if "x" not in log:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    _title(panel, title)


def _title(panel: Axes, text: str) -> None:
    panel.set_title(text, loc="left", fontsize=11)


def _one_legend(figure: Figure, panels: list[Axes], columns: int) -> None:
    """Every symbol once, above all panels; a panel without any point says so."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
        if not any(len(np.asarray(line.get_xdata())) for line in panel.lines if line.get_label() != "accuracy"):
            panel.text(0.5, 0.4, "nothing yet", transform=panel.transAxes, ha="center", color=GREY)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, fontsize=9, frameon=False)


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


def _largest_at(steps: Array, values: Array) -> dict[int, float]:
    found: dict[int, float] = {}
    for step, value in zip(steps.astype(int).tolist(), values.tolist(), strict=True):
        found[step] = max(value, found.get(step, 0.0))
    return found
