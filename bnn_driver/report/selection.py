"""A selection in numbers and in pictures: disagreement round by round, errors against labels beside the baseline, reliability."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.records import Array
from bnn_driver.report import figures
from bnn_driver.report.disagreement import judged_spread, last_stop, milli, plain, reliability_panel
from bnn_driver.store.files import read_json, read_series
from bnn_driver.store.run import RunDirectory, read_events


@dataclass(frozen=True, eq=False)
class Arm:
    """One way of choosing."""

    rounds: list[dict[str, Any]]
    """As in round_*.json, the start frames first."""
    tests: list[dict[str, Any]]
    """As in test_*.json."""

    @property
    def labels(self) -> Array:
        """(n,) labels learnt at every test."""
        return np.array([test["labels"] for test in self.tests], dtype=int)

    def errors(self, name: str) -> Array:
        """(n,) of every test."""
        return np.array([test[name] for test in self.tests], dtype=float)


@dataclass(frozen=True, eq=False)
class Selection:
    """All that is reported of a selection."""

    chosen: Arm
    baselines: list[Arm]
    calibration: GammaCalibration
    """Of energies, from what was predicted of the frames before they were learnt."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Settings in use."""
    stopped: str | None = None


def is_selection(run_path: Path) -> bool:
    """Whether a run directory was made by `select`."""
    return (Path(run_path) / "selection").is_dir()


def read_selection(run_path: Path) -> Selection:
    """Everything from a run directory, of a living or a dead run.  Raises: EnvironmentProblem when it is none or is damaged."""
    run = RunDirectory.existing(Path(run_path))
    settings = read_json(run.settings_file)["effective"]
    chosen = _arm(run.path / "selection")
    prior = settings["calibration"]
    calibration = GammaCalibration(prior["a"], prior["b"], prior["forgetting"])
    for record in chosen.rounds[1:]:
        calibration = calibration.observe(record["frame_energy_error"], record["frame_energy_sd"])
    arms = [_arm(folder) for folder in sorted((run.path / "baseline").glob("*"))]
    return Selection(chosen, arms, calibration, settings, last_stop(read_events(run.events_dir)))


def _arm(folder: Path) -> Arm:
    return Arm(read_series(folder, "round"), read_series(folder, "test"))


def selection_summary(run_path: Path) -> dict[str, Any]:
    """Numbers of a selection, ready for JSON; energies eV, forces eV/Å."""
    found = read_selection(run_path)
    rounds = []
    for number, test in enumerate(found.chosen.tests):
        record = found.chosen.rounds[number + 1] if number + 1 < len(found.chosen.rounds) else {}
        beside = [other["force_error"] for arm in found.baselines for other in arm.tests if other["labels"] == test["labels"]]
        rounds.append(
            {name: test[name] for name in ("labels", "force_error", "force_rmse", "energy_rmse", "disagreement")}
            | {"selected": record.get("selected"), "remaining": record.get("remaining")}
            | {"random_force_error": float(np.mean(beside)) if beside else None, "random_runs": len(beside)}
            | reliability(test, found)
        )
    return {
        "labels": sum(len(record["chosen"]) for record in found.chosen.rounds),
        "near_duplicates": sum(len(record.get("near_duplicates", ())) for record in found.chosen.rounds),
        "rank": found.facts["pool"]["rank"],
        "diversity": found.facts["pool"]["diversity"],
        "committee": found.facts["committee"]["kind"],
        "members": found.facts["ensemble"]["members"],
        "rounds": rounds,
        "stopped": found.stopped,
    }


def reliability(test: dict[str, Any], found: Selection) -> dict[str, float | None]:
    """How the spread tells errors on the test frames."""
    error, spread, energy, sd = (
        np.array(test[name]) for name in ("frame_force_error", "frame_disagreement", "frame_energy_error", "frame_energy_sd")
    )
    return judged_spread(error, spread, energy, sd * found.calibration.inflation, found.facts["accuracy"]["energy"])


