"""Trajectories of which every frame has a label: what a run would see, for replays through the real policy.

    ethanol PBE        rMD17 at 500 K, frames drawn at random: no neighbours in time, a MACE of 16 channels of SPICE -> PBE/def2-SVP
    ethanol            10 ps of Langevin dynamics at 300 K, one frame in 5 fs, the same -> GFN1-xTB, made here; conformers change
    zundel             DFTB3 -> rPBE+D3, frames drawn at random
    carbonate          100 frames of a dynamics that leaves the potential energy surface near frame 40, SPICE -> GFN2-xTB
    copper             100 strained cells at 300 K, then 60 at 900 K with twice the strain, MACE of H2 on copper -> EMT

Trajectories that are made here are kept in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shifts
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from known import Known, read, shuffled, stacked
from shifts import KCAL
from tblite.ase import TBLite

from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.records import Array, Frames

SMALL = "models/mace_spice/organic10_16ch_mace0316_float64.model"
STEP = 1.0
"""fs."""
ACCURACY = {"ethanol PBE": 1.0, "ethanol": 0.5, "zundel": 0.5, "carbonate": 2.0, "copper": 0.5}
"""kcal/mol, of the total energy."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Frames in the order in which a run would meet them."""

    name: str
    potential: StackedPotential
    frames: Known
    accuracy: float
    """eV."""
    force_accuracy: float
    """eV/Å, length of the error vector of an atom."""
    interval: float | None = None
    """fs between frames; None: they are not neighbours in time."""


def ethanol_pbe(data: Path, cache: Path, seed: int) -> Trajectory:
    """rMD17."""
    frames = shuffled(read(data / "ethanol_rmd17" / "train.xyz"), seed)
    return Trajectory(
        "ethanol PBE", stacked(data / SMALL, frames.frames.numbers), frames, ACCURACY["ethanol PBE"] * KCAL, 3.0 * KCAL
    )


def ethanol_dynamics(data: Path, cache: Path, seed: int) -> Trajectory:
    """Langevin dynamics with GFN1-xTB from a frame of rMD17; friction 1/(100 fs)."""
    file = cache / f"ethanol_gfn1_{seed}.npz"
    if not file.exists():
        begin = read(data / "ethanol_rmd17" / "train.xyz", ":1").frames
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, **langevin(begin, "GFN1-xTB", 300.0, 10_000, 5, seed))
    with np.load(file) as kept:
        known = Known(Frames(kept["numbers"], kept["positions"]), kept["energy"], kept["forces"])
    return Trajectory(
        "ethanol", stacked(data / SMALL, known.frames.numbers), known, ACCURACY["ethanol"] * KCAL, 3.0 * KCAL, 5 * STEP
    )


def langevin(begin: Frames, method: str, temperature: float, steps: int, every: int, seed: int) -> dict[str, Array]:
    """Arrays of a trajectory, labelled by the method that moves it, after 1 ps.  Args: temperature: K.   every: steps per frame."""
    atoms, rng = Atoms(begin.numbers, begin.positions[0]), np.random.default_rng(seed)
    atoms.calc = TBLite(method=method, accuracy=0.1, verbosity=0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    dynamics = Langevin(atoms, STEP * units.fs, temperature_K=temperature, friction=0.01 / units.fs, rng=rng, fixcm=False)
    dynamics.run(round(1000 / STEP))
    rows = []
    for _ in range(steps // every):
        dynamics.run(every)
        rows.append((atoms.get_positions(), atoms.get_potential_energy(), atoms.get_forces()))
    positions, energy, forces = (np.array(column) for column in zip(*rows, strict=True))
    return {"numbers": begin.numbers, "positions": positions, "energy": energy, "forces": forces}


def zundel(data: Path, cache: Path, seed: int) -> Trajectory:
    """Frames of the pool in another order for each seed."""
    shift = shifts.zundel(data, cache)
    return Trajectory("zundel", shift.potential, shuffled(shift.pool, seed), ACCURACY["zundel"] * KCAL, 3.0 * KCAL)


def carbonate(data: Path, cache: Path, seed: int) -> Trajectory:
    """The drifting trajectory; the seed changes the chains only."""
    folder = data / "solvent_xtb"
    drift = read(folder / "mace02_md_100_xtb.xyz", energy="energy_xtb", forces="forces_xtb")
    return Trajectory("carbonate", shifts.carbonate(data, cache).potential, drift, ACCURACY["carbonate"] * KCAL, 5.0 * KCAL)


def copper(data: Path, cache: Path, seed: int) -> Trajectory:
    """A jump of temperature and strain."""
    parts = shifts.shaken_copper(100, 300.0, 0.02, 10 + seed), shifts.shaken_copper(60, 900.0, 0.04, 20 + seed)
    a, b = parts
    frames = Frames(a.frames.numbers, _both(a.frames.positions, b.frames.positions), _both(a.frames.cell, b.frames.cell))
    known = Known(frames, _both(a.energy, b.energy), _both(a.forces, b.forces), _both(a.stress, b.stress))
    return Trajectory("copper", shifts.copper(data, cache).potential, known, ACCURACY["copper"] * KCAL, 2.0 * KCAL)


def _both(a: Array | None, b: Array | None) -> Array:
    if a is None or b is None:
        raise ValueError("both parts need all labels")
    return np.concatenate([a, b])


TRAJECTORIES: dict[str, Callable[[Path, Path, int], Trajectory]] = {
    "ethanol PBE": ethanol_pbe, "ethanol": ethanol_dynamics, "zundel": zundel, "carbonate": carbonate, "copper": copper,
}  # fmt: skip


def conformer(positions: Array) -> Array:
    """Index of ethanol's well of the C-C-O-H torsion in rMD17's order: 0 gauche+, 1 trans, 2 gauche-.  Args: positions: (B, 9, 3) Å."""
    methyl, carbon, o, h = (positions[:, i] for i in (1, 0, 2, 8))
    return (torsion(methyl, carbon, o, h) % 360 // 120).astype(int)


def torsion(a: Array, b: Array, c: Array, d: Array) -> Array:
    """Angle a-b-c-d in degrees, 180 for trans.  Args: (B, 3) each."""
    u, v, w = b - a, c - b, d - c
    first, second = np.cross(u, v), np.cross(v, w)
    y = np.einsum("bi,bi->b", u, second) * np.linalg.norm(v, axis=1)
    return np.degrees(np.arctan2(y, np.einsum("bi,bi->b", first, second)))
