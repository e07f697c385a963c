"""Trains the embedded model on one core and writes it in double precision.

    python train.py --work WORK --epochs 24 --model embedded.model

Reads WORK/{train,valid}.xyz and the WORK/correction_*.xyz of correct.py, if any; after each epoch it writes
WORK/embedded.checkpoint.pt (named after the model) and, when better on valid.xyz than before, WORK/embedded.best.pt.
Interrupted, the same command goes on from there.  The module is mace's own; only its energy is evaluated by fast.py, which
makes a step several times cheaper than in mace_run_train.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import cos, pi
from pathlib import Path

import mace.modules as mace  # before e3nn, whose constants it makes loadable
import numpy as np
import torch
from ase import Atoms
from ase.io import read
from e3nn import o3
from fast import ScalarMACE
from torch import Tensor

log = logging.getLogger("foundation.train")

ELEMENTS = (1, 6, 7, 8)
CUTOFF = 4.5  # Å
CHANNELS = 48
SEED = 7
BATCH = 16
FIRST_RATE, LAST_RATE, WARM_UP = 0.01, 1e-5, 300  # half a cosine from the first to the last, after WARM_UP steps of rise
REPEATS = {"protonated": 2, "water": 2}  # times per epoch that a frame of a group is seen, else once
ENERGY_WEIGHT, FORCE_WEIGHT = 100.0, 10.0  # on |ΔE|/atom (eV) and |ΔF| of an atom (eV/Å)
ENERGY_TURN, FORCE_TURN = 0.1, 1.0  # eV/atom and eV/Å: errors above them count by their square
AVERAGE = 0.999  # exponential moving average of the weights
LARGEST_GRADIENT = 300.0


@dataclass(frozen=True, eq=False)
class Frame:
    """One labelled structure with its neighbours."""

    kinds: np.ndarray
    """(A,) index into ELEMENTS."""
    positions: np.ndarray
    """(A, 3) Å."""
    sender: np.ndarray
    """(E,) atoms at the tail of an edge."""
    receiver: np.ndarray
    """(E,) atoms at its head, closer than CUTOFF."""
    energy: float
    """eV, less the isolated atoms'."""
    forces: np.ndarray
    """(A, 3) eV/Å."""


def structures_in(work: Path) -> list[Atoms]:
    """All training structures: those of generate.py and those of correct.py."""
    return [x for path in (work / "train.xyz", *sorted(work.glob("correction_*.xyz"))) for x in read(path, ":")]


def frame_of(atoms: Atoms) -> Frame:
    """The frame with its total energy; `relative_to` takes the atoms' energies off."""
    bare = unlabelled(atoms.numbers, atoms.positions)
    return replace(bare, energy=atoms.info["REF_energy"], forces=atoms.arrays["REF_forces"])


def unlabelled(numbers: np.ndarray, positions: np.ndarray) -> Frame:
    """The frame with its neighbours and zeros for labels."""
    apart = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    receiver, sender = np.nonzero((apart < CUTOFF) & ~np.eye(len(numbers), dtype=bool))
    kinds = np.searchsorted(ELEMENTS, numbers)
    return Frame(kinds, positions, sender, receiver, 0.0, np.zeros_like(positions))


def relative_to(frames: list[Frame], atom_energies: dict[int, float]) -> list[Frame]:
    """The frames with their energies less the isolated atoms'."""
    e0 = np.array([atom_energies[z] for z in ELEMENTS])
    return [replace(f, energy=f.energy - e0[f.kinds].sum()) for f in frames]


@dataclass(frozen=True, eq=False)
class Batch:
    """Frames joined into one graph, atoms in the order of the elements."""

    counts: list[int]
    vectors: Tensor
    sender: Tensor
    receiver: Tensor
    frame: Tensor
    sizes: Tensor
    energy: Tensor
    forces: Tensor


def joined(frames: list[Frame]) -> Batch:
    """One batch of the frames."""
    sizes = [len(f.kinds) for f in frames]
    starts = np.cumsum([0, *sizes[:-1]])
    kinds = np.concatenate([f.kinds for f in frames])
    order = np.argsort(kinds, kind="stable")
    place = np.argsort(order)  # where an atom went
    sender = place[np.concatenate([f.sender + s for f, s in zip(frames, starts, strict=True)])]
    receiver = place[np.concatenate([f.receiver + s for f, s in zip(frames, starts, strict=True)])]
    positions = np.concatenate([f.positions for f in frames])[order]
    real = torch.get_default_dtype()
    return Batch(
        counts=np.bincount(kinds, minlength=len(ELEMENTS)).tolist(),
        vectors=torch.as_tensor(positions[receiver] - positions[sender], dtype=real),
        sender=torch.as_tensor(sender),
        receiver=torch.as_tensor(receiver),
        frame=torch.as_tensor(np.repeat(np.arange(len(frames)), sizes)[order]),
        sizes=torch.as_tensor(sizes, dtype=real),
        energy=torch.as_tensor([f.energy for f in frames], dtype=real),
        forces=torch.as_tensor(np.concatenate([f.forces for f in frames])[order], dtype=real),
    )


