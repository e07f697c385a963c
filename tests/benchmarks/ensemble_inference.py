"""Milliseconds of the ensemble, end to end: positions in, mean energies, forces and virials of 8 members out as numpy arrays.

    python tests/benchmarks/ensemble_inference.py [--quick | --full] [--dtype float64] [--device cuda] [--json FILE]

Ours: `Ensemble.predict` as the driver calls it, positions changed a little in each call.  Alternatives:
`i-PI`: i-PI's own batched driver class `ipi.pes._mace.BatchedMACE` with the same models as a committee, as shipped (89 elements);
`i-PI pruned`: the same with models that know only the elements of the system, which anybody can have (`pruning` is its gain);
`cueq`: i-PI's class as shipped with mace's conversion to cuEquivariance, on a GPU where the package is installed;
`modules`: mace's own modules, pruned, one after the other on our neighbour list (`path="modules"`).
`chunk`: members evaluated together, as the program chooses.  `over_one_member`: our 8 members over one of ours.
All keep freed memory (`planning.keep_freed_memory`), from which the alternatives gain as well.
`floor`: the matrix products of our evaluation alone, forward and backward, same shapes and strides, operands ready: no
arrangement of the rest can be quicker unless it has fewer or other products.
`gflop`, `gb`, `of_roofline`: counted work of the plain code, and the least possible time over ours, see `roofline.py`.
Cases whose estimate is too long or too large are left out, with the estimate.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import measure
import numpy as np
import roofline
import torch
from ase import Atoms
from torch import nn

from bnn_driver.loops.assembly import settle
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.factory import make_potential
from bnn_driver.records import Frames

Result = tuple[np.ndarray, np.ndarray, np.ndarray]
Call = Callable[[], Result]
QUICK = {("small", "ethanol", 1), ("small", "ethanol", 8), ("small", "crystal40", 1), ("medium", "ethanol", 1)}
LIMITS = {"small": 2.5, "medium": 9.0}
"""Seconds of a call of i-PI's class beyond which a case is left to --full."""
GPU_SHARE = 0.05
"""Guessed time of i-PI's class on a GPU over that on one core, for the estimates alone."""
VARIETY = 5
"""Sets of positions through which the calls go."""
COLUMNS = (
    "system", "model", "members", "frames", "dtype", "ours_ms:.1f", "chunk", "alternative_ms:.1f", "ratio:.1f", "pruned_ms:.1f", "pruning:.2f",
    "cueq_ms:.1f", "modules_ms:.1f", "single_ms:.1f", "over_one_member:.2f", "floor_ms:.1f", "gflop:.3g", "gb:.3g", "gb_least:.2g",
    "of_roofline:.3f", "max_dE:.0e", "max_dF:.0e", "max_dW:.0e",
)  # fmt: skip


@dataclass(frozen=True)
class Contenders:
    """The same members in every form, for one system."""

    ours: Ensemble
    single: Ensemble
    eager: Ensemble
    modules: Ensemble
    shipped: list[nn.Module]
    pruned: list[nn.Module]


def contenders(
    size: str, atoms: Atoms, members: int, dtype: torch.dtype, compile: str, device: torch.device = measure.CPU
) -> Contenders:
    """Random members, pruned and not."""
    numbers = atoms.numbers
    shipped = measure.committee(size, numbers, members, dtype)
    few = measure.pruned(shipped, size, numbers)
    eager = measure.our_potential(shipped[0], numbers, device=device)
    fast = eager if compile == "off" else measure.our_potential(shipped[0], numbers, compile, device)
    slow = make_potential(copy.deepcopy(few[0]), numbers.tolist(), dtype, device, path="modules")
    weights, slow_weights = measure.our_weights(shipped, numbers), measure.our_weights(few, numbers)
    one = {name: x[:1] for name, x in weights.items()}
    return Contenders(
        Ensemble(fast, weights, 1, None),
        Ensemble(fast, one, 1, None),
        Ensemble(eager, weights, 1, None),
        Ensemble(slow, slow_weights, 1, None),
        shipped,
        few,
    )


def predictor(ensemble: Ensemble, sets: Sequence[Frames]) -> Call:
    """Our evaluation of the next set of positions."""
    turn = itertools.cycle(sets)

    def call() -> Result:
        prediction = ensemble.predict(next(turn))
        return prediction.mean_energy, prediction.mean_forces, prediction.mean_virial

    return call


def batched_mace(
    modules: Sequence[nn.Module], atoms: Atoms, sets: Sequence[Frames], device: torch.device = measure.CPU, cueq: bool = False
) -> Call:
    """i-PI's evaluation of the next set of positions, as its driver does it after the conversion of units.

    Args: cueq: with mace's own conversion to cuEquivariance.
    """
    from ipi.pes._mace import BatchedMACE

    dtype = str(next(modules[0].parameters()).dtype).removeprefix("torch.")
    with contextlib.redirect_stdout(io.StringIO()):
        models = copy.deepcopy(list(modules))
        calculator = BatchedMACE(models=models, device=device.type, default_dtype=dtype, enable_cueq=cueq)
    template = atoms.copy()
    if not atoms.pbc.all():
        template.cell = 30.0 * np.eye(3)
    template.pbc = True
    templates = [template.copy() for _ in sets[0].positions]
    turn = itertools.cycle(sets)

    def call() -> Result:
        for structure, positions in zip(templates, next(turn).positions, strict=True):
            structure.set_positions(positions)
        with contextlib.redirect_stdout(io.StringIO()):
            found = calculator.compute_batched(templates)
        energy = np.array([one["energy"] for one in found])
        stress = np.array([one["stress"] for one in found])
        return energy, np.array([one["forces"] for one in found]), -stress * template.get_volume()

    return call


