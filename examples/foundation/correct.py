"""Finds frames where the present model is wrong, by running it, and labels them with GFN2-xTB.

    python correct.py --work WORK --model MODEL --round 1      writes WORK/correction_1_{protonated,water,molecules}.xyz

train.py reads these files beside WORK/train.xyz.  Each group is written when it is complete and not made again, so an interrupted
round goes on at the group where it stopped.  All starts come from random streams and packings of their own, and from molecules of
the training list, never from anything held out.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import clusters
import generate
import molecules
import numpy as np
import torch
import train
from ase import Atoms, units
from ase.io import write
from fast import ScalarMACE
from rdkit import RDLogger

log = logging.getLogger("foundation.correct")

TEMPERATURES = (300.0, 600.0)  # K, in turn
TIME_STEP, FRICTION = 0.5 * units.fs, 0.01 / units.fs
RELAXATION = 25  # BFGS steps before the dynamics: enough to take the heat out of a packing
PROTONATED = {1: 4, 2: 10, 3: 14, 4: 14, 5: 8}  # size: packed starts
SCANNED = 10  # starts of H5O2+ with the proton near the middle
WATER = {1: 2, 2: 8, 3: 8, 4: 8, 5: 7, 6: 7}
MOLECULES = 48

EVERY = 25  # steps from one comparison with GFN2-xTB to the next
WRONG = 1.5  # eV/Å, largest force error of an atom: above it the walker starts again
DOUBTFUL = 0.5  # eV/Å: above it the frame is kept
REGULAR_SHARE = 0.25  # of the other frames that are kept
VARIED_SHARE = 0.35  # of the kept frames that are also distorted
SHORTEST, HOTTEST = 0.6, 5.0  # Å, and times the wanted temperature: beyond them something broke
MEMORY, STRIDE = 5, 5  # frames kept before a break, and steps between them


@dataclass(frozen=True)
class Start:
    """Where a walker begins."""

    name: str
    charge: int
    temperature: float
    """K."""
    atoms: Atoms


class Walkers:
    """Langevin dynamics (BAOAB splitting) of many molecules at once, one batch of the model per step."""

    def __init__(self, starts: list[Start], potential: ScalarMACE, rng: np.random.Generator) -> None:
        self.starts, self.potential, self.rng = starts, potential, rng
        self.edges = np.cumsum([0, *(len(s.atoms) for s in starts)])
        sizes = np.diff(self.edges)
        self.numbers = np.concatenate([s.atoms.numbers for s in starts])
        self.masses = np.concatenate([s.atoms.get_masses() for s in starts])[:, None]
        self.heat = units.kB * np.repeat([s.temperature for s in starts], sizes)[:, None]
        self.positions = np.concatenate([s.atoms.positions for s in starts])
        self.velocities = self.thermal(slice(None))
        self.forces, self.shortest = self.evaluated()
        self.past: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=MEMORY)
        self.born = np.zeros(len(starts), dtype=int)
        self.age = 0

    def part(self, k: int) -> slice:
        """The atoms of a walker."""
        return slice(self.edges[k], self.edges[k + 1])

    def thermal(self, part: slice) -> np.ndarray:
        """Velocities drawn at the wanted temperature."""
        shape = self.positions[part].shape
        return np.sqrt(self.heat[part] / self.masses[part]) * self.rng.standard_normal(shape)

    def evaluated(self) -> tuple[np.ndarray, np.ndarray]:
        """Forces (N, 3) eV/Å, and the shortest distance (Å) in each walker."""
        parts = [self.part(k) for k in range(len(self.starts))]
        frames = [train.unlabelled(self.numbers[p], self.positions[p]) for p in parts]
        batch = train.joined(frames)
        _, found = train.predicted(self.potential, batch, False)
        forces = np.empty_like(self.positions)
        forces[np.argsort(self.numbers, kind="stable")] = found.detach().numpy()  # the order of `joined`
        shortest = np.full(len(parts), np.inf)
        np.minimum.at(shortest, batch.frame[batch.receiver].numpy(), batch.vectors.norm(dim=1).numpy())
        return forces, shortest

    def step(self) -> None:
        """Half a kick, half a drift, the thermostat, half a drift, half a kick."""
        if self.age % STRIDE == 0:
            self.past.append((self.positions.copy(), self.forces))
        keep = np.exp(-FRICTION * TIME_STEP)
        self.velocities += 0.5 * TIME_STEP * self.forces / self.masses
        self.positions += 0.5 * TIME_STEP * self.velocities
        noise = np.sqrt((1 - keep**2) * self.heat / self.masses) * self.rng.standard_normal(self.positions.shape)
        self.velocities = keep * self.velocities + noise
        self.positions += 0.5 * TIME_STEP * self.velocities
        self.forces, self.shortest = self.evaluated()
        self.velocities += 0.5 * TIME_STEP * self.forces / self.masses
        self.age += 1

    def broken(self) -> np.ndarray:
        """(B,) whether a walker has a pair too short, a force too large or not finite, or runs away in temperature."""
        first = self.edges[:-1]
        force = np.maximum.reduceat(np.linalg.norm(self.forces, axis=1), first)
        kinetic = np.add.reduceat((0.5 * self.masses * self.velocities**2).sum(1), first)
        wanted = np.add.reduceat(1.5 * self.heat[:, 0], first)
        good = (self.shortest > SHORTEST) & (force < generate.LARGEST_FORCE) & (kinetic < HOTTEST * wanted)
        return ~good  # a comparison with nan is false, so nan is broken

    def restart(self, k: int) -> None:
        """The walker from its start with new velocities."""
        part = self.part(k)
        self.positions[part] = self.starts[k].atoms.positions
        self.velocities[part] = self.thermal(part)
        self.forces[part] = 0.0  # of one half kick only
        self.born[k] = self.age

    def present(self, k: int) -> tuple[Atoms, np.ndarray]:
        """The walker's structure and the model's forces on it."""
        part = self.part(k)
        return Atoms(self.numbers[part], self.positions[part]), self.forces[part]

    def before(self, k: int) -> list[tuple[Atoms, np.ndarray]]:
        """The same for the remembered frames since its start."""
        part, steps = self.part(k), len(self.past)
        last = (self.age - 1) // STRIDE * STRIDE
        ages = [last - STRIDE * (steps - 1 - n) for n in range(steps)]
        alive = [x for x, age in zip(self.past, ages, strict=True) if age > self.born[k]]
        return [(Atoms(self.numbers[part], x[part]), f[part]) for x, f in alive]


def compared(atoms: Atoms, forces: np.ndarray, charge: int) -> tuple[Atoms | None, float]:
    """The labelled frame and the largest error of an atom's force (eV/Å); None and infinity where generate.py would drop it."""
    if not generate.connected(atoms, 4.0):
        return None, np.inf
    frame = generate.label(atoms, charge)
    if frame is None:
        return None, np.inf
    return frame, float(np.linalg.norm(forces - frame.arrays["REF_forces"], axis=1).max())


