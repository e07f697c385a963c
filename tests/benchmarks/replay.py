"""Replayed on-the-fly runs: trajectories with known labels through the real policy, calibration and updates of the chains.

    python tests/benchmarks/replay.py --data ../shared/data                      labels spent and realised exceedance
    python tests/benchmarks/replay.py --data ../shared/data early                the first thirty decisions of ten runs
    python tests/benchmarks/replay.py --data ../shared/data events               do labels fall into changes of conformer?
    python tests/benchmarks/replay.py --data ../shared/data screen               other calibrations on the same predictions

Every frame is predicted, judged, and either learnt (then the chains move before the next frame is judged, max_lag 0) or served; a
served frame's label is only used to see whether the promise held.  With `--audit` that share of the served frames is learnt besides,
as in a run.  `late`: exceedance of frames served after the tenth label.  Finished runs are kept in the cache.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before tblite starts its threads

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
from calibrations import ByRegime, Conformal, PowerLaw
from candidates import CANDIDATES, learner_of
from fine_tuning import start
from scipy.stats import binom
from shifts import KCAL
from trajectories import ACCURACY, TRAJECTORIES, Trajectory, conformer

from bnn_driver.active.criteria import Calibration, EnergyCriterion, ForceCriterion
from bnn_driver.active.policy import Policy
from bnn_driver.bayes.calibration import GammaCalibration, clopper_pearson
from bnn_driver.bayes.laplace import energy_sd
from bnn_driver.loops.assembly import make_distances, settle
from bnn_driver.loops.chain_update import Learner, energy_offset, update
from bnn_driver.loops.distance import Distances
from bnn_driver.loops.seeds import uniform
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.records import Array, Generation, LabelledFrame

AHEAD = 40
"""Frames predicted at once; those behind an asked one are predicted again."""
COLUMNS = (
    "trajectory:<12", "candidate:<24", "seed", "frames", "labels", "asked_beyond", "audits", "beyond", "served", "share:.3f", "low:.3f",
    "high:.3f", "late:.3f", "error:.3f", "error_F:.2f", "inflation:.2f", "diverged", "s:.0f",
)  # fmt: skip


OTHERS: dict[str, Callable[[float], Calibration]] = {
    "a 1.5, b 10": lambda accuracy: GammaCalibration(1.5, 10.0),
    "a 2, b 5": lambda accuracy: GammaCalibration(2.0, 5.0),
    "a 1, b 1.5": lambda accuracy: GammaCalibration(1.0, 1.5),
    "a 2, b 5, .95": lambda accuracy: GammaCalibration(2.0, 5.0, 0.95),
    "a 2, b 5, .9": lambda accuracy: GammaCalibration(2.0, 5.0, 0.9),
    "a 1, b 1.5, .95": lambda accuracy: GammaCalibration(1.0, 1.5, 0.95),
    "a 1, b 1.5, .9": lambda accuracy: GammaCalibration(1.0, 1.5, 0.9),
    "by regime": lambda accuracy: ByRegime(GammaCalibration(1.0, 1.5), accuracy / 4),
    "power of sd": lambda accuracy: PowerLaw.around(GammaCalibration(1.0, 1.5), accuracy / 4),
    "conformal": lambda accuracy: Conformal(GammaCalibration(1.0, 1.5)),
}
"""Calibrations by name.  Args: accuracy: kcal/mol."""


@dataclass(frozen=True)
class Run:
    """A replay under way; the parts that do not change."""

    learner: Learner
    trajectory: Trajectory
    policy: Policy
    members: int
    seed: int
    distances: Distances | None


def run_through(run: Run, calibrations: Mapping[str, Calibration]) -> list[dict[str, Any]]:
    """One record per frame: what was believed, what was decided, how wrong it was (kcal/mol, kcal/mol/Å)."""
    frames, learner = run.trajectory.frames, run.learner
    foundation = Ensemble(learner.potential, start(learner, 1).weights, 0, learner.noise)
    first = float(foundation.predict(frames.frames[0]).mean_energy[0])
    generation = start(learner, run.members)
    ensemble = Ensemble(learner.potential, generation.weights, 0, learner.noise, distance=energy_sd)
    labels: list[LabelledFrame] = []
    records: list[dict[str, Any]] = []
    here = 0
    while here < len(frames):
        ahead = slice(here, min(here + AHEAD, len(frames))) if labels else slice(here, here + 1)
        prediction = ensemble.predict(frames.frames[ahead])
        draws = np.array([uniform(run.seed, "audit", i) for i in range(ahead.start, ahead.stop)])
        decisions = run.policy.judge(prediction, frames.frames[ahead], calibrations, draws, first=not labels)
        for b, decision in enumerate(decisions):
            item = frames.label(here, {
                "criterion": decision.criterion, "generation": prediction.generation, "audit": not decision.ask,
                "predicted_energy": float(prediction.mean_energy[b]), "energy_predictive_sd": decision.energy_predictive_sd,
                "predicted_forces": prediction.mean_forces[b], "force_predictive_sd": prediction.force_predictive_sd[b],
                "foundation_energy": first,
            })  # fmt: skip
            offset = energy_offset(labels[0] if labels else item)
            energy = calibrations["energy"]
            records.append({
                "frame": here, "criterion": decision.criterion, "probability": decision.probability,
                "sd": decision.energy_predictive_sd / KCAL, "error": (item.context["predicted_energy"] - item.label.energy - offset) / KCAL,
                "error_F": float(np.sqrt(np.mean((prediction.mean_forces[b] - item.label.forces) ** 2))) / KCAL,
                "inflation": getattr(energy, "inflation", None), "labels": len(labels), "atom": decision.atom,
            })  # fmt: skip
            here += 1
            if decision.criterion == "none":
                continue
            labels.append(item)
            calibrations = run.policy.observe(calibrations, item, offset)
            generation, diverged = learnt(learner, generation, labels)
            records[-1]["diverged"] = diverged
            told = generation if run.distances is None else run.distances.added(generation, labels)
            ensemble.swap(told.weights, generation.number)
            break
    return records


def learnt(learner: Learner, previous: Generation, labels: Sequence[LabelledFrame]) -> tuple[Generation, int]:
    """The next generation and the number of attempts that diverged; the old weights stay when both did."""
    for attempt in range(2):
        generation, report = update(learner, previous, labels, attempt)
        if not report.diverged:
            return generation, attempt
    return replace(previous, label_ids=tuple(item.label.frame_id for item in labels)), 2


def facts(records: list[dict[str, Any]], accuracy: float) -> dict[str, Any]:
    """The figures of one replay.  Args: accuracy: kcal/mol."""
    served = [r for r in records if r["criterion"] in ("none", "audit")]
    beyond = [abs(r["error"]) >= accuracy for r in served]
    late = [abs(r["error"]) >= accuracy for r in served if r["labels"] >= 10]
    asked = [r for r in records if r["criterion"] in ("energy", "force")]
    low, high = clopper_pearson(sum(beyond), len(beyond), 0.95)
    return {
        "frames": len(records), "labels": len(records) - sum(r["criterion"] == "none" for r in records),
        "audits": sum(r["criterion"] == "audit" for r in records), "asked_beyond": sum(abs(r["error"]) >= accuracy for r in asked),
        "served": len(served), "beyond": sum(beyond), "share": float(np.mean(beyond)) if beyond else None, "low": low, "high": high,
        "late": float(np.mean(late)) if late else None, "error": _rms([r["error"] for r in served]),
        "error_F": _rms([r["error_F"] for r in served]), "inflation": records[-1]["inflation"],
        "diverged": sum(r.get("diverged", 0) for r in records),
    }  # fmt: skip


def _rms(values: list[float]) -> float | None:
    return float(np.sqrt(np.mean(np.square(values)))) if values else None


def replayed(name: str, candidate: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One replay, from the cache or made now: its key, seconds and records."""
    key = {
        "trajectory": name, "candidate": candidate, "seed": seed, "steps": options.steps, "members": options.members,
        "audit": options.audit, "confidence": options.confidence, "forces": options.forces, "frames": options.frames,
    }  # fmt: skip
    file = options.cache / "replays.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for found in kept:
        if key.items() <= found.items():
            return dict(found)
    begin = time.perf_counter()
    records = run_through(*make_run(name, candidate, seed, options))
    found = key | {"records": records, "s": time.perf_counter() - begin}
    with file.open("a") as out:
        out.write(json.dumps(found) + "\n")
    return found