def render_selection(summary: dict[str, Any]) -> str:
    """The numbers of `selection_summary` as a table for a terminal."""
    diverse = "with diversity" if summary["diversity"] else "the most uncertain"
    lines = [
        f"committee   {summary['members']} members, {summary['committee']}; ranked by {summary['rank']}, {diverse}",
        f"labels      {summary['labels']}  ({summary['near_duplicates']} frames passed over as near-duplicates)",
        "",
        f"{'':>7}{'disagreement, meV/Å':>27}{'error on the test frames':>33}{'':>15}{'spread against error':>26}",
        f"{'labels':>7}{'selected':>9}{'remaining':>10}{'test':>8}"
        f"{'forces, meV/Å':>16}{'random':>9}{'energy, meV':>13}   {'AUROC F':>9}{'rank F':>8}{'rank E':>8}{'e/sd':>7}",
    ]
    for row in summary["rounds"]:
        lines.append(
            f"{row['labels']:>7}{milli(row['selected']):>9}{milli(row['remaining']):>10}{milli(row['disagreement']):>8}"
            f"{milli(row['force_error']):>16}{milli(row['random_force_error']):>9}{milli(row['energy_rmse']):>13}   "
            f"{plain(row['force_auroc']):>9}{plain(row['force_rank']):>8}{plain(row['energy_rank']):>8}{plain(row['energy_scale']):>7}"
        )
    if summary["stopped"]:
        lines += ["", f"stopped     {summary['stopped']}"]
    return "\n".join(line.rstrip() for line in lines)


def selection_figure(run_path: Path, out_png: Path) -> None:
    """Draw a selection, living or dead, into a PNG file."""
    found = read_selection(run_path)
    figure, panels = figures.blank(1, 3, (13.5, 4.4))
    _disagreement(panels[0], found)
    _learning(panels[1], found)
    _reliable(panels[2], found)
    figures.save(figure, panels, out_png)


def _disagreement(panel: figures.Axes, found: Selection) -> None:
    """Of what was taken and of what was left, before it was learnt."""
    rounds = found.chosen.rounds[1:]
    labels = found.chosen.labels[: len(rounds)]
    for name, colour, marker in (("selected", figures.RED, "o"), ("remaining", figures.BLUE, "s")):
        values = [1e3 * record[name] for record in rounds]
        panel.plot(labels, values, marker=marker, color=colour, label=name, markersize=5)
    ends = 1e3 * np.array([record["pool_quantiles"] for record in rounds]).reshape(-1, 3)
    panel.fill_between(labels, ends[:, 0], ends[:, 2], color=figures.BLUE, alpha=0.12, linewidth=0, label="5 to 95 % of the pool")
    figures.style(panel, "labels", "force disagreement / meV/Å", "Disagreement, round by round", log="y")


def _learning(panel: figures.Axes, found: Selection) -> None:
    """Error on the test frames against the number of labels, beside frames drawn by lot."""
    for number, arm in enumerate(found.baselines):
        name = "drawn by lot, same effort" if number == 0 else None
        panel.plot(arm.labels, 1e3 * arm.errors("force_error"), "x--", color=figures.GREY, label=name, markersize=5)
    panel.plot(
        found.chosen.labels, 1e3 * found.chosen.errors("force_error"), "o-", color=figures.RED, label="selected", markersize=5
    )
    figures.style(panel, "labels", "mean force error on the test frames / meV/Å", "What the labels teach", log="y")


def _reliable(panel: figures.Axes, found: Selection) -> None:
    """Of every test frame, after the last update."""
    test = found.chosen.tests[-1] if found.chosen.tests else {}
    error, spread = (1e3 * np.array(test.get(name, ())) for name in ("frame_force_error", "frame_disagreement"))
    reliability_panel(panel, error, spread, reliability(test, found) if test else {}, "test frame")
