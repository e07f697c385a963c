"""Milliseconds of one SGHMC step per chain, gradient, update and noise, and seconds of an update of 8 chains by 2000 steps.

    python tests/benchmarks/chain_update.py [--quick | --full] [--dtype float32] [--device cuda] [--json FILE]

Ours: the parts of `bnn_driver.bayes.update.update_chains` on all chains at once, each with its own minibatch of 5 labels (energy,
forces, stress of crystals, noise head).  Alternatives: eight independent mace modules stepped one after the other, double
backward, the update in a Python loop over parameters, as published (`alternative`: 89 elements as a foundation model comes;
`pruned`: modules that know only the elements of the system).  Before the timing the gradients of both for the same weights and
minibatch are compared in float64.  `floor`: the matrix products of our gradient alone, same shapes and strides, operands ready.
`gflop`, `gb`, `of_roofline`: counted work of a step of our plain code per chain, and the least possible time over ours, see `roofline.py`.
A last table times a generation of 8 members x 5 M weights written (checksum, fsync, rename) and read, beside a bare write.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
import roofline
import torch
from ase import Atoms
from torch import Tensor, nn

from bnn_driver.bayes import minibatch, sghmc
from bnn_driver.bayes.likelihood import NoiseHead, NoiseModel, Targets, log_likelihood
from bnn_driver.bayes.posterior import MinibatchPosterior
from bnn_driver.bayes.sghmc import SghmcSettings
from bnn_driver.bayes.update import UpdateSettings, chain_generators
from bnn_driver.loops.assembly import settle
from bnn_driver.loops.chain_update import Learner, TrainingLoss, update
from bnn_driver.records import Generation, Label, LabelledFrame
from bnn_driver.store import weights as store
from bnn_driver.units import KCAL_PER_MOL

BATCH, LABELS, STEPS, STEP_SIZE, PRIOR_SD = 5, 20, 2000, 1e-5, 0.5
SAMPLER = SghmcSettings(0.1, 0.999, 1e-4)
TOLERANCE = 1e-10
COLUMNS = (
    "system", "model", "members", "dtype", "ours_ms:.1f", "alternative_ms:.1f", "ratio:.1f", "pruned_ms:.1f", "ratio_pruned:.1f",
    "single_ms:.1f", "floor_ms:.1f", "gradient_ms:.1f", "update_ms:.2f", "noise_ms:.2f", "their_update_ms:.1f", "ours_s:.0f",
    "theirs_s:.0f", "gflop:.3g", "gb:.3g", "gb_least:.2g", "of_roofline:.3f", "check:.0e",
)  # fmt: skip


def labels(atoms: Atoms, energy: float, count: int = LABELS) -> list[LabelledFrame]:
    """Made-up labels of distorted frames."""
    frames, rng = measure.distorted(atoms, count), np.random.default_rng(1)
    items = []
    for i in range(count):
        stress = 1e-3 * np.eye(3) * rng.standard_normal() if frames.periodic else None
        forces = 0.1 * rng.standard_normal((len(atoms), 3))
        label = Label(energy + 0.05 * rng.standard_normal(), forces, stress, "random", "benchmark", str(i), "made up")
        items.append(LabelledFrame(frames[i], label, {"foundation_energy": energy}))
    return items


def make_learner(module: nn.Module, numbers: np.ndarray, compile: str, device: torch.device = measure.CPU) -> Learner:
    """Published settings around one module."""
    potential = measure.our_potential(module, numbers, compile, device)
    head = NoiseHead(potential.n_features, (64, 16))
    noise = NoiseModel(0.1 * KCAL_PER_MOL, 0.1 * KCAL_PER_MOL, 0.00625 * KCAL_PER_MOL, head)
    settings = UpdateSettings(STEPS, BATCH, STEP_SIZE, SAMPLER, 1.0, 0.2, 0.05, 1e9, (0.0, 1e9))
    return Learner.around(potential, noise, PRIOR_SD, settings, 0)


def noise_weights(head: NoiseHead, members: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Small random weights of the noise head, name -> (M, ...)."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: (0.05 * torch.randn((members, *shape), generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in head.shapes.items()
    }


class OurChains:
    """All chains at once, a step taken apart."""

    def __init__(self, learner: Learner, start: Tensor, items: Sequence[LabelledFrame]) -> None:
        loss = TrainingLoss.build(learner, items)
        self.posterior = MinibatchPosterior(loss, learner.prior, len(items))
        self.count = len(items)
        self.state = sghmc.init(start)
        streams = [chain_generators(m, start.device) for m in range(len(start))]
        self.batches, self.noises = [s[0] for s in streams], [s[1] for s in streams]

    def gradient(self) -> Tensor:
        """Of the next minibatches."""
        index, weight = minibatch.draw_chains(self.count, BATCH, [self.count - 1], self.batches)
        return self.posterior.gradient(self.state.theta, index, weight.to(self.state.theta.dtype))[0]

    def move(self, gradient: Tensor, temperature: float = 1.0) -> None:
        """Update, with noise unless the temperature is 0."""
        self.state = sghmc.step_(
            self.state, gradient, step_size=STEP_SIZE, temperature=temperature, n_labels=self.count, settings=SAMPLER,
            generators=self.noises,
        )  # fmt: skip

    def step(self) -> None:
        """One whole step."""
        self.move(self.gradient())

    def work(self) -> roofline.Work:
        """Counted work of a step.  Least bytes: θ, p, v and s read and written, and the minibatches once."""
        index, _ = minibatch.draw_chains(self.count, BATCH, [self.count - 1], self.batches)
        batch = self.posterior.forward._batch(index)  # type: ignore[attr-defined]
        return roofline.counted(self.step, 8 * roofline.nbytes([self.state.theta]) + roofline.nbytes(batch.tensors()))


class ModuleChain:
    """One chain as published: a mace module, its gradient by double backward, its update parameter by parameter."""

    def __init__(self, module: nn.Module, noise: NoiseModel, head: Mapping[str, Tensor], data: _Structures, centre: nn.Module):
        names = measure.sampled(module, data.numbers).index
        self.module, self.noise, self.data = module, noise, data
        for name, p in module.named_parameters():
            p.requires_grad_(name in names)
        self.head = {name: x[None].clone().requires_grad_(True) for name, x in head.items()}
        self.parameters = {n: p for n, p in module.named_parameters() if n in names} | self.head
        middle = dict(centre.named_parameters())
        self.centre = {n: middle[n].detach().clone() if n in names else torch.zeros_like(p) for n, p in self.parameters.items()}
        self.state = {n: [torch.zeros_like(p) for _ in range(3)] for n, p in self.parameters.items()}
        self.count = 0
        self.generator = torch.Generator().manual_seed(0)
        self.device = next(module.parameters()).device

    def loss(self, index: Tensor, weight: Tensor) -> Tensor:
        """Weighted negative log-likelihood of a minibatch; the same formula as ours."""
        data, b = self.data, len(index)
        stress = data.targets.stress is not None
        out = self.module(data.batch(index, self.device), training=True, compute_force=True, compute_stress=stress)
        width = self.noise.head.n_features // 2
        nodes = out["node_feats"]
        features = torch.cat([nodes[:, :width], nodes[:, -width:]], dim=1).view(1, b, -1, 2 * width)
        energy_sd, force_sd = self.noise(features, self.head)
        forces = out["forces"].view(1, b, -1, 3)
        found = out["stress"][None] if stress else None
        targets = data.targets.take(index.to(self.device))
        log_p = log_likelihood(out["energy"][None], forces, found, targets, energy_sd, force_sd, self.noise.stress_sd)
        return -(weight * log_p[0]).sum()

    def gradient(self, index: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Estimate of the gradient of U/N, by name."""
        found = torch.autograd.grad(self.loss(index, weight), list(self.parameters.values()))
        with torch.no_grad():
            return {
                n: g + (p - self.centre[n]) / (PRIOR_SD**2 * LABELS)
                for (n, p), g in zip(self.parameters.items(), found, strict=True)
            }

    @torch.no_grad()
    def move(self, gradient: Mapping[str, Tensor]) -> None:
        """AMSGrad-SGHMC, one parameter after the other."""
        self.count += 1
        amplitude = SAMPLER.friction * math.sqrt(2.0 / (STEP_SIZE * LABELS))
        for name, x in self.parameters.items():
            g, (momentum, second, largest) = gradient[name], self.state[name]
            second.mul_(SAMPLER.beta).addcmul_(g, g, value=1 - SAMPLER.beta)
            torch.maximum(largest, second, out=largest)
            mass = (largest / (1 - SAMPLER.beta**self.count)).sqrt() + SAMPLER.eps
            momentum.mul_(1 - SAMPLER.friction).add_(g, alpha=-SAMPLER.friction)
            momentum.addcmul_(torch.randn_like(momentum), mass.sqrt(), value=amplitude)
            x.addcdiv_(momentum, mass, value=STEP_SIZE)

    def draw(self) -> tuple[Tensor, Tensor]:
        """The next minibatch."""
        index, weight = minibatch.draw_chains(LABELS, BATCH, [LABELS - 1], [self.generator])
        return index[0], weight[0].to(next(iter(self.parameters.values())))  # labels are collated on the host

    def step(self) -> None:
        """One whole step."""
        self.move(self.gradient(*self.draw()))