def with_cueq(made: Contenders, atoms: Atoms, sets: Sequence[Frames]) -> dict[str, Call]:
    """i-PI's class with cuEquivariance, where there is a GPU and the package and it runs."""
    device = made.eager.potential.device
    if device.type != "cuda" or importlib.util.find_spec("cuequivariance_torch") is None:
        return {}
    try:
        call = batched_mace(made.shipped, atoms, sets, device, cueq=True)
        call()
    except Exception as error:  # whatever the package raises where its kernels do not fit the GPU
        print(f"no cueq column: {type(error).__name__}: {error!s:.300}")
        return {}
    return {"cueq": call}


def estimate(size: str, atoms: Atoms, frames: int, members: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds and GiB of one call of i-PI's class."""
    cost, share = measure.COSTS[size], 1.0 if dtype == torch.float64 else 0.5
    pairs = measure.edges(atoms, measure.SIZES[size]["r_max"])
    one = cost.ms + frames * (cost.ms_per_atom * len(atoms) + cost.ms_per_edge * pairs)
    memory = frames * (cost.mb_per_atom * len(atoms) + cost.mb_per_edge * pairs)
    return 1e-3 * members * one * (0.5 + 0.5 * share), share * memory / 1024


def work_of(ensemble: Ensemble, frames: Frames) -> roofline.Work:
    """Counted work of one prediction.  Least bytes: weights, graph and predictions once."""
    prediction = ensemble.predict(frames)
    out = sum(x.nbytes for x in (prediction.energy, prediction.forces, prediction.virial))
    least = roofline.nbytes(ensemble._network.values()) + roofline.nbytes(ensemble._graph(frames).tensors()) + out
    return roofline.counted(lambda: ensemble.predict(frames), least)


def differences(a: Result, b: Result) -> dict[str, float]:
    """Largest differences of energies (eV), forces (eV/Å) and virials (eV)."""
    return {name: float(np.abs(x - y).max()) for name, x, y in zip(("max_dE", "max_dF", "max_dW"), a, b, strict=True)}


def case(
    made: Contenders, name: str, atoms: Atoms, frames: int, seconds: float, warm: int, least: int, peak: roofline.Peak | None
) -> dict[str, object]:
    """Times of one system and number of frames."""
    device = made.eager.potential.device
    sets = [measure.distorted(atoms, frames, seed) for seed in range(VARIETY)]
    jobs: dict[str, Callable[[], Any]] = {
        "ours": predictor(made.ours, sets),
        "single": predictor(made.single, sets),
        "floor": measure.products_of(predictor(made.eager, sets)),
        "i-PI": batched_mace(made.shipped, atoms, sets, device),
        "pruned": batched_mace(made.pruned, atoms, sets, device),
        "modules": predictor(made.modules, sets),
    }
    jobs |= with_cueq(made, atoms, sets)
    difference = differences(jobs["ours"](), jobs["i-PI"]())
    t = measure.interleaved(jobs, seconds, least, warm, device=device)
    return {
        "system": name,
        "members": made.eager.members,
        "frames": frames,
        "ours_ms": t["ours"],
        "chunk": made.ours.together(sets[0]),
        "alternative": "i-PI BatchedMACE, the same models",
        "alternative_ms": t["i-PI"],
        "ratio": t["i-PI"] / t["ours"],
        "pruned_ms": t["pruned"],
        "ratio_pruned": t["pruned"] / t["ours"],
        "pruning": t["i-PI"] / t["pruned"],
        "modules_ms": t["modules"],
        "ratio_modules": t["modules"] / t["ours"],
        "single_ms": t["single"],
        "over_one_member": t["ours"] / t["single"],
        "floor_ms": t["floor"],
        "cueq_ms": t.get("cueq"),
        **work_of(made.eager, sets[0]).columns(t["ours"], peak),
    } | difference


def main() -> None:
    """Every case that is cheap enough."""
    parser = measure.arguments(__doc__)
    measure.add_cases(parser, list(measure.SYSTEMS))
    parser.add_argument("--frames", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--members", type=int, default=8)
    options = parser.parse_args()
    settle(1)
    dtype = getattr(torch, options.dtype)
    table = measure.Table(COLUMNS)
    peak = roofline.peak(options.device, dtype)
    for size, name in itertools.product(options.models, options.systems):
        atoms, made = measure.SYSTEMS[name](), None
        for frames in options.frames:
            if options.quick and (size, name, frames) not in QUICK:
                continue
            seconds, memory = estimate(size, atoms, frames, options.members, dtype)
            seconds *= GPU_SHARE if options.device.type == "cuda" else 1.0
            limit = 1e9 if options.full else LIMITS[size]
            if seconds > limit or memory > measure.free_gib(options.device):
                print(
                    f"left out: {size} {name} x {frames}: about {seconds:.0f} s and {memory:.1f} GiB a call of i-PI's "
                    f"(limits {limit:g} s, {measure.free_gib(options.device):.0f} GiB)"
                )
                continue
            made = made or contenders(size, atoms, options.members, dtype, options.compile, options.device)
            short = options.quick or seconds > 2
            rounds = {"seconds": 0.5, "least": 2} if short else {"seconds": 4.0, "least": 4}
            warm = (
                8 if options.device.type == "cuda" else 1 if seconds > 2 else 3
            )  # recordings are made and checked in the first calls
            found = case(made, name, atoms, frames, **rounds, warm=warm, peak=peak)
            table.add(measure.rounded({"model": size, "dtype": options.dtype, "compile": options.compile} | found))
    measure.write_json(options.json, table.rows)


if __name__ == "__main__":
    main()