def make_run(name: str, candidate: str, seed: int, options: argparse.Namespace) -> tuple[Run, dict[str, Calibration]]:
    """The parts of a replay and its calibrations before the first frame."""
    trajectory = TRAJECTORIES[name](options.data, options.cache, seed)
    if options.frames:
        trajectory = replace(trajectory, frames=trajectory.frames[slice(0, options.frames)])
    chosen = CANDIDATES[candidate]
    settings = chosen.settings(members=options.members, steps_per_update=options.steps)
    learner = learner_of(trajectory.potential, settings, trajectory.accuracy, seed)
    criteria: tuple[EnergyCriterion | ForceCriterion, ...] = (EnergyCriterion(trajectory.accuracy),)
    if options.forces:
        criteria = (*criteria, ForceCriterion(trajectory.force_accuracy))
    policy = Policy(criteria, options.confidence, options.audit)
    distances = make_distances(learner.potential, learner.noise, settings)
    return Run(learner, trajectory, policy, options.members, seed, distances), {c.name: chosen.calibration() for c in criteria}


def runs(options: argparse.Namespace) -> None:
    """The table of labels and exceedance, and its sums over seeds."""
    table = measure.Table(COLUMNS)
    for name in options.trajectories:
        accuracy = ACCURACY[name]
        for candidate in options.candidates:
            each = []
            for seed in options.seeds:
                found = replayed(name, candidate, seed, options)
                each.append(facts(found["records"], accuracy))
                table.add({"trajectory": name, "candidate": candidate, "seed": seed, "s": found["s"], **each[-1]})
            if len(each) > 1:
                beyond, served = sum(e["beyond"] for e in each), sum(e["served"] for e in each)
                low, high = clopper_pearson(beyond, served, 0.95)
                means = {
                    k: float(np.mean([e[k] for e in each if e[k] is not None])) for k in ("error", "error_F", "inflation", "late")
                }
                sums = {k: sum(e[k] for e in each) for k in ("frames", "labels", "audits", "asked_beyond", "diverged")}
                total = {"beyond": beyond, "served": served, "share": beyond / max(1, served), "low": low, "high": high}
                table.add({"trajectory": name, "candidate": candidate, "seed": "all", **sums, **total, **means})


