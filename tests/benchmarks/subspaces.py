"""What sampling few weights gains and costs: `[ensemble] sampled = "all"`, "last-interaction", "readout" in one table each.

    python tests/benchmarks/subspaces.py times                        milliseconds, random models, no data needed
    python tests/benchmarks/subspaces.py quality --data ../shared/data
    python tests/benchmarks/subspaces.py replay  --data ../shared/data
    python tests/benchmarks/subspaces.py all     --data ../shared/data

times: 8 members of ethanol, small and medium model; a step of all chains with its update, an evaluation, and what a new label costs
once; ratios to "all" and, of an evaluation, over one member with all weights.
quality: held-out errors after 10 and 50 labels, the data sets and columns of `fine_tuning.py`, no calibration.
replay: ethanol with the SPICE foundation, frames of rMD17 one after the other through the product's policy, calibration and
updates (max_lag 0, no audits).  Every frame has a label, so the share of served frames that broke the promise is counted on all of
them.  The frames are independent draws from a trajectory at 500 K: they come without the neighbours in time that make dynamics easy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chain_update
import fine_tuning
import measure
import numpy as np
import torch
from replay import Run, facts, run_through
from trajectories import Trajectory

from bnn_driver.active.criteria import EnergyCriterion
from bnn_driver.active.policy import Policy
from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.loops.assembly import settle
from bnn_driver.loops.chain_update import Learner, TrainingLoss, update
from bnn_driver.potential.contract import Potential
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.potential.subspace import SubspacePotential
from bnn_driver.units import KCAL_PER_MOL

MODES = ("all", "last-interaction", "readout")
MEMBERS = 8
TIMES = (
    "model", "sampled", "dtype", "weights", "step_ms:.2f", "gain:.1f", "evaluation_ms:.1f", "gain_eval:.2f", "over_one:.1f",
    "new_label_ms:.0f",
)  # fmt: skip
QUALITY = (
    "data", "labels", "sampled", "E std:.3f", "F rmse:.3f", "z E:.2f", "z F:.2f", "auc E:.2f", "auc F:.2f", "cov E:.2f",
    "cov F:.2f", "s:.0f",
)  # fmt: skip
REPLAY = (
    "sampled", "steps", "asked", "late:.2f", "served", "beyond", "share:.3f", "low:.3f", "high:.3f", "error:.3f", "sd:.3f",
    "inflation:.2f", "discarded", "s:.0f",
)  # fmt: skip


def restricted(whole: StackedPotential, mode: str) -> Potential:
    """The potential of a mode."""
    return whole if mode == "all" else SubspacePotential(whole, mode)  # type: ignore[arg-type]


# ---- times


def times(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """A table of both models."""
    table = measure.Table(TIMES)
    dtype = getattr(torch, options.dtype)
    for size in ("small", "medium"):
        atoms = measure.SYSTEMS["ethanol"]()
        module = measure.random_model(size, measure.ALL_ELEMENTS, dtype)
        whole = chain_update.make_learner(module, atoms.numbers, "off")
        items = chain_update.labels(atoms, -3.0 * len(atoms))
        jobs: dict[str, Callable[[], object]] = {}
        found: dict[str, dict[str, Any]] = {}
        for mode in MODES:
            learner = Learner.around(restricted(whole.potential, mode), whole.noise, 0.5, whole.settings, 0)  # type: ignore[arg-type]
            theta = spread(learner)
            begin = time.process_time()
            TrainingLoss.build(learner, items[:1])
            found[mode] = {"weights": learner.layout.size, "new_label_ms": 1e3 * (time.process_time() - begin)}
            jobs[f"step {mode}"] = chain_update.OurChains(learner, theta, items).step
            jobs[f"evaluation {mode}"] = evaluation(learner, theta, atoms)
        jobs["one"] = evaluation(whole, spread(whole)[:1], atoms)
        ms = measure.interleaved(jobs, options.seconds, warm=2)
        for mode in MODES:
            step, evaluated = ms[f"step {mode}"], ms[f"evaluation {mode}"]
            gains = {
                "gain": ms["step all"] / step,
                "gain_eval": ms["evaluation all"] / evaluated,
                "over_one": evaluated / ms["one"],
            }
            row = {"model": size, "sampled": mode, "dtype": options.dtype, "step_ms": step, "evaluation_ms": evaluated}
            table.add(measure.rounded({**row, **found[mode], **gains}))
    rows += table.rows


def spread(learner: Learner) -> torch.Tensor:
    """Weights (M, D) of different members."""
    centre = learner.prior.centre
    noise = torch.randn(MEMBERS, len(centre), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return centre + 0.02 * noise.to(centre)


def evaluation(learner: Learner, theta: torch.Tensor, atoms: Any) -> Callable[[], object]:
    """One frame, as the driver evaluates it."""
    ensemble, frames = Ensemble(learner.potential, learner.layout.views(theta), 1, learner.noise), measure.distorted(atoms, 1)
    return lambda: ensemble.predict(frames)


# ---- quality


def quality(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Errors and their prediction on held-out frames."""
    print(f"{options.members} members, one update of {options.steps} steps of {options.step_size:g} from the foundation weights")
    table = measure.Table(QUALITY)
    for name in options.systems:
        whole, train, test = {"ethanol": fine_tuning.ethanol, "zundel": fine_tuning.zundel}[name](options.data)
        for n in options.labels:
            for mode in options.modes:
                learner = fine_tuning.make_learner(restricted(whole, mode), options.steps, 0.5, 1, options.step_size)
                start = fine_tuning.start(learner, options.members)
                first = float(fine_tuning.predict(learner, start, train.frames[0]).mean_energy[0])
                begin = time.perf_counter()
                after, _ = update(learner, start, train[slice(0, n)].labels(first), 0)
                seconds = time.perf_counter() - begin
                found = fine_tuning.predict(learner, after, test.frames)
                energy, forces = fine_tuning.errors(found.mean_energy, found.mean_forces, test)
                row = {"data": name, "labels": n, "sampled": mode, "steps": options.steps, "E std": energy, "F rmse": forces}
                table.add(measure.rounded({**row, **fine_tuning.trust(found, test), "s": seconds}))
    rows += table.rows