@dataclass(frozen=True, eq=False)
class _Structures:
    """Labels as mace's modules read them, made once."""

    numbers: np.ndarray
    items: list[Any]
    targets: Targets

    @classmethod
    def build(cls, module: nn.Module, items: Sequence[LabelledFrame], targets: Targets) -> _Structures:
        from mace import data
        from mace.tools import torch_tools, utils

        table = utils.AtomicNumberTable([int(z) for z in module.atomic_numbers])
        keys = data.KeySpecification(info_keys={}, arrays_keys={})
        found = []
        dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
        with torch_tools.default_dtype(dtype):
            for item in items:
                cell = item.frame.cell
                atoms = Atoms(
                    item.frame.numbers, item.frame.positions[0], cell=None if cell is None else cell[0], pbc=cell is not None
                )
                config = data.config_from_atoms(atoms, key_specification=keys)
                found.append(data.AtomicData.from_config(config, z_table=table, cutoff=float(module.r_max)))
        return cls(items[0].frame.numbers, found, targets)

    def batch(self, index: Tensor, device: torch.device) -> dict[str, Tensor]:
        """A minibatch, collated."""
        from mace.tools.torch_geometric.batch import Batch

        return Batch.from_data_list([self.items[i] for i in index.tolist()]).to(device).to_dict()