def early(options: argparse.Namespace) -> None:
    """The first thirty decisions: `A` asked and beyond, `a` asked, `.` served, `!` served though beyond, `*` first, `u` audit."""
    for name in options.trajectories:
        accuracy = ACCURACY[name]
        for candidate in options.candidates:
            wrong = served = 0
            for seed in options.seeds:
                records = replayed(name, candidate, seed, options)["records"][:30]
                signs = [_sign(r, accuracy) for r in records]
                wrong, served = wrong + signs.count("!"), served + signs.count("!") + signs.count(".")
                inflation = [r["inflation"] for r in records if r["criterion"] not in ("none", "first")][:4]
                print(
                    f"{name:<12} {candidate:<24} {seed:>2}  {''.join(signs)}  inflation at the first asked",
                    np.round(inflation, 2),
                )
            low, high = clopper_pearson(wrong, served, 0.95)
            print(f"{'':<12} served beyond the accuracy: {wrong} of {served} ({100 * low:.1f} to {100 * high:.1f} %)", flush=True)


def screen(options: argparse.Namespace) -> None:
    """What other calibrations would have decided on the predictions of the replays, which stay those of the labels really learnt."""
    table = measure.Table(("trajectory:<12", "candidate:<24", "calibration:<16", "asked", "served", "beyond", "share:.3f"))
    for name in options.trajectories:
        accuracy = ACCURACY[name]
        for candidate in options.candidates:
            each = [replayed(name, candidate, seed, options)["records"] for seed in options.seeds]
            for kind, make in OTHERS.items():
                asked, served, beyond = np.sum([judged(records, make(accuracy), accuracy) for records in each], axis=0)
                row = {"trajectory": name, "candidate": candidate, "calibration": kind, "asked": asked, "served": served}
                table.add(row | {"beyond": beyond, "share": beyond / max(1, served)})