def varied(atoms: Atoms, rng: np.random.Generator) -> Iterator[tuple[str, Atoms]]:
    """(recipe, structure): one bond scaled mostly, else noise or the whole scaled, as in generate.py."""
    draw = rng.random()
    if draw < 0.6:
        yield from (("bond", x) for x in generate.scaled_bonds(atoms, rng, 1))
    elif draw < 0.85:
        yield from (("noise", x) for x in generate.distorted(atoms, rng, [rng.choice(generate.DISTORTIONS)]))
    else:
        yield from (("scale", x) for x in generate.rescaled(atoms, rng, 1))


def inspected(walkers: Walkers, k: int, broken: bool) -> Iterator[tuple[str, Atoms]]:
    """(recipe, labelled frame) worth learning of one walker; a walker that went wrong begins again."""
    start, rng = walkers.starts[k], walkers.rng
    frame, error = (None, np.inf) if broken else compared(*walkers.present(k), start.charge)
    if frame is None or error > WRONG:
        trail = [compared(atoms, forces, start.charge) for atoms, forces in walkers.before(k)]
        yield from (("wrong", x) for x, e in [*trail, (frame, error)] if x is not None and e > DOUBTFUL)
        walkers.restart(k)
        return
    if error > DOUBTFUL or rng.random() < REGULAR_SHARE:
        yield f"md{start.temperature:.0f}", frame
        if rng.random() < VARIED_SHARE:
            for recipe, atoms in varied(frame, rng):
                other = generate.label(atoms, start.charge)
                if other is not None:
                    yield recipe, other


