"""Milliseconds of the ensemble: MACE's own modules one after the other against all members at once.

python tests/benchmarks/ensemble.py [MODEL.model ...]   (OMP_NUM_THREADS=1; CPU time, medians of interleaved rounds)

Baseline: MACE's own forward and backward pass on a prebuilt graph, pruned weights written into the full module, one member
after the other.  Floor: the matrix products of the radial networks alone, which no arrangement of the rest can avoid.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from ase.build import molecule

from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import Graph, build_graph
from bnn_driver.potential.mace import EMBEDDED, load_mace
from bnn_driver.potential.modules import ModulesPotential
from bnn_driver.potential.params import flatten, repeat_weights
from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.records import Frames

CPU = torch.device("cpu")
MEMBERS = 8
CHAINS = 4
BATCH = 5
Any_potential = StackedPotential | ModulesPotential


def interleaved(jobs: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median CPU milliseconds of each job."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
        job()
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            times[name].append(time.process_time() - start)
    return {name: 1e3 * float(np.median(t)) for name, t in times.items()}


def ethanol(frames: int) -> Frames:
    """Distorted ethanol, 9 atoms."""
    atoms = molecule("CH3CH2OH")
    noise = 0.05 * np.random.default_rng(0).standard_normal((frames, 9, 3))
    return Frames(atoms.numbers, atoms.positions + noise)


def training(potential: Any_potential, chains: int, graph: Graph) -> Callable[[], torch.Tensor]:
    """Gradient of a loss on energies and forces, own minibatch per chain."""
    theta, layout = flatten(repeat_weights(potential.weights, chains))
    index = torch.stack([torch.randperm(graph.lead[0])[:BATCH] for _ in range(chains)])

    def step() -> torch.Tensor:
        leaf = theta.detach().requires_grad_(True)
        e = potential.evaluate(layout.views(leaf), graph.take(index), create_graph=True)
        return torch.autograd.grad((e.energy**2).sum() * 1e-6 + (e.forces**2).sum(), leaf)[0]

    return step


def radial_floor(potential: StackedPotential, chains: int, bonds: int) -> Callable[[], None]:
    """The radial networks' matrix products of one training step: value and tangent, and twice that in reverse."""
    weights = repeat_weights(potential.weights, chains)
    products = []
    for layer in potential.tables.layers:
        for name in layer.radial.names:
            w = weights[name]
            products.append((torch.zeros(chains, 2 * bonds, w.shape[1], dtype=w.dtype), w))

    def run() -> None:
        for x, w in products:
            for _ in range(3):
                torch.bmm(x, w)

    return run


def report(path: str, dtype: torch.dtype) -> None:
    """One model, one precision."""
    loaded = load_mace(path, dtype=dtype)
    fast = make_potential(loaded.module, [1, 6, 8], dtype, CPU, path="stacked")
    slow = make_potential(loaded.module, [1, 6, 8], dtype, CPU, path="modules")
    assert isinstance(fast, StackedPotential)
    print(f"\n{loaded.path.name} {dtype}: {sum(x.numel() for x in fast.weights.values())} sampled of {loaded.parameters}")
    many, one = repeat_weights(fast.weights, MEMBERS), repeat_weights(fast.weights, 1)
    many_ready, one_ready = fast.prepare(many), fast.prepare(one)
    for beads in (1, 8):
        graph = build_graph(ethanol(beads), fast.cutoff, dtype, CPU)
        t = interleaved(
            {
                "modules": lambda graph=graph: slow.evaluate(one, graph),
                "chunk 1": lambda graph=graph: fast.evaluate(one_ready, graph),
                "all": lambda graph=graph: fast.evaluate(many_ready, graph),
                "list": lambda beads=beads: build_graph(ethanol(beads), fast.cutoff, dtype, CPU),
            }
        )
        base = MEMBERS * t["modules"]
        print(
            f"  inference, {MEMBERS} members x {beads} frames: modules {base:.1f} ms; chunk 1 {MEMBERS * t['chunk 1']:.1f} "
            f"({base / (MEMBERS * t['chunk 1']):.1f}x); all at once {t['all']:.1f} ({base / t['all']:.1f}x); list {t['list']:.2f}"
        )
    graph = build_graph(ethanol(20), fast.cutoff, dtype, CPU)
    t = interleaved(
        {
            "modules": training(slow, 1, graph),
            "one": training(fast, 1, graph),
            "all": training(fast, CHAINS, graph),
            "floor": radial_floor(fast, CHAINS, BATCH * 36),
        }
    )
    print(
        f"  training step per chain, {BATCH} frames: modules {t['modules']:.1f} ms; 1 chain {t['one']:.1f} "
        f"({t['modules'] / t['one']:.1f}x); {CHAINS} chains {t['all'] / CHAINS:.1f} ({t['modules'] * CHAINS / t['all']:.1f}x); "
        f"floor {t['floor'] / CHAINS:.1f}"
    )


def main() -> None:
    """Every model named, or the embedded one."""
    torch.set_num_threads(1)
    for path in sys.argv[1:] or [str(EMBEDDED)]:
        for dtype in (torch.float64, torch.float32):
            report(path, dtype)


if __name__ == "__main__":
    main()
