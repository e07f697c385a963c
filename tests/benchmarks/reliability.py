"""The reliability picture of `uncertainty.py`: real against predicted errors, published recipe and default."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

STYLES = {"published": ("#D55E00", "o"), "default": ("#0072B2", "D")}
QUANTITIES = {"E": "energy (kcal/mol)", "F": "force component (kcal/mol/Å)"}


def draw(rows: Sequence[Mapping[str, Any]], file: Path, labels: int = 10) -> None:
    """One panel per system and quantity, on the tests whose forces are known.  Args: rows: of `uncertainty.py`.   file: PNG."""
    some = [row for row in rows if row["labels"] == labels and row["candidate"] in STYLES]
    known = {(row["system"], row["test"]) for row in some if row["q"] == "F"}
    systems = list(dict.fromkeys(system for system, _ in known))
    figure = Figure(figsize=(3.1 * len(systems), 6.2), dpi=130, layout="constrained")
    panels = figure.subplots(2, len(systems), squeeze=False)
    for k, system in enumerate(sorted(systems)):
        for panel, q in zip(panels[:, k], QUANTITIES, strict=True):
            _panel(
                panel,
                [row for row in some if (row["system"], row["test"]) in known and row["system"] == system and row["q"] == q],
            )
        panels[0, k].set_title(system)
    for panel, name in zip(panels[:, 0], QUANTITIES.values(), strict=True):
        panel.set_ylabel(f"real rms error\n{name}")
    for panel in panels[-1]:
        panel.set_xlabel("predicted sd, before calibration")
    handles = {text: handle for panel in panels.ravel() for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    file.write_bytes(buffer.getvalue())


def _panel(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bins of equally many cases, sorted by sd; a seed and test each is a line."""
    ends: list[float] = []
    for row in rows:
        colour, marker = STYLES[row["candidate"]]
        x, y = np.maximum(np.array(row["bins"]).T, 1e-6)
        panel.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=0.9, alpha=0.75, label=f"{row['candidate']} recipe")
        ends += [*x, *y]
    if ends:
        low, high = min(ends) / 1.3, max(ends) * 1.3
        panel.plot([low, high], [low, high], color="black", linewidth=1.2, zorder=0, label="sd tells the error")
        panel.set(xlim=(low, high), ylim=(low, high), xscale="log", yscale="log", aspect="equal")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    panel.grid(True, which="major", color="0.92", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
