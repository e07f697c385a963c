"""Systems whose level of theory, temperature or phase shifts, with every frame labelled: what the uncertainty is measured on.

From the data folder: ethanol, SPICE-trained MACE -> rMD17 (PBE/def2-SVP), tested on dynamics and far from it (O-H stretched off, normal
modes, dimers); Zundel cation, the same MACE fine-tuned to DFTB3 -> rPBE+D3; acetylacetone -> PBE+D3, labels of 300 K, tested at 300 and
600 K, on a proton transfer and a dihedral; dimethyl carbonate -> GFN2-xTB, tested on a trajectory that leaves the potential energy
surface near frame 40.  Made here: copper, a MACE of H2 on Cu -> EMT with stress, strained and shaken at 300 K, tested at 300 K and at
900 K with twice the strain.  (The stresses of the data folder's copper frames do not fit their energies, so a made target it is.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ase.io
import fine_tuning
import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from known import SPICE, Known, known, read, stacked

from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.records import Frames
from bnn_driver.units import KCAL_PER_MOL

KCAL = KCAL_PER_MOL
COPPER = "models/h2cu/MACE_model_swa.model"


@dataclass(frozen=True, eq=False)
class Shift:
    """A foundation potential and the level it is to learn."""

    name: str
    potential: StackedPotential
    pool: Known
    """Frames from which labels are taken, in order."""
    tests: dict[str, list[Known]]
    """Frames never learnt; several of other compositions, whose energies are then compared up to a constant each."""
    accuracy: float
    """eV, of the total energy."""
    force_accuracy: float
    """eV/Å, of a force component."""


def ethanol(data: Path, cache: Path) -> Shift:
    """SPICE -> PBE."""
    folder = data / "ethanol_rmd17"
    pool = read(folder / "train.xyz")
    pairs: dict[str, list[Atoms]] = {}
    for a in ase.io.read(folder / "test_dimers.xyz", ":"):
        pairs.setdefault(str(a.symbols), []).append(a)
    tests = {
        "dynamics": [read(folder / "test_MD.xyz", ":300")],
        "O-H removed": [read(folder / "test_H_removal.xyz")],
        "modes": [read(folder / f"test_norm_mode_{n}.xyz") for n in (874, 3005)],
        "dimers": [known(atoms) for atoms in pairs.values()],
    }
    return Shift("ethanol", stacked(data / SPICE, pool.frames.numbers), pool, tests, 0.5 * KCAL, 1.0 * KCAL)


def acetylacetone(data: Path, cache: Path) -> Shift:
    """SPICE -> PBE+D3, 300 K -> 600 K."""
    folder = data / "acac"
    pool = read(folder / "train_300K.xyz")
    tests = {
        "300 K": [read(folder / "test_MD_300K.xyz", ":150")],
        "600 K": [read(folder / "test_MD_600K.xyz", ":150")],
        "H transfer": [read(folder / "test_H_transfer.xyz")],
        "dihedral": [read(folder / "test_dihedral.xyz")],
    }
    return Shift("acetylacetone", stacked(data / SPICE, pool.frames.numbers), pool, tests, 1.0 * KCAL, 1.0 * KCAL)


def zundel(data: Path, cache: Path) -> Shift:
    """DFTB3 -> rPBE+D3; the foundation is made once and kept in the cache."""
    file = cache / "zundel_dftb3.npz"
    if file.exists():
        folder = data / "zundel_eigen_qbc"
        high = read(folder / "zundel_1000_rpbe-d3_aims.extxyz", energy="REF_energy", forces="REF_forces", charge=1)
        potential = stacked(data / SPICE, high.frames.numbers)
        with np.load(file) as kept:
            potential.weights = {name: torch.as_tensor(kept[name]) for name in potential.weights}
    else:
        potential, _, _ = fine_tuning.zundel(data)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, **{name: x.numpy() for name, x in potential.weights.items()})
        return zundel(data, cache)
    order = np.random.default_rng(0).permutation(len(high))
    return Shift("zundel", potential, high[order[:800]], {"dynamics": [high[order[800:]]]}, 0.25 * KCAL, 1.0 * KCAL)


def carbonate(data: Path, cache: Path) -> Shift:
    """SPICE -> GFN2-xTB, dimethyl carbonate."""
    folder = data / "solvent_xtb"
    atoms = []
    for name in ("train_200", "test", "train_53_gen1"):
        atoms += [a for a in ase.io.read(folder / f"solvent_xtb_{name}.xyz", ":") if a.get_chemical_formula() == "C3H6O3"]
    drift = read(folder / "mace02_md_100_xtb.xyz", energy="energy_xtb", forces="forces_xtb")
    pool = known(atoms, "energy_xtb", "forces_xtb")
    tests = {"drift, first 40": [drift[:40]], "drift, last 60": [drift[40:]]}
    return Shift("carbonate", stacked(data / SPICE, pool.frames.numbers), pool, tests, 1.0 * KCAL, 1.0 * KCAL)


def copper(data: Path, cache: Path) -> Shift:
    """A MACE of H2 on copper -> EMT: 8 atoms in strained cells."""
    pool = shaken_copper(150, 300.0, 0.02, 0)
    tests = {"300 K": [shaken_copper(80, 300.0, 0.02, 1)], "900 K": [shaken_copper(80, 900.0, 0.04, 2)]}
    potential = stacked(data / COPPER, pool.frames.numbers)
    return Shift("copper", potential, pool, tests, 0.1 * KCAL, 0.2 * KCAL)


def shaken_copper(count: int, temperature: float, strain: float, seed: int) -> Known:
    """Frames of EMT dynamics, each in a cell of its own.  Args: temperature: K.   strain: sd of its components."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        atoms = bulk("Cu", "fcc", a=3.6).repeat(2)
        change = rng.normal(0.0, strain, (3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.5 * (change + change.T)), scale_atoms=True)
        atoms.calc = EMT()
        MaxwellBoltzmannDistribution(atoms, temperature_K=2 * temperature, rng=rng)
        Langevin(atoms, 4 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng, fixcm=False).run(20)
        rows.append(
            (atoms.positions, atoms.cell.array, atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False))
        )
    positions, cells, energy, forces, stress = (np.array(x) for x in zip(*rows, strict=True))
    return Known(Frames(atoms.numbers, positions, cells), energy, forces, stress)


SHIFTS: dict[str, Callable[[Path, Path], Shift]] = {
    "ethanol": ethanol, "zundel": zundel, "carbonate": carbonate, "copper": copper, "acetylacetone": acetylacetone,
}  # fmt: skip