def predicted(potential: ScalarMACE, batch: Batch, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Energies (B,) eV and forces (N, 3) eV/Å."""
    vectors = batch.vectors.detach().requires_grad_()
    energy = potential.energy(batch.counts, vectors, batch.sender, batch.receiver, batch.frame, len(batch.sizes))
    (pull,) = torch.autograd.grad(energy.sum(), vectors, create_graph=create_graph)
    forces = torch.zeros_like(batch.forces).index_add(0, batch.sender, pull).index_add(0, batch.receiver, pull, alpha=-1)
    return energy, forces


def loss_of(energy: Tensor, forces: Tensor, batch: Batch) -> Tensor:
    """ENERGY_WEIGHT mean (e + e²/e0) + FORCE_WEIGHT mean (f + f²/f0), with e = |ΔE|/atom and f = |ΔF| of an atom.

    Linear alone, small errors rule and rare geometries, such as a shared proton, stay wrong by eV; squared alone, strained frames rule.
    """
    e = (energy - batch.energy).abs() / batch.sizes
    f = ((forces - batch.forces).square().sum(1) + 1e-8).sqrt()
    return ENERGY_WEIGHT * (e + e.square() / ENERGY_TURN).mean() + FORCE_WEIGHT * (f + f.square() / FORCE_TURN).mean()


def new_model(frames: list[Frame], atom_energies: dict[int, float]) -> mace.ScaleShiftMACE:
    """An untrained module; scale = rms force component, no shift, so that an isolated atom has exactly its energy."""
    torch.manual_seed(SEED)
    rms = float(np.sqrt(np.mean(np.concatenate([f.forces for f in frames]) ** 2)))
    edges = sum(len(f.sender) for f in frames) / sum(len(f.kinds) for f in frames)
    return module(rms, edges, [atom_energies[z] for z in ELEMENTS])


def continued(path: Path, atom_energies: dict[int, float]) -> mace.ScaleShiftMACE:
    """The module of a file that this script wrote, in the default dtype."""
    written = torch.load(path, map_location="cpu", weights_only=False)
    return rebuilt(written, atom_energies)


def rebuilt(model: mace.ScaleShiftMACE, atom_energies: dict[int, float]) -> mace.ScaleShiftMACE:
    """The module built anew in the default dtype: a cast would keep coupling coefficients and reference energies rounded."""
    scale, neighbours = model.scale_shift.scale.item(), float(model.interactions[0].avg_num_neighbors)
    new = module(scale, neighbours, [atom_energies[z] for z in ELEMENTS])
    with torch.no_grad():
        for to, weight in zip(new.parameters(), model.parameters(), strict=True):
            to.copy_(weight)
    return new


def module(scale: float, neighbours: float, atom_energies: list[float]) -> mace.ScaleShiftMACE:
    """The architecture, in the default dtype."""
    return mace.ScaleShiftMACE(
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=mace.interaction_classes["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=mace.interaction_classes["RealAgnosticInteractionBlock"],
        num_interactions=2,
        num_elements=len(ELEMENTS),
        hidden_irreps=o3.Irreps(f"{CHANNELS}x0e"),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.array(atom_energies),
        avg_num_neighbors=neighbours,
        atomic_numbers=list(ELEMENTS),
        correlation=2,
        gate=torch.nn.functional.silu,
        radial_type="bessel",
        atomic_inter_scale=scale,
        atomic_inter_shift=0.0,
        heads=["Default"],
    )


class Training:
    """Weights, their average, optimizer and position in the schedule."""

    def __init__(self, model: mace.ScaleShiftMACE, steps: int, first_rate: float, last_rate: float) -> None:
        self.model, self.potential, self.steps, self.step = model, ScalarMACE(model), steps, 0
        self.first_rate, self.last_rate = first_rate, last_rate
        self.weights = list(model.parameters())
        self.average = [w.detach().clone() for w in self.weights]
        self.optimizer = torch.optim.Adam(self.weights, lr=first_rate, amsgrad=True)

    def rate(self) -> float:
        """Learning rate of the present step."""
        fallen = self.last_rate + (self.first_rate - self.last_rate) * 0.5 * (1 + cos(pi * self.step / self.steps))
        return fallen * min(1.0, (self.step + 1) / WARM_UP)

    def advance(self, batch: Batch) -> None:
        """One step."""
        self.optimizer.param_groups[0]["lr"] = self.rate()
        self.optimizer.zero_grad()
        loss_of(*predicted(self.potential, batch, True), batch).backward()
        torch.nn.utils.clip_grad_norm_(self.weights, LARGEST_GRADIENT)
        self.optimizer.step()
        self.step += 1
        keep = min(AVERAGE, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1.0 - keep)

    def validate(self, batches: list[Batch]) -> tuple[float, float, float]:
        """Loss, energy MAE (eV/atom) and force RMSE (eV/Å) of the averaged weights."""
        present = [w.detach().clone() for w in self.weights]
        self.put(self.average)
        found = [(b, *predicted(self.potential, b, False)) for b in batches]
        self.put(present)
        loss = np.mean([loss_of(e, f, b).item() for b, e, f in found])
        energy = torch.cat([(e.detach() - b.energy).abs() / b.sizes for b, e, _ in found]).mean().item()
        forces = torch.cat([(f - b.forces).ravel() for b, _, f in found]).square().mean().sqrt().item()
        return float(loss), energy, forces

    def put(self, values: list[Tensor]) -> None:
        """Sets the weights."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, values)

    def state(self) -> dict[str, object]:
        """What `resume` needs."""
        own = [w.detach().clone() for w in self.weights]
        return {"weights": own, "average": self.average, "optimizer": self.optimizer.state_dict(), "step": self.step}

    def resume(self, state: dict) -> None:
        """Goes on from a saved state."""
        self.put(state["weights"])
        self.average, self.step = state["average"], state["step"]
        self.optimizer.load_state_dict(state["optimizer"])


def shuffled(frames: list[Frame], epoch: int) -> Iterator[Batch]:
    """The batches of one epoch."""
    order = np.random.default_rng([SEED, epoch]).permutation(len(frames))
    for k in range(0, len(order) - BATCH + 1, BATCH):
        yield joined([frames[i] for i in order[k : k + BATCH]])


def frames_in(work: Path) -> tuple[list[Frame], list[Frame], dict[int, float]]:
    """Frames of an epoch, those of validation, and the energies (eV) of the single atoms by atomic number."""
    structures = structures_in(work)
    atom_energies = {int(x.numbers[0]): float(x.info["REF_energy"]) for x in structures if len(x) == 1}
    frames = [f for x in structures if len(x) > 1 for f in [frame_of(x)] * REPEATS.get(x.info["group"], 1)]
    held = [frame_of(x) for x in read(work / "valid.xyz", ":")]
    return relative_to(frames, atom_energies), relative_to(held, atom_energies), atom_energies


def trained(
    work: Path, name: str, epochs: int, rates: tuple[float, float], start: Path | None
) -> tuple[mace.ScaleShiftMACE, dict[int, float]]:
    """The module with the weights that were best on valid.xyz, in single precision, and the atoms' energies."""
    frames, held, atom_energies = frames_in(work)
    valid = [joined(held[k : k + 32]) for k in range(0, len(held), 32)]
    per_epoch = len(frames) // BATCH
    model = continued(start, atom_energies) if start else new_model(frames, atom_energies)
    training = Training(model, epochs * per_epoch, *rates)
    checkpoint, best_file, lowest = work / f"{name}.checkpoint.pt", work / f"{name}.best.pt", float("inf")
    if checkpoint.exists():
        training.resume(torch.load(checkpoint, weights_only=True))
        lowest = torch.load(best_file, weights_only=True)["loss"]
    log.info("%d frames, %d weights, %d steps an epoch", len(frames), sum(w.numel() for w in training.weights), per_epoch)
    for epoch in range(training.step // per_epoch, epochs):
        began = time.perf_counter()
        for batch in shuffled(frames, epoch):
            training.advance(batch)
        loss, energy, force = training.validate(valid)
        took = time.perf_counter() - began
        log.info(
            "epoch %3d  loss %.4f  energy MAE %.1f meV/atom  force RMSE %.1f meV/Å  %.0f s",
            epoch,
            loss,
            1e3 * energy,
            1e3 * force,
            took,
        )
        if loss < lowest:
            lowest = loss
            torch.save({"loss": loss, "epoch": epoch, "weights": training.average}, best_file)
        torch.save(training.state(), checkpoint)
    training.put(torch.load(best_file, weights_only=True)["weights"])
    return training.model, atom_energies


def main() -> None:
    """Trains and writes the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, required=True, help="fixes the schedule")
    parser.add_argument("--rate", type=float, default=FIRST_RATE, help="first learning rate")
    parser.add_argument("--last", type=float, default=LAST_RATE, help="last learning rate")
    parser.add_argument("--start", type=Path, help="begin with the weights of this model")
    parser.add_argument("--model", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    model, atom_energies = trained(args.work, args.model.stem, args.epochs, (args.rate, args.last), args.start)
    torch.set_default_dtype(torch.float64)
    torch.save(rebuilt(model, atom_energies).eval(), args.model)
    log.info("wrote %s, %.1f MB", args.model, args.model.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