def judged(records: list[dict[str, Any]], calibration: Calibration, accuracy: float) -> tuple[int, int, int]:
    """Frames that would have been asked and served, and served though beyond, with the pairs of the frames really asked."""
    asked = served = beyond = 0
    for r in records:
        if r["criterion"] == "first":
            continue
        if float(calibration.probability_exceeds(np.array([r["sd"]]), accuracy)[0]) > 0.05:
            asked += 1
        else:
            served, beyond = served + 1, beyond + (abs(r["error"]) >= accuracy)
        if r["criterion"] != "none":
            calibration = calibration.observe(r["error"], r["sd"])
    return asked, served, beyond


def _sign(record: Mapping[str, Any], accuracy: float) -> str:
    beyond = abs(record["error"]) >= accuracy
    kind = record["criterion"]
    return {"first": "*", "audit": "U" if beyond else "u", "none": "!" if beyond else "."}.get(kind, "A" if beyond else "a")


def events(options: argparse.Namespace) -> None:
    """Share of labels in windows around changes of conformer against their share of time, one-sided exact test over all runs."""
    for candidate in options.candidates:
        inside, chances = 0, []
        for seed in options.seeds:
            trajectory = TRAJECTORIES["ethanol"](options.data, options.cache, seed)
            frames = trajectory.frames[slice(0, options.frames or len(trajectory.frames))]
            window = windows(conformer(frames.frames.positions), round(options.window / (trajectory.interval or 1.0)))
            asked = [
                r["frame"]
                for r in replayed("ethanol", candidate, seed, options)["records"]
                if r["criterion"] in ("energy", "force")
            ]
            inside += int(window[asked].sum())
            chances += [float(window.mean())] * len(asked)
            print(
                f"ethanol {candidate:<24} run {seed}: windows are {window.mean():.1%} of the time and hold "
                f"{int(window[asked].sum())} of {len(asked)} labels"
            )
        p = exact_tail(inside, chances)
        expected = sum(chances)
        print(
            f"ethanol {candidate:<24} all: {inside} of {len(chances)} labels in windows, {expected:.1f} expected, p = {p:.2g}",
            flush=True,
        )


def windows(state: Array, half: int) -> Array:
    """True for frames within `half` frames of a change of state.  Args: state: (B,) int.   Returns: (B,)."""
    near = np.zeros(len(state), dtype=bool)
    for k in np.flatnonzero(np.diff(state)):
        near[max(0, k + 1 - half) : k + 1 + half] = True
    return near


def exact_tail(inside: int, chances: Sequence[float]) -> float:
    """P(as many or more inside) when every label falls inside with the chance of its own run's time: sum of binomials, convolved."""
    law = np.ones(1)
    for chance in sorted(set(chances)):
        n = sum(c == chance for c in chances)
        law = np.convolve(law, binom.pmf(np.arange(n + 1), n, chance))
    return float(law[inside:].sum())


def main() -> None:
    """The table asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["runs", "early", "events", "screen"], default="runs")
    parser.add_argument("--data", type=Path, required=True, help="folder of models and labelled frames")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/bnn-driver/benchmarks").expanduser())
    parser.add_argument("--trajectories", nargs="+", choices=list(TRAJECTORIES), default=list(TRAJECTORIES))
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=["published", "default"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200, help="of the chains per label")
    parser.add_argument("--frames", type=int, default=0, help="of each trajectory; 0: all")
    parser.add_argument("--audit", type=float, default=0.0)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--forces", action="store_true", help="a criterion on the forces too")
    parser.add_argument("--window", type=float, default=50.0, help="fs on either side of a change")
    options = parser.parse_args()
    settle(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    {"runs": runs, "early": early, "events": events, "screen": screen}[options.what](options)


if __name__ == "__main__":
    main()