@dataclass(frozen=True)
class Contenders:
    """The same chains in every form."""

    ours: OurChains
    single: OurChains
    shipped: list[ModuleChain]
    pruned: list[ModuleChain]
    learner: Learner
    items: list[LabelledFrame]


def contenders(
    size: str, atoms: Atoms, chains: int, dtype: torch.dtype, compile: str, device: torch.device = measure.CPU
) -> Contenders:
    """Random chains around one module."""
    modules = measure.committee(size, atoms.numbers, chains + 1, dtype)
    few = measure.pruned(modules, size, atoms.numbers)
    learner = make_learner(modules[0], atoms.numbers, compile, device)
    items = labels(atoms, -3.0 * len(atoms))
    head = noise_weights(learner.noise.head, chains, dtype)
    theta = learner.layout.flat(measure.our_weights(modules[1:], atoms.numbers) | head).to(device)
    ours = OurChains(learner, theta, items)
    targets = ours.posterior.forward.targets  # type: ignore[attr-defined]
    forms = []
    for group in (modules, few):
        data = _Structures.build(group[0], items, targets)
        heads = [{name: x[m].to(device) for name, x in head.items()} for m in range(chains)]
        there = [module.to(device) for module in group]
        forms.append([ModuleChain(m, learner.noise, h, data, there[0]) for m, h in zip(there[1:], heads, strict=True)])
    return Contenders(ours, OurChains(learner, theta[:1], items), forms[0], forms[1], learner, items)


