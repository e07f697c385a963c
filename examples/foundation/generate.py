"""Makes the training structures of the embedded model and labels them with GFN2-xTB.

    python generate.py --out WORK      writes WORK/{train,valid,test}.xyz

Needs rdkit and tblite.  Energies eV, forces eV/Å; each frame names its group, molecule and recipe.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path

import clusters
import molecules
import numpy as np
from ase import Atoms, units
from ase.build import molecule as g2_molecule
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.neighborlist import natural_cutoffs, neighbor_list
from ase.optimize import BFGS
from rdkit import Chem, RDLogger
from rdkit.Chem import AllChem
from tblite.ase import TBLite
from tblite.interface import Calculator

log = logging.getLogger("foundation.generate")

SEED = 20260  # all random numbers follow from this and the molecule's name
LARGEST_FORCE = 25.0  # eV/Å
LARGEST_FRAME = 26  # atoms
DISTORTIONS = (0.02, 0.05, 0.1, 0.15)  # Å, sd per component
TEMPERATURES = (400.0, 1000.0)  # K
CONFORMERS = 2
PAIRS = 420
VALID_SHARE, TEST_SHARE = 0.03, 0.04


def generator(name: str) -> np.random.Generator:
    """A random stream of one molecule, independent of the order of the list."""
    return np.random.default_rng([SEED, zlib.crc32(name.encode())])


def label(atoms: Atoms, charge: int) -> Atoms | None:
    """The frame with REF_energy (eV) and REF_forces (eV/Å), or None where the calculation fails or a force is above 25 eV/Å."""
    calculator = Calculator("GFN2-xTB", atoms.numbers, atoms.positions / units.Bohr, charge=float(charge), uhf=0)
    calculator.set("verbosity", 0)
    try:
        result = calculator.singlepoint()
    except RuntimeError:  # tblite's way to say that the charges did not converge
        return None
    forces = -result.get("gradient") * units.Hartree / units.Bohr
    if not np.isfinite(forces).all() or np.linalg.norm(forces, axis=1).max() > LARGEST_FORCE:
        return None
    frame = Atoms(atoms.numbers, atoms.positions)
    frame.info["REF_energy"] = float(result.get("energy")) * units.Hartree
    frame.info["charge"] = charge
    frame.arrays["REF_forces"] = forces
    return frame


def conformers(smiles: str, count: int) -> list[Atoms]:
    """Up to `count` conformers of a SMILES, from rdkit's ETKDG; empty where rdkit finds none."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    ids = AllChem.EmbedMultipleConfs(mol, numConfs=count, randomSeed=SEED)
    numbers = [a.GetAtomicNum() for a in mol.GetAtoms()]
    return [Atoms(numbers, mol.GetConformer(i).GetPositions()) for i in ids]


def relax(atoms: Atoms, charge: int, steps: int = 80) -> Atoms:
    """The structure after at most `steps` BFGS steps at the GFN2-xTB level."""
    atoms = atoms.copy()
    atoms.calc = TBLite(method="GFN2-xTB", charge=charge, verbosity=0)
    BFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.03, steps=steps)
    return Atoms(atoms.numbers, atoms.positions)


def dynamics(
    atoms: Atoms, charge: int, temperature: float, rng: np.random.Generator, steps: int, every: int, start: int = 20
) -> Iterator[Atoms]:
    """Structures along a Langevin run (1 fs, friction 0.02/fs) after `start` steps, one per `every` steps."""
    atoms = atoms.copy()
    atoms.calc = TBLite(method="GFN2-xTB", charge=charge, verbosity=0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=1.5 * temperature, rng=rng)
    run = Langevin(atoms, 1.0 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng, fixcm=False)
    try:
        for _ in run.irun(steps=steps):
            if run.nsteps > start and run.nsteps % every == 0:
                yield Atoms(atoms.numbers, atoms.positions)
    except RuntimeError:
        return


def distorted(atoms: Atoms, rng: np.random.Generator, sds: Iterable[float]) -> Iterator[Atoms]:
    """The structure with normal noise of each sd (Å)."""
    for sd in sds:
        yield Atoms(atoms.numbers, atoms.positions + sd * rng.standard_normal(atoms.positions.shape))


def scaled_bonds(atoms: Atoms, rng: np.random.Generator, count: int) -> Iterator[Atoms]:
    """Structures with one bond scaled by 0.78 to 1.7 (the smaller side moves as a whole), then noise of 0.03 Å."""
    i, j = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.15))
    bonds = [(a, b) for a, b in zip(i, j, strict=True) if a < b]
    if not bonds:
        return
    for _ in range(count):
        a, b = bonds[rng.integers(len(bonds))]
        side = moving_side(len(atoms), [x for x in bonds if x != (a, b)], b)
        if a in side:  # a ring: move the atom alone
            side = {b}
        factor = rng.uniform(0.78, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, 1.7)
        positions = atoms.positions + 0.03 * rng.standard_normal(atoms.positions.shape)
        positions[list(side)] += (factor - 1.0) * (atoms.positions[b] - atoms.positions[a])
        yield Atoms(atoms.numbers, positions)


