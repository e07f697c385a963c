"""An exploration in numbers and in pictures: disagreement on fresh dynamics round by round, errors before labels are learnt, reliability."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.records import Array
from bnn_driver.report import figures
from bnn_driver.report.disagreement import judged_spread, last_stop, milli, plain, reliability_panel
from bnn_driver.store.files import read_json
from bnn_driver.store.run import RunDirectory, read_events


@dataclass(frozen=True, eq=False)
class Round:
    """What is there of one round."""

    screened: dict[str, Any]
    """As in screened_*.json."""
    chosen: dict[str, Any]
    """As in chosen_*.json; empty in the last round, and before."""
    labelled: dict[str, Any]
    """As in labelled_*.json, likewise."""
    walkers: list[dict[str, Any]]
    """How each ended."""
    by_lot: list[dict[str, Any]]
    """As in baseline/*/tested_*.json, of every baseline that has come to this round."""

    @property
    def lot_error(self) -> float | None:
        """eV/Å, at the audits, of weights that learnt as many frames by lot: mean over the baselines."""
        errors = [test["audit_error"] for test in self.by_lot if test["audit_error"] is not None]
        return float(np.mean(errors)) if errors else None


@dataclass(frozen=True, eq=False)
class Explored:
    """All that is reported of an exploration."""

    rounds: list[Round]
    along: dict[int, Array]
    """Generation -> (N,) eV/Å, disagreement of its weights on the frames of the first trajectory."""
    updates: dict[int, float]
    """Generation -> s."""
    facts: dict[str, Any]
    """Settings in use."""
    stopped: str | None

    @property
    def calibration(self) -> GammaCalibration:
        """Of energies, from what was predicted of the frames before they were learnt."""
        prior = self.facts["calibration"]
        found = GammaCalibration(prior["a"], prior["b"], prior["forgetting"])
        for one in self.rounds:
            if one.labelled and one.labelled["generation"]:
                found = found.observe(one.labelled["energy_error"], one.labelled["energy_sd"])
        return found

    def judged(self, name: str) -> Array:
        """(L,) of all labels that were predicted by members with a spread."""
        parts = [one.labelled[name] for one in self.rounds if one.labelled and one.labelled["generation"]]
        return np.array([x for part in parts for x in part], dtype=float)


def is_exploration(run_path: Path) -> bool:
    """Whether a run directory was made by `explore`."""
    return (Path(run_path) / "exploration").is_dir()


def read_exploration(run_path: Path) -> Explored:
    """Everything from a run directory, of a living or a dead run.  Raises: EnvironmentProblem when it is none or is damaged."""
    run = RunDirectory.existing(Path(run_path))
    folder = run.path / "exploration"
    rounds = []
    for file in sorted(folder.glob("screened_*.json")):
        number = file.stem.removeprefix("screened_")
        chosen, labelled = (_or_nothing(folder / f"{name}_{number}.json") for name in ("chosen", "labelled"))
        walkers = [read_json(path) for path in sorted((folder / f"round_{number}").glob("*.json"))]
        tests = [read_json(path) for path in sorted(folder.glob(f"baseline/*/tested_{number}.json"))]
        rounds.append(Round(read_json(file), chosen, labelled, walkers, tests))
    events = list(read_events(run.events_dir))
    updates = {event["generation"]: float(event["seconds"]) for event in events if event["kind"] == "update"}
    along = {
        int(path.stem.removeprefix("along_")): np.array(read_json(path)["force"]) for path in sorted(folder.glob("along_*.json"))
    }
    return Explored(rounds, along, updates, read_json(run.settings_file)["effective"], last_stop(events))