# ---- replay


def replay(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The loop of a run on frames that all have a label."""
    whole, train, _ = fine_tuning.ethanol(options.data)
    stream = train[slice(0, options.frames)]
    print(
        f"ethanol, {options.frames} frames, {options.members} members, accuracy {options.accuracy:g} kcal/mol; late: share asked of the "
        "last third; error: rms of served frames, sd: their mean predictive sd (kcal/mol), before calibration"
    )
    table = measure.Table(REPLAY)
    for mode in options.modes:
        steps = options.readout_steps if mode == "readout" and options.readout_steps else options.steps
        learner = fine_tuning.make_learner(
            restricted(whole, mode), steps, 0.5, 1, options.step_size, options.accuracy * KCAL_PER_MOL
        )
        begin = time.perf_counter()
        trajectory = Trajectory("ethanol", whole, stream, options.accuracy * KCAL_PER_MOL, np.inf)
        policy = Policy((EnergyCriterion(trajectory.accuracy),), 0.95, 0.0)
        run = Run(learner, trajectory, policy, options.members, 1, None)
        records = run_through(run, {"energy": GammaCalibration(1.5, 10.0)})
        row = facts(records, options.accuracy)
        asked = [r["criterion"] != "none" for r in records]
        row |= {"asked": sum(asked), "late": float(np.mean(asked[len(asked) * 2 // 3 :])), "discarded": row["diverged"]}
        row["sd"] = float(np.mean([r["sd"] for r in records if r["criterion"] == "none"] or [np.nan]))
        table.add(measure.rounded({"sampled": mode, "steps": steps, **row, "s": time.perf_counter() - begin}))
    rows += table.rows


def main() -> None:
    """The tables asked for."""
    parser = measure.arguments(__doc__, "float32")
    parser.add_argument("what", choices=["times", "quality", "replay", "all"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--systems", nargs="+", choices=["ethanol", "zundel"], default=["ethanol", "zundel"])
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--members", type=int, default=4, help="of quality and replay")
    parser.add_argument("--steps", type=int, default=300, help="per update; the product makes 2000")
    parser.add_argument("--readout-steps", type=int, help="per update of the readouts in the replay, where they are cheap")
    parser.add_argument("--step-size", type=float, default=1e-3)
    parser.add_argument("--frames", type=int, default=150, help="of the replay")
    parser.add_argument("--accuracy", type=float, default=1.0, help="kcal/mol, of the replay")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing per model")
    options = parser.parse_args()
    if options.what != "times" and options.data is None:
        parser.error("--data: expected the folder of models and labelled frames")
    settle(1)
    parts = {"times": times, "quality": quality, "replay": replay}
    rows: list[dict[str, Any]] = []
    for name in parts if options.what == "all" else [options.what]:
        parts[name](options, rows)
        measure.write_json(options.json, rows)


if __name__ == "__main__":
    main()