def moving_side(n_atoms: int, bonds: list[tuple[int, int]], start: int) -> set[int]:
    """The atoms that hang together with `start` through `bonds`."""
    reached, waiting = {start}, [start]
    while waiting:
        here = waiting.pop()
        for a, b in bonds:
            other = b if a == here else a if b == here else None
            if other is not None and other not in reached:
                reached.add(other)
                waiting.append(other)
    return reached


def rescaled(atoms: Atoms, rng: np.random.Generator, count: int) -> Iterator[Atoms]:
    """The whole structure scaled by 0.88 to 1.15."""
    for _ in range(count):
        yield Atoms(atoms.numbers, atoms.positions * rng.uniform(0.88, 1.15))


def frames_of(name: str, starts: list[Atoms], charge: int, thorough: int) -> Iterator[tuple[str, Atoms]]:
    """(recipe, structure) of one molecule or cluster; `thorough` multiplies the counts."""
    rng = generator(name)
    for start in starts:
        minimum = relax(start, charge)
        share = thorough / len(starts)
        yield "minimum", minimum
        for temperature in TEMPERATURES:
            kept = max(4, round(10 * share))
            for x in dynamics(minimum, charge, temperature, rng, 20 + 12 * kept, 12):
                yield f"md{temperature:.0f}", x
        for x in distorted(minimum, rng, DISTORTIONS * max(1, round(2 * share))):
            yield "noise", x
        for x in scaled_bonds(minimum, rng, max(2, round(5 * share))):
            yield "bond", x
        for x in rescaled(minimum, rng, max(1, round(2 * share))):
            yield "scale", x


def pair(a: Atoms, b: Atoms, rng: np.random.Generator) -> Atoms:
    """Two molecules in random orientation with a shortest distance drawn from 1.5 to 4 Å."""
    wanted = 1.5 + 2.5 * rng.random() ** 1.5
    a, b = clusters.turned(a, rng), clusters.turned(b, rng)
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction)
    shift = 0.0
    while np.linalg.norm(a.positions[:, None] - (b.positions + shift * direction)[None], axis=-1).min() < wanted:
        shift += 0.05
    b.positions += shift * direction
    return a + b


def pairs(minima: dict[str, Atoms], count: int, name: str) -> Iterator[tuple[str, str, Atoms]]:
    """(molecule, recipe, structure) of random pairs: as drawn, and along 500 K dynamics from there."""
    rng = generator(name)
    small = [k for k, v in minima.items() if len(v) <= 13]
    likely = np.array([4.0 if k in molecules.EMPHASISED else 1.0 for k in small])
    for _ in range(count):
        one, two = rng.choice(small, size=2, p=likely / likely.sum())
        both = pair(minima[one], minima[two], rng)
        if len(both) > LARGEST_FRAME:
            continue
        yield f"{one}.{two}", "drawn", both
        for x in dynamics(both, 0, 500.0, rng, 80, 40, start=0):
            yield f"{one}.{two}", "md500", x


def split_of(rng: np.random.Generator, held_out: bool) -> str:
    """train, valid, test_frame (its molecule is in training) or held_out (nothing that grew from the same start is)."""
    if held_out:
        return "held_out"
    u = rng.random()
    return "valid" if u < VALID_SHARE else "test_frame" if u < VALID_SHARE + TEST_SHARE else "train"


def molecule_frames(smiles: Iterable[str], held_out: bool) -> tuple[list[Atoms], dict[str, Atoms]]:
    """Labelled frames of single molecules, and one minimum of each."""
    frames, minima = [], {}
    for name in smiles:
        starts = [x for x in conformers(name, CONFORMERS) if len(x) <= LARGEST_FRAME]
        if not starts:
            log.warning("no structure for %s", name)
            continue
        rng = generator("split " + name)
        found = list(frames_of(name, starts, 0, 3 if name in molecules.EMPHASISED else 1))
        minima[name] = found[0][1]
        frames += list(labelled(((name, r, x) for r, x in found), "molecules", 0, rng, held_out))
    return frames, minima