def _or_nothing(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(file) if file.exists() else {}
    return found


def exploration_summary(run_path: Path) -> dict[str, Any]:
    """Numbers of an exploration, ready for JSON; energies eV, forces eV/Å, times s.

    Errors are those of what was predicted before a frame was learnt; the audited frames are drawn by lot from fresh dynamics.
    """
    found = read_exploration(run_path)
    rows, labels = [], 0
    for number, one in enumerate(found.rounds):
        rows.append(
            {
                "round": number,
                "labels_before": labels,
                "frames": one.screened["frames"],
                "chosen": len(one.chosen.get("chosen", ())),
                "audited": one.labelled.get("audited", 0),
                "failed": len(one.labelled.get("failed", ())),
                "stopped_walkers": one.screened["stopped"],
                "fresh": one.screened["fresh"],
                "selected": one.chosen.get("selected"),
                "remaining": one.chosen.get("remaining"),
                "known": one.screened["known"],
                "uncertain": one.screened["uncertain"],
                "chosen_error": one.labelled.get("chosen_error"),
                "audit_error": one.labelled.get("audit_error"),
                "lot_error": one.lot_error,
                "lot_runs": len(one.by_lot),
                "foundation_error": one.labelled.get("foundation_error"),
                "beyond": one.labelled.get("beyond", {}),
                "beyond_at_most": one.labelled.get("beyond_at_most") if one.labelled.get("audited") else None,
                "seconds": {
                    "dynamics": max((walker["seconds"] for walker in one.walkers), default=0.0),  # they move at the same time
                    "labels": one.labelled.get("seconds", 0.0),
                    "learning": found.updates.get(one.screened["generation"], 0.0),
                },
            }
        )
        labels += len(one.labelled.get("labels", ()))
    along = {number: float(values.mean()) for number, values in found.along.items()}
    return {
        "labels": labels,
        "rank": found.facts["explore"]["rank"],
        "diversity": found.facts["explore"]["diversity"],
        "members": found.facts["ensemble"]["members"],
        "known_file": found.facts["explore"]["known"],
        "rounds": rows,
        "first_trajectory": {"before": _before(found), "after": along[max(along)] if along else None},
        **reliability(found),
        "stopped": found.stopped,
    }


def _before(found: Explored) -> float | None:
    """eV/Å, mean disagreement on the first trajectory of the first weights that have a spread."""
    values = _first_weights(found)
    return None if values is None else float(values.mean())


def _first_weights(found: Explored) -> Array | None:
    if found.rounds and found.rounds[0].screened["generation"]:
        return np.array(found.rounds[0].screened["force"])
    return found.along.get(1)


def reliability(found: Explored) -> dict[str, float | None]:
    """How the spread tells errors, over all labels that were predicted by members with a spread."""
    energy, sd = found.judged("energy_error"), found.judged("energy_sd") * found.calibration.inflation
    return judged_spread(found.judged("force_error"), found.judged("disagreement"), energy, sd, found.facts["accuracy"]["energy"])


def render_exploration(summary: dict[str, Any]) -> str:
    """The numbers of `exploration_summary` as a table for a terminal."""
    diverse = "with diversity" if summary["diversity"] else "the most uncertain"
    known = f"; {summary['known_file']} is known" if summary["known_file"] else ""
    lines = [
        f"members     {summary['members']}; frames ranked by {summary['rank']}, {diverse}{known}",
        f"labels      {summary['labels']}",
        "",
        f"{'':>27}{'disagreement, meV/Å':>37}{'force error before, meV/Å':>41}{'':>11}{'seconds':>27}",
        f"{'round':>5}{'labels':>7}{'frames':>8}{'chosen':>7}{'fresh':>9}{'chosen':>9}{'remaining':>10}{'known':>9}"
        f"{'chosen':>11}{'audits':>9}{'by lot':>9}{'foundation':>12}{'beyond':>11}{'dynamics':>11}{'labels':>8}{'learning':>10}",
    ]
    for row in summary["rounds"]:
        beyond = f"{max(row['beyond'].values())} of {row['audited']}" if row["audited"] else "-"
        seconds = row["seconds"]
        lines.append(
            f"{row['round']:>5}{row['labels_before']:>7}{row['frames']:>8}{row['chosen']:>7}{milli(row['fresh']):>9}"
            f"{milli(row['selected']):>9}{milli(row['remaining']):>10}{milli(row['known']):>9}{milli(row['chosen_error']):>11}"
            f"{milli(row['audit_error']):>9}{milli(row['lot_error']):>9}{milli(row['foundation_error']):>12}{beyond:>11}{seconds['dynamics']:>11.0f}"
            f"{seconds['labels']:>8.0f}{seconds['learning']:>10.0f}"
        )
        for name in row["stopped_walkers"]:
            lines.append(f"{'':>12}walker {name} left the sanity window")
        if row["failed"]:
            lines.append(f"{'':>12}{row['failed']} frames could not be labelled: see oracle/quarantine")
    first = summary["first_trajectory"]
    lines += [
        "",
        f"first trajectory: disagreement {milli(first['before'])} meV/Å of the first weights with a spread, "
        f"{milli(first['after'])} of the last",
        f"spread against error at labels: AUROC F {plain(summary['force_auroc'])}, rank F {plain(summary['force_rank'])}, rank E "
        f"{plain(summary['energy_rank'])}, e/sd {plain(summary['energy_scale'])}",
    ]
    if summary["stopped"]:
        lines += ["", f"stopped     {summary['stopped']}"]
    return "\n".join(line.rstrip() for line in lines)


def exploration_figure(run_path: Path, out_png: Path) -> None:
    """Draw an exploration, living or dead, into a PNG file."""
    found = read_exploration(run_path)
    figure, panels = figures.blank(2, 2, (11, 8.0))
    _trajectories(panels[0], found)
    _rounds(panels[1], found)
    _errors(panels[2], found)
    _reliable(panels[3], found)
    figures.save(figure, panels, out_png, columns=4)


def _trajectories(panel: figures.Axes, found: Explored) -> None:
    """Disagreement frame by frame: on the first trajectory, before and after; on the last one, of the last weights."""
    series: list[tuple[Array | None, str, str]] = [(_first_weights(found), figures.RED, "first trajectory, first weights")]
    if found.along:
        series.append((found.along[max(found.along)], figures.BLUE, "first trajectory, last weights"))
    if len(found.rounds) > 1:
        series.append((np.array(found.rounds[-1].screened["force"]), figures.GREEN, "fresh dynamics, last weights"))
    for values, colour, name in series:
        if values is not None and values.max(initial=0.0) > 0:
            panel.plot(np.arange(len(values)), 1e3 * values, "-", color=colour, label=name, linewidth=1)
    figures.style(panel, "frame, one walker after the other", "force disagreement / meV/Å", "Along the trajectories", log="y")


def _rounds(panel: figures.Axes, found: Explored) -> None:
    """What came from fresh dynamics in every round, what was taken of it, and the level of what is known."""
    labels = _labels_before(found)
    for name, colour, marker in (
        ("chosen", figures.RED, "o"),
        ("fresh dynamics", figures.GREEN, "s"),
        ("what is known", "black", "v"),
    ):
        key = {"chosen": "selected", "fresh dynamics": "fresh", "what is known": "known"}[name]
        values = [(one.chosen if key == "selected" else one.screened).get(key) for one in found.rounds]
        shown = [(x, 1e3 * y) for x, y in zip(labels, values, strict=True) if y]
        if shown:
            panel.plot(*zip(*shown, strict=True), marker=marker, color=colour, label=name, markersize=5)
    figures.style(panel, "labels", "mean force disagreement / meV/Å", "Round by round, before the round is learnt", log="y")


def _labels_before(found: Explored) -> Array:
    """(R,) labels that were learnt before each round."""
    counts = [len(one.labelled.get("labels", ())) for one in found.rounds]
    return np.cumsum([0, *counts])[: len(counts)]


def _errors(panel: figures.Axes, found: Explored) -> None:
    """Error at the frames of a round before they are learnt, against the labels that were."""
    labels = _labels_before(found)
    for key, colour, line, name in (
        ("chosen_error", figures.RED, "o-", "chosen"),
        ("audit_error", figures.ORANGE, "^-", "audits"),
        ("lot_error", figures.BLUE, "x--", "audits, learnt by lot"),
        ("foundation_error", figures.GREY, "x-", "audits, foundation model"),
    ):
        values = [one.lot_error if key == "lot_error" else one.labelled.get(key) for one in found.rounds]
        shown = [(x, 1e3 * y) for x, y in zip(labels, values, strict=True) if y]
        if shown:
            panel.plot(*zip(*shown, strict=True), line, color=colour, label=name, markersize=5)
    figures.style(panel, "labels", "mean force error / meV/Å", "Error before a frame is learnt", log="y")


def _reliable(panel: figures.Axes, found: Explored) -> None:
    """Of every labelled frame."""
    error, spread = 1e3 * found.judged("force_error"), 1e3 * found.judged("disagreement")
    reliability_panel(panel, error, spread, reliability(found) if len(error) else {}, "labelled frame")