def check(size: str, atoms: Atoms) -> float:
    """Largest difference of the gradients of two chains, relative to the largest entry; float64.

    Raises: SystemExit when it is beyond the tolerance.
    """
    made = contenders(size, atoms, 2, torch.float64, "off")
    count = BATCH if len(atoms) < 20 else 1
    index = torch.stack([torch.randperm(LABELS, generator=torch.Generator().manual_seed(m))[:count] for m in range(2)])
    weight = torch.full(index.shape, 1.0 / count, dtype=torch.float64)
    ours = made.learner.layout.views(made.ours.posterior.gradient(made.ours.state.theta, index, weight)[0])
    worst = 0.0
    for m, chain in enumerate(made.shipped):
        theirs = chain.gradient(index[m], weight[m])
        part = measure.sampled(chain.module, atoms.numbers)
        largest = max(float(g.abs().max()) for g in theirs.values())
        for name, g in theirs.items():
            g = g[0] if name.startswith("noise.") else part.pruned(name, g)
            worst = max(worst, float((ours[name][m] - g).abs().max()) / largest)
    if not worst < TOLERANCE:
        raise SystemExit(f"the gradients differ by {worst:.1e} (allowed {TOLERANCE:.0e}): nothing is timed")
    return worst


def case(
    size: str, name: str, atoms: Atoms, chains: int, dtype: torch.dtype, options: argparse.Namespace, rounds: dict[str, Any]
) -> dict[str, Any]:
    """Times of one system, per chain."""
    agreement = check(size, atoms)
    compile, device = options.compile, options.device
    made = contenders(size, atoms, chains, dtype, compile, device)
    eager = made.ours if compile == "off" else contenders(size, atoms, chains, dtype, "off", device).ours
    gradient = made.ours.gradient()
    theirs = made.shipped[0].gradient(*made.shipped[0].draw())
    for chain in 2 * (made.shipped + made.pruned):  # TorchScript is slow in its first two calls
        chain.step()
    shipped, pruned = itertools.cycle(made.shipped), itertools.cycle(made.pruned)
    jobs: dict[str, Callable[[], Any]] = {
        "ours": made.ours.step,
        "single": made.single.step,
        "gradient": made.ours.gradient,
        "update": lambda: made.ours.move(gradient, 0.0),
        "noise": lambda: sghmc.noise_like(gradient, made.ours.noises),
        "floor": measure.products_of(eager.gradient),
        "theirs": lambda: next(shipped).step(),
        "pruned": lambda: next(pruned).step(),
        "their update": lambda: made.shipped[0].move(theirs),
    }
    t = measure.interleaved(jobs, **rounds, device=device)
    ours = t["ours"] / chains
    work = eager.work().columns(t["ours"], roofline.peak(device, dtype))
    per_chain = {key: work[key] / chains for key in ("gflop", "gflop_products", "gb", "gb_least")}
    return {
        "system": name,
        "members": chains,
        "frames": BATCH,
        "ours_ms": ours,
        "alternative": "eight mace modules one after the other, as published",
        "alternative_ms": t["theirs"],
        "ratio": t["theirs"] / ours,
        "pruned_ms": t["pruned"],
        "ratio_pruned": t["pruned"] / ours,
        "single_ms": t["single"],
        "over_one_member": t["ours"] / t["single"],
        "floor_ms": t["floor"] / chains,
        "gradient_ms": t["gradient"] / chains,
        "update_ms": t["update"] / chains,
        "noise_ms": t["noise"] / chains,
        "their_update_ms": t["their update"],
        "ours_s": 1e-3 * STEPS * 8 * ours,
        "theirs_s": 1e-3 * STEPS * 8 * t["theirs"],
        **per_chain,
        "of_roofline": work["of_roofline"],
        "check": agreement,
        "weights": gradient.shape[1],
    }