def labelled(
    structures: Iterable[tuple[str, str, Atoms]], group: str, charge: int, rng: np.random.Generator, held_out: bool
) -> Iterator[Atoms]:
    """The structures that could be labelled, with their group, molecule, recipe and split."""
    for name, recipe, atoms in structures:
        frame = label(atoms, charge)
        if frame is not None:
            frame.info |= {"group": group, "molecule": name, "recipe": recipe, "split": split_of(rng, held_out)}
            yield frame


def cluster_frames(make: dict[str, list[Atoms]], group: str, charge: int, thorough: int) -> list[Atoms]:
    """Labelled frames of clusters; all that grows from the first start of each size is held out."""
    frames: list[Atoms] = []
    for name, starts in make.items():
        for k, start in enumerate(starts):
            found = ((name, r, x) for r, x in frames_of(f"{name} {k}", [start], charge, thorough))
            frames += list(labelled(found, group, charge, generator(f"split {name} {k}"), k == 0))
    return frames


def g2_frames() -> list[Atoms]:
    """G2 reference geometries, plain and with 0.05 Å noise: all held out."""
    rng = generator("g2")
    structures = []
    for name in molecules.G2_NAMES:
        atoms = g2_molecule(name)
        structures += [(name, "g2", atoms), *((name, "noise", x) for x in distorted(atoms, rng, [0.05]))]
    return list(labelled(structures, "g2", 0, rng, True))


def atom_energies() -> list[Atoms]:
    """Isolated atoms in their ground-state spin, the E0s of the model."""
    frames = []
    for number, unpaired in ((1, 1), (6, 2), (7, 3), (8, 2)):
        calculator = Calculator("GFN2-xTB", np.array([number]), np.zeros((1, 3)), uhf=unpaired)
        calculator.set("verbosity", 0)
        atom = Atoms([number], np.zeros((1, 3)))
        atom.info |= {"REF_energy": float(calculator.singlepoint().get("energy")) * units.Hartree, "config_type": "IsolatedAtom"}
        atom.info |= {"group": "atoms", "split": "train"}
        atom.arrays["REF_forces"] = np.zeros((1, 3))
        frames.append(atom)
    return frames


def main() -> None:
    """Writes the three files and a count per group and split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--small", type=int, default=0, help="use only this many molecules, for a trial")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    RDLogger.DisableLog("rdApp.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    limit = args.small or None

    frames, minima = molecule_frames(molecules.TRAINING[:limit], held_out=False)
    log.info("%d frames of molecules", len(frames))
    held, held_minima = molecule_frames(molecules.HELD_OUT[:limit], held_out=True)
    frames += held
    frames += labelled(pairs(minima, args.small or PAIRS, "pairs"), "pairs", 0, generator("split pairs"), False)
    frames += labelled(pairs(held_minima, args.small or PAIRS // 8, "held-out pairs"), "pairs", 0, generator("held"), True)
    log.info("%d with held-out molecules and pairs", len(frames))
    frames += cluster_frames(clusters.water(generator("water")), "water", 0, 1)
    frames += cluster_frames(clusters.protonated(generator("protonated")), "protonated", 1, 1)
    for name, charge, structures in clusters.proton_scans(generator("scan")):
        group = "protonated" if charge else "pairs"
        found = ((name, "scan", x) for x in structures)
        frames += list(labelled(found, group, charge, generator(f"split {name}"), False))
    frames += g2_frames()
    log.info("%d with clusters and G2, %.0f s", len(frames), time.perf_counter() - began)

    tidy(frames)
    train = [x for x in frames if x.info["split"] == "train"]
    order = generator("order").permutation(len(train))
    write(args.out / "train.xyz", [*atom_energies(), *(train[k] for k in order)], format="extxyz")
    write(args.out / "valid.xyz", [x for x in frames if x.info["split"] == "valid"], format="extxyz")
    write(args.out / "test.xyz", [x for x in frames if x.info["split"] in ("test_frame", "held_out")], format="extxyz")
    for group, split in sorted({(x.info["group"], x.info["split"]) for x in frames}):
        of = [x for x in frames if (x.info["group"], x.info["split"]) == (group, split)]
        log.info("%-12s %-10s %5d frames %6d atoms", group, split, len(of), sum(map(len, of)))


def tidy(frames: list[Atoms]) -> None:
    """Removes in place single atoms and frames that fell apart into nothing bonded closer than 4 Å."""
    frames[:] = [x for x in frames if len(x) > 1 and connected(x, 4.0)]


def connected(atoms: Atoms, reach: float) -> bool:
    """Whether all atoms hang together through distances below `reach` (Å)."""
    d = atoms.get_all_distances()
    close = [(a, b) for a, b in combinations(range(len(atoms)), 2) if d[a, b] < reach]
    return len(moving_side(len(atoms), close, 0)) == len(atoms)


if __name__ == "__main__":
    main()