def corrections(starts: list[Start], potential: ScalarMACE, rng: np.random.Generator, steps: int) -> list[Atoms]:
    """Labelled frames along the dynamics of all starts."""
    walkers, frames, wrong = Walkers(starts, potential, rng), [], 0
    for step in range(1, steps + 1):
        walkers.step()
        broken = walkers.broken()
        due = step % EVERY == 0
        for k in range(len(starts)) if due else np.flatnonzero(broken):
            for recipe, frame in inspected(walkers, k, bool(broken[k])):
                frame.info |= {"molecule": starts[k].name, "recipe": recipe}
                frames.append(frame)
            wrong += walkers.born[k] == walkers.age
    generate.tidy(frames)
    length = len(starts) * steps * TIME_STEP / (1e3 * units.fs)
    log.info("%d walkers, %.1f ps, went wrong %d times: %.2f per ps", len(starts), length, wrong, wrong / length)
    return frames


def heated(found: Iterator[tuple[str, int, Atoms]], steps: int = RELAXATION) -> list[Start]:
    """Starts after a short relaxation, at the temperatures in turn."""
    return [
        Start(name, charge, TEMPERATURES[n % len(TEMPERATURES)], generate.relax(atoms, charge, steps))
        for n, (name, charge, atoms) in enumerate(found)
    ]


def protonated(rng: np.random.Generator) -> Iterator[tuple[str, int, Atoms]]:
    """H+(H2O)n, packed anew, and H5O2+ with its proton near the middle."""
    for n, count in PROTONATED.items():
        for _ in range(count):
            yield f"H+(H2O){n}", 1, clusters.packed(clusters.turned(clusters.HYDRONIUM, rng), n - 1, rng)
    for _ in range(SCANNED):
        yield "H+(H2O)2", 1, clusters.zundel(rng.uniform(2.3, 2.8), rng.uniform(-0.3, 0.3), rng)


def water(rng: np.random.Generator) -> Iterator[tuple[str, int, Atoms]]:
    """(H2O)n, packed anew."""
    for n, count in WATER.items():
        for _ in range(count):
            yield f"(H2O){n}", 0, clusters.packed(clusters.turned(generate.g2_molecule("H2O"), rng), n - 1, rng)


def trained_molecules(rng: np.random.Generator) -> Iterator[tuple[str, int, Atoms]]:
    """Molecules drawn from the training list."""
    for k in rng.choice(len(molecules.TRAINING), size=MOLECULES, replace=False):
        found = generate.conformers(molecules.TRAINING[k], 1)
        if found and len(found[0]) <= generate.LARGEST_FRAME:
            yield molecules.TRAINING[k], 0, found[0]


GROUPS: dict[str, tuple[Callable[[np.random.Generator], Iterator[tuple[str, int, Atoms]]], int]] = {
    "protonated": (protonated, 1500),
    "water": (water, 1000),
    "molecules": (trained_molecules, 600),
}  # starts, and steps of dynamics


def corrected(group: str, number: int, seed: int, potential: ScalarMACE, share: float) -> list[Atoms]:
    """All frames of one group in one round."""
    make, steps = GROUPS[group]
    rng = generate.generator(f"correction {seed} {number} {group}")
    frames = corrections(heated(make(rng)), potential, rng, round(share * steps))
    for frame in frames:
        frame.info |= {"config_type": "correction", "group": "correction", "split": "train", "round": number, "seed": seed}
    return frames


def main() -> None:
    """Writes one file per group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the present model")
    parser.add_argument("--round", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual length of the dynamics")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    RDLogger.DisableLog("rdApp.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    potential = ScalarMACE(train.continued(args.model, dict.fromkeys(train.ELEMENTS, 0.0)))  # forces need no atoms' energies
    for group in GROUPS:
        path = args.work / f"correction_{args.round}_{group}.xyz"
        if path.exists():
            continue
        began = time.perf_counter()
        frames = corrected(group, args.round, args.seed, potential, args.share)
        unfinished = path.with_suffix(".part")
        write(unfinished, frames, format="extxyz")
        unfinished.replace(path)
        recipes = Counter(x.info["recipe"] for x in frames)
        log.info("%s: %d frames %s, %.0f s", group, len(frames), dict(recipes), time.perf_counter() - began)


if __name__ == "__main__":
    main()
