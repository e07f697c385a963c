"""Time and peak memory against atoms, members, beads and labels, with fitted exponents; each point in a process of its own.

    python tests/benchmarks/scaling.py [--quick | --full] [--axes atoms members beads labels] [--json FILE]

atoms: one member on one frame of a periodic box of water.   members, beads: ethanol, the small model.   labels: ms of a chain step
(8 chains, minibatch 5, ethanol) and of building the training graphs (`build_ms`).   Alternative: i-PI's BatchedMACE with as many
models, 89 elements, where it is cheap enough; for labels none.   `floor_ms`: the matrix products of ours alone.
`peak_mb`: the process's largest resident memory, `base_mb` before the first evaluation.   The exponent n of t ~ x^n is fitted to the
upper half of the points; `--full` adds the expensive ones.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import measure
import numpy as np
import torch
from chain_update import OurChains, labels, make_learner
from ensemble_inference import VARIETY, batched_mace, estimate, predictor

from bnn_driver.loops.assembly import settle
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.params import repeat_weights

Point = dict[str, Any]
COLUMNS = (
    "axis", "system", "model", "atoms", "members", "frames", "labels", "ours_ms:.2f", "alternative_ms:.1f", "ratio:.1f", "floor_ms:.2f",
    "build_ms:.2f", "peak_mb:.0f", "base_mb:.0f", "their_peak_mb:.0f",
)  # fmt: skip
SECONDS_LIMIT = 5.0
"""Of one call of the alternative."""


def points(axis: str, quick: bool, full: bool) -> list[Point]:
    """The points of one axis."""
    base = {
        "axis": axis,
        "system": "ethanol",
        "model": "small",
        "atoms": 9,
        "members": 8,
        "frames": 1,
        "labels": None,
    }
    if axis == "atoms":
        small = [12, 192] if quick else [12, 48, 192, 750, 2001]
        medium = [] if quick else [12, 48, 96, 192] if full else [12, 48, 96]
        sizes = [("small", n) for n in small] + [("medium", n) for n in medium]
        return [base | {"system": "water", "model": size, "atoms": n, "members": 1} for size, n in sizes]
    if axis == "members":
        return [base | {"members": n} for n in ([1, 8] if quick else [1, 2, 4, 8, 16])]
    if axis == "beads":
        return [base | {"frames": n} for n in ([1, 16] if quick else [1, 4, 16, 64])]
    return [base | {"labels": n, "frames": 5} for n in ([100] if quick else [1, 10, 100, 1000])]


# ---- the process of one point


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def evaluation(point: Point, who: str, dtype: torch.dtype, compile: str) -> dict[str, float]:
    """Milliseconds of one call."""
    atoms = measure.water(point["atoms"] // 3) if point["system"] == "water" else measure.SYSTEMS["ethanol"]()
    sets = [measure.distorted(atoms, point["frames"], seed) for seed in range(VARIETY)]
    if who == "theirs":
        call = batched_mace(measure.committee(point["model"], atoms.numbers, point["members"], dtype), atoms, sets)
        return timed(call)
    module = measure.random_model(point["model"], sorted(set(atoms.numbers)), dtype)
    potential = measure.our_potential(module, atoms.numbers, compile)
    weights = repeat_weights(potential.weights, point["members"])
    found = timed(predictor(Ensemble(potential, weights, 1, None), sets))
    eager = measure.our_potential(module, atoms.numbers)
    products = measure.products_of(predictor(Ensemble(eager, weights, 1, None), sets))
    return found | {"floor_ms": timed(products)["ms"]}


def chain_step(point: Point, dtype: torch.dtype, compile: str) -> dict[str, float]:
    """Milliseconds of one step per chain, and of building the graphs of all labels."""
    atoms = measure.SYSTEMS["ethanol"]()
    learner = make_learner(measure.random_model(point["model"], sorted(set(atoms.numbers)), dtype), atoms.numbers, compile)
    items = labels(atoms, -3.0 * len(atoms), point["labels"])
    start = learner.prior.centre[None].repeat(point["members"], 1)
    builds = []
    for _ in range(3):
        begin = time.process_time()
        chains = OurChains(learner, start, items)
        builds.append(1e3 * (time.process_time() - begin))
    found = timed(chains.step)
    return found | {"ms": found["ms"] / point["members"], "build_ms": float(np.median(builds))}


def timed(call: Callable[[], object]) -> dict[str, float]:
    """Median CPU milliseconds, and the memory before and after."""
    base = peak_mb()
    begin = time.perf_counter()
    call()
    slow = time.perf_counter() - begin > 3.0  # TorchScript is slow in its first two calls
    ms = measure.interleaved({"it": call}, 1.5, least=2, warm=1 if slow else 3)["it"]
    return {"ms": ms, "base_mb": base, "peak_mb": peak_mb()}


def child(options: argparse.Namespace) -> None:
    """Measure one point and print it as JSON."""
    point, dtype = json.loads(options.point), getattr(torch, options.dtype)
    found = (
        chain_step(point, dtype, options.compile) if point["labels"] else evaluation(point, options.who, dtype, options.compile)
    )
    print("\n" + json.dumps(found))


# ---- the table


def in_own_process(point: Point, who: str, options: argparse.Namespace) -> dict[str, float]:
    """The result of one point.  Raises: SystemExit with the end of its error output."""
    command = [sys.executable, __file__, "--point", json.dumps(point), "--who", who, "--dtype", options.dtype]
    done = subprocess.run([*command, "--compile", options.compile], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{who} at {point}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def affordable(point: Point, options: argparse.Namespace) -> bool:
    """Whether the alternative is measured at this point."""
    if point["labels"] or options.quick:
        return False
    atoms = measure.water(point["atoms"] // 3) if point["system"] == "water" else measure.SYSTEMS["ethanol"]()
    seconds, memory = estimate(point["model"], atoms, point["frames"], point["members"], getattr(torch, options.dtype))
    cheap = seconds < (1e9 if options.full else SECONDS_LIMIT) and memory < measure.free_gib()
    if not cheap:
        print(f"alternative left out: about {seconds:.0f} s and {memory:.1f} GiB a call (limits {SECONDS_LIMIT:g} s)")
    return cheap


def measured(point: Point, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    ours = in_own_process(point, "ours", options)
    row = point | {"dtype": options.dtype, "compile": options.compile, "ours_ms": ours.pop("ms"), **ours}
    row |= {"alternative": None, "alternative_ms": None, "ratio": None, "single_ms": None, "over_one_member": None}
    if affordable(point, options):
        theirs = in_own_process(point, "theirs", options)
        row |= {"alternative": "i-PI BatchedMACE", "alternative_ms": theirs["ms"], "their_peak_mb": theirs["peak_mb"]}
        row["ratio"] = theirs["ms"] / row["ours_ms"]
    return measure.rounded(row)


def exponents(rows: Sequence[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """Slopes of log time and log memory over the upper half of the points."""
    key = {"beads": "frames"}.get(axis, axis)
    found = []
    for size in dict.fromkeys(row["model"] for row in rows):
        group = [row for row in rows if row["model"] == size]
        upper = group[min(len(group) // 2, len(group) - 2) :] if len(group) > 1 else []
        fit: dict[str, Any] = {"axis": axis, "model": size, "from": upper[0][key] if upper else None}
        for name in ("ours_ms", "alternative_ms", "build_ms"):
            pairs = [(row[key], row[name]) for row in upper if row.get(name)]
            if len(pairs) > 1:
                fit[name] = float(np.polyfit(*np.log(np.array(pairs, dtype=float)).T, 1)[0])
        found.append(measure.rounded(fit))
    return found


def main() -> None:
    """One table, then the exponents."""
    parser = measure.arguments(__doc__)
    axes = ["atoms", "members", "beads", "labels"]
    parser.add_argument("--axes", nargs="+", choices=axes, default=axes)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--who", choices=["ours", "theirs"], default="ours", help=argparse.SUPPRESS)
    options = parser.parse_args()
    settle(1)
    if options.point:
        child(options)
        return
    table, fits = measure.Table(COLUMNS), []
    for axis in options.axes:
        rows = []
        for point in points(axis, options.quick, options.full):
            rows.append(measured(point, options))
            table.add(rows[-1])
        fits += exponents(rows, axis)
    for fit in fits:
        print("exponents:", ", ".join(f"{name} {value}" for name, value in fit.items()))
    measure.write_json(options.json, [*table.rows, *({"exponents": fit} for fit in fits)])


if __name__ == "__main__":
    main()