def whole_update(size: str, atoms: Atoms, chains: int, dtype: torch.dtype, options: argparse.Namespace, steps: int) -> float:
    """Seconds of `loops.chain_update.update`, scaled to 2000 steps."""
    made = contenders(size, atoms, chains, dtype, options.compile, options.device)
    learner = replace(made.learner, settings=replace(made.learner.settings, steps=steps))
    views = learner.layout.views(made.ours.state.theta)
    previous = Generation(0, {k: v.cpu().numpy().copy() for k, v in views.items()}, ())
    return measure.timed(lambda: update(learner, previous, made.items, 0), options.device) * STEPS / steps


def checkpoint(members: int = 8, weights: int = 5_000_000) -> dict[str, Any]:
    """Wall milliseconds of publishing and loading a generation in float32."""
    array = np.random.default_rng(0).standard_normal((members, weights), dtype=np.float32)
    times: dict[str, list[float]] = {"publish": [], "load": [], "bare": []}

    def timed(name: str, job: Callable[[], object]) -> None:
        begin = time.perf_counter()
        job()
        times[name].append(1e3 * (time.perf_counter() - begin))

    def bare(path: Path) -> None:
        with path.open("wb") as file:
            file.write(array.data)
            file.flush()
            os.fsync(file.fileno())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(3):
            timed("publish", lambda number=number: store.publish(folder, Generation(number, {"w": array}, ())))
            timed("load", lambda number=number: store.load(folder, number))
            timed("bare", lambda: bare(folder / "bare"))
    publish, load, floor = (float(np.median(times[n])) for n in ("publish", "load", "bare"))
    return {"system": "checkpoint", "model": f"{weights} weights", "members": members, "dtype": "float32", "ours_ms": publish,
            "alternative": "bare write and fsync", "alternative_ms": floor, "ratio": floor / publish, "load_ms": load}  # fmt: skip


def main() -> None:
    """Every case that is cheap enough."""
    parser = measure.arguments(__doc__, "float32")
    measure.add_cases(parser, ["ethanol", "crystal40"])
    parser.add_argument("--chains", type=int, default=8)
    options = parser.parse_args()
    settle(1)
    dtype = getattr(torch, options.dtype)
    table = measure.Table(COLUMNS)
    for size, name in itertools.product(options.models, options.systems):
        if options.quick and (size, name) != ("small", "ethanol"):
            continue
        atoms, chains = measure.SYSTEMS[name](), options.chains
        if not options.full and (size, name) == ("medium", "crystal40"):
            chains = 1
            print("medium crystal40: 1 chain only, 8 take about 12 GiB and half a minute a step (--full)")
        # on a GPU recordings are made and checked in the first calls
        rounds = {"seconds": 3.0, "least": 3, "warm": 1 if options.device.type == "cpu" else 8}
        found = {"model": size, "dtype": options.dtype} | case(size, name, atoms, chains, dtype, options, rounds)
        if options.full:
            steps = STEPS if found["ours_s"] < 600 else max(10, int(STEPS * 600 / found["ours_s"]))
            found["measured_s"] = whole_update(size, atoms, chains, dtype, options, steps) * 8 / chains
            print(f"measured: {found['measured_s']:.0f} s for 8 chains ({steps} steps made)")
        table.add(measure.rounded(found))
    files = measure.rounded(checkpoint(weights=500_000 if options.quick else 5_000_000))
    print(
        "checkpoint of {members} x {model}: publish {ours_ms} ms, load {load_ms} ms, bare write {alternative_ms} ms".format(
            **files
        )
    )
    measure.write_json(options.json, [*table.rows, files])


if __name__ == "__main__":
    main()
