"""How well the ensemble knows its errors: every candidate on every system, before and after calibration.

    python tests/benchmarks/uncertainty.py --data ../shared/data                        every candidate, 10 labels
    python tests/benchmarks/uncertainty.py --data ../shared/data --labels 5 10 20 50 100 --candidates published default
    python tests/benchmarks/uncertainty.py --table --picture uncertainty.png            from what is in the cache

One update from the foundation weights on the first labels of a shuffled pool, then the frames of the tests.  Units: kcal/mol and
kcal/mol/Å, stress GPa.  Errors of energies include the constant that the first label fixes, as in a run.  `before` is coverage of the
nominal 95 % interval with the predicted sd, `after` with the calibration of a run: ten pairs of those frames, out of a hundred unseen
ones of the pool, that have the largest sd (a run learns from frames that it asks for), judged on all frames of the test.
Every finished case is kept in the cache; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measure
import numpy as np
from candidates import CANDIDATES, Candidate, learner_of
from fine_tuning import predict, start
from function_prior import update_with_prior
from known import Known, shuffled
from laplace import fit, jacobian, sds
from shifts import KCAL, SHIFTS, Shift

from bnn_driver.active.criteria import EnergyCriterion, ForceCriterion
from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.bayes.laplace import LastLayer
from bnn_driver.bayes.scores import coverage, reliability, scores
from bnn_driver.loops.assembly import make_distances, settle
from bnn_driver.loops.chain_update import Learner, energy_offset, update
from bnn_driver.records import Array, Frames, Generation, Prediction

GPA = 1 / 160.21766
"""eV/Å^3."""
UNITS = {"E": KCAL, "F": KCAL, "S": GPA}
COLUMNS = (
    "system", "test:<12", "labels", "candidate:<24", "q", "rmse:.3f", "scale:.2f", "rank:.2f", "auroc:.2f", "attainable:.2f", "nll:.2f",
    "crps:.3f", "before:.2f", "after:.2f", "s:.0f",
)  # fmt: skip


def cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is asked for and not yet in the cache is computed and kept; returns the rows of everything asked for."""
    file = options.cache / "uncertainty.jsonl"
    done = read_rows(file)
    table = measure.Table(COLUMNS)
    rows = []
    for name in options.systems:
        shift = None
        for seed, n, candidate in [(s, n, c) for s in options.seeds for n in options.labels for c in options.candidates]:
            key = {
                "system": name,
                "labels": n,
                "candidate": candidate,
                "seed": seed,
                "steps": options.steps,
                "members": options.members,
            }
            found = [row for row in done if key.items() <= row.items()]
            if not found:
                shift = shift or SHIFTS[name](options.data, options.cache)
                if n > len(shift.pool):
                    continue
                found = [key | row for row in case(shift, candidate, n, seed, options)]
                options.cache.mkdir(parents=True, exist_ok=True)
                with file.open("a") as out:
                    out.writelines(json.dumps(row) + "\n" for row in found)
            for row in found:
                table.add(row)
            rows += found
    return rows


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Finished cases."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def case(shift: Shift, name: str, n: int, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one update: a test and a quantity each.  Args: name: of the candidate."""
    candidate = CANDIDATES[name]
    own = {} if "steps_per_update" in candidate.keys else {"steps_per_update": options.steps}
    settings = candidate.settings(members=options.members, **own)
    learner = learner_of(shift.potential, settings, shift.accuracy, seed)
    pool = shuffled(shift.pool, seed)
    kept = options.cache / f"{shift.name}-{n}-{candidate.base or name}-{seed}-{options.steps}-{options.members}.npz"
    begin = time.perf_counter()
    seen = pool[slice(n, n + 50)].frames if candidate.function_prior else None
    generation, offset, diverged = learnt(learner, pool, n, options.members, kept, seen)
    if diverged:  # a run would discard it
        return [{"test": "diverged", "q": "-", "s": time.perf_counter() - begin}]
    distances = make_distances(learner.potential, learner.noise, settings)
    if distances is not None:
        generation = distances.added(generation, [pool.label(i, {}) for i in range(n)])
    seconds = time.perf_counter() - begin
    believe = Believer.of(candidate, learner, generation, shift, pool[slice(0, n)], offset)
    energy, force = calibrated(shift, candidate, believe, pool[slice(n, n + 100)], offset)
    rows = []
    for test, parts in shift.tests.items():
        for q, (error, sd) in errors_of(believe, parts, offset).items():
            accuracy = {"E": shift.accuracy, "F": shift.force_accuracy, "S": GPA}[q]
            found = dataclasses.asdict(scores(error / UNITS[q], sd / UNITS[q], accuracy / UNITS[q]))
            calibration = energy if q == "E" else force
            inflated = calibration.scale(sd) if calibration else sd
            after = float(coverage(error, inflated, 0.95, calibration.dof)) if calibration else None
            bins = reliability(error / UNITS[q], sd / UNITS[q], min(8, max(1, len(error) // 5))).tolist()
            more = {"before": found["covered_95"], "after": after, "bins": bins, "s": seconds}
            rows.append({"test": test, "q": q} | measure.rounded(found) | more)
    return rows


def learnt(
    learner: Learner, pool: Known, n: int, members: int, kept: Path, seen: Frames | None
) -> tuple[Generation, float, bool]:
    """Weights after one update on the first n frames, eV that is added to every label's energy, and whether the update diverged.

    Args: kept: file of the weights, read where it exists.   seen: unlabelled frames of a prior on functions.
    """
    first = float(predict(learner, start(learner, 1), pool.frames[0]).mean_energy[0])
    labels = [pool.label(i, {"foundation_energy": first}) for i in range(n)]
    offset = energy_offset(labels[0])
    if kept.exists():
        with np.load(kept) as weights:
            return Generation(1, dict(weights), ()), offset, False
    if seen is None:
        generation, report = update(learner, start(learner, members), labels, 0)
        diverged = report.diverged
    else:
        generation, diverged = update_with_prior(learner, start(learner, members), labels, seen)
    if not diverged:
        np.savez(kept, **generation.weights)
    return generation, offset, diverged


@dataclasses.dataclass(frozen=True, eq=False)
class Believer:
    """Predictions with sds of a candidate's kind."""

    learner: Learner
    generation: Generation
    sds: str
    laplace: LastLayer | None

    @classmethod
    def of(
        cls, candidate: Candidate, learner: Learner, generation: Generation, shift: Shift, labels: Known, offset: float
    ) -> Believer:
        """The last-layer Laplace is fitted to the labels where it is wanted."""
        if candidate.sds == "spread" or labels.forces is None:
            return cls(learner, generation, "spread", None)
        found = predict(learner, start(learner, 1), labels.frames)
        b = len(labels)
        residual = np.c_[labels.energy + offset - found.mean_energy, (labels.forces - found.mean_forces).reshape(b, -1)]
        slopes = jacobian(shift.potential, labels.frames)
        fitted = fit(slopes, residual, learner.noise.energy_sd, learner.noise.force_base_sd)
        return cls(learner, generation, candidate.sds, fitted)

    def __call__(self, frames: Frames) -> tuple[Prediction, Array, Array]:
        """Prediction, sd of energies (B,) eV and of force components (B, A, 3) eV/Å."""
        p = predict(self.learner, self.generation, frames)
        if self.laplace is None:
            return p, p.energy_predictive_sd, p.force_predictive_sd
        energy, force = sds(self.laplace, jacobian(self.learner.potential, frames))
        noise = self.learner.noise
        if self.sds == "laplace":
            return p, np.hypot(energy, noise.energy_sd), np.hypot(force, noise.force_base_sd)
        return p, np.hypot(energy, p.energy_predictive_sd), np.hypot(force, p.force_predictive_sd)


def errors_of(believe: Believer, parts: list[Known], offset: float) -> dict[str, tuple[Array, Array]]:
    """Errors and predicted sds of all components, eV and Å.  Energies of several compositions: each up to its own constant."""
    found: dict[str, list[tuple[Array, Array]]] = {}
    for part in parts:
        p, energy_sd, force_sd = believe(part.frames)
        error = p.mean_energy - (part.energy + offset)
        found.setdefault("E", []).append((error - error.mean() if len(parts) > 2 else error, energy_sd))
        if part.forces is not None:
            found.setdefault("F", []).append(((p.mean_forces - part.forces).ravel(), force_sd.ravel()))
        if part.stress is not None and part.frames.cell is not None:
            found.setdefault("S", []).append(stress_errors(believe.learner, p, part))
    return {q: tuple(np.concatenate(column) for column in zip(*pairs, strict=True)) for q, pairs in found.items()}  # type: ignore[misc]


def stress_errors(learner: Learner, p: Prediction, part: Known) -> tuple[Array, Array]:
    """Errors of the stress and their sds, spread of the members and noise."""
    volume = np.abs(np.linalg.det(part.frames.cell))[:, None, None]
    members = -p.virial / volume
    sd = np.sqrt(members.var(axis=0, ddof=1) + learner.noise.stress_sd**2)
    return (members.mean(axis=0) - part.stress).ravel(), sd.ravel()


def calibrated(
    shift: Shift, candidate: Candidate, believe: Believer, unseen: Known, offset: float
) -> tuple[GammaCalibration | None, GammaCalibration | None]:
    """Calibrations of energy and force after ten pairs of the least certain frames; None where the pool has too few."""
    if len(unseen) < 20:
        return None, None
    p, energy_sd, force_sd = believe(unseen.frames)
    energy, force = candidate.calibration(), candidate.calibration()
    for i in np.argsort(energy_sd)[-10:]:
        context = {
            "predicted_energy": p.mean_energy[i], "energy_predictive_sd": energy_sd[i],
            "predicted_forces": p.mean_forces[i], "force_predictive_sd": force_sd[i],
        }  # fmt: skip
        item = unseen.label(int(i), context)
        energy = energy.observe(*EnergyCriterion(shift.accuracy).pair(item, offset))
        force = force.observe(*ForceCriterion(shift.force_accuracy).pair(item, offset))
    return energy, force


def summary(rows: list[dict[str, Any]]) -> None:
    """Means over seeds and tests of every candidate, a line for each number of labels."""
    print("\nmeans over systems (each the mean over its tests with labels of forces) and seeds")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["labels"], row["candidate"], row["q"]), []).append(row)
    table = measure.Table(("labels", "candidate:<24", "q", "systems", *COLUMNS[5:]))
    with_forces = {(row["system"], row["test"]) for row in rows if row["q"] == "F"}
    for (n, candidate, q), some in sorted(groups.items()):
        main = [row for row in some if (row["system"], row["test"]) in with_forces]
        systems = sorted({row["system"] for row in main})
        each = [[row for row in main if row["system"] == s] for s in systems]
        means = {c.partition(":")[0]: _mean([_mean([r.get(c.partition(":")[0]) for r in e]) for e in each]) for c in COLUMNS[5:]}
        table.add({"labels": n, "candidate": candidate, "q": q, "systems": len(systems), **means})


def _mean(values: list[Any]) -> float | None:
    known = [float(v) for v in values if v is not None and np.isfinite(v)]
    return float(np.mean(known)) if known else None


def main() -> None:
    """Tables and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of models and labelled frames")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/bnn-driver/benchmarks").expanduser())
    parser.add_argument("--systems", nargs="+", choices=list(SHIFTS), default=list(SHIFTS))
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--labels", type=int, nargs="+", default=[10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--table", action="store_true", help="only what is in the cache")
    parser.add_argument("--picture", type=Path, help="reliability before calibration, of published and default")
    options = parser.parse_args()
    if options.data is None and not options.table:
        parser.error("--data: expected the folder of models and labelled frames")
    settle(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    rows = read_rows(options.cache / "uncertainty.jsonl") if options.table else cases(options)
    summary(rows)
    if options.picture:
        from reliability import draw

        draw(rows, options.picture)


if __name__ == "__main__":
    main()
