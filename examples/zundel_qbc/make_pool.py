"""A pool of protonated water dimers: GFN2-xTB moves them at three temperatures, PySCF (or another oracle) labels them with their charge.

Nothing of it is an input from elsewhere.  Writes pool.extxyz beside this file, or another one (REF_energy eV, REF_forces eV/Å); the same
command goes on after a stop: frames and labels that are there are not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.optimize import BFGS
from tblite.ase import TBLite
from tqdm import tqdm

from bnn_driver.config import read_toml
from bnn_driver.executors.local import LocalExecutor
from bnn_driver.oracle import absolute_paths
from bnn_driver.records import Frames, LabelledFrame
from bnn_driver.store.dataset import LabelStore

HERE = Path(__file__).resolve().parent
CHARGE, SEED = 1, 20261122
TEMPERATURES = (150.0, 300.0, 600.0)
"""K: a cold one, that of a simulation, and one that shows what a simulation rarely sees."""
TIMESTEP, FRICTION, BETWEEN, SETTLING = 0.5 * units.fs, 0.01 / units.fs, 40, 400
SAME = 1e-9
"""Å"""
LIMIT = 600.0
"""s, for a label."""
ORACLE = {"kind": "pyscf", "pyscf": {"method": "rks", "xc": "pbe", "basis": "def2-svp"}}


def zundel() -> Atoms:
    """H5O2+, the proton in the middle, relaxed with GFN2-xTB."""
    water = np.array([[0.0, 0.0, 0.0], [-0.35, 0.78, 0.43], [-0.35, -0.78, 0.43]])
    other = water * [-1.0, 1.0, -1.0] + [2.4, 0.0, 0.0]
    atoms = Atoms("OH2OH2H", np.concatenate([water, other, [[1.2, 0.0, 0.0]]]))
    atoms.calc = TBLite(method="GFN2-xTB", charge=CHARGE, verbosity=0)
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=200)
    return atoms


def dynamics(start: Atoms, kelvin: float, count: int, rng: np.random.Generator) -> list[Atoms]:
    """`count` frames at one temperature."""
    atoms = start.copy()
    atoms.calc = start.calc
    atoms.set_momenta(rng.normal(size=(len(atoms), 3)) * np.sqrt(units.kB * kelvin * atoms.get_masses())[:, None])
    moved = Langevin(atoms, TIMESTEP, temperature_K=kelvin, friction=FRICTION, fixcm=False, rng=rng)
    moved.run(SETTLING)
    frames = []
    for _ in tqdm(range(count), desc=f"dynamics at {kelvin:g} K"):
        moved.run(BETWEEN)
        frames.append(Atoms(atoms.numbers, atoms.positions, info={"temperature": kelvin, "charge": CHARGE}))
    return frames


def read_frames(file: Path, count: int) -> list[Frames]:
    """The frames to be labelled, as they stand in a file that is made when it is not there."""
    if not file.exists():
        rng, start = np.random.default_rng(SEED), zundel()
        share = -(-count // len(TEMPERATURES))
        frames = [frame for kelvin in TEMPERATURES for frame in dynamics(start, kelvin, share, rng)]
        ase.io.write(file.with_suffix(".part"), frames, format="extxyz")
        file.with_suffix(".part").rename(file)
    return [Frames(atoms.numbers, atoms.positions[None], charge=CHARGE) for atoms in ase.io.read(file, ":", format="extxyz")]


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "pool.extxyz")
    parser.add_argument("--config", type=Path, help="a bnn.toml whose [oracle] labels; else PBE/def2-SVP by PySCF")
    options = parser.parse_args()
    oracle = read_toml(options.config)["oracle"] if options.config else ORACLE
    kind, base = oracle["kind"], (options.config or HERE).absolute().parent
    settings = absolute_paths(kind, oracle.get(kind, {}), base)
    work = options.output.parent / f"run_{options.output.stem}"
    work.mkdir(exist_ok=True)
    frames = read_frames(work / "frames.extxyz", options.frames)
    with LocalExecutor(kind, settings, options.workers, LIMIT, work, 1, work / "spool") as executor:
        store = LabelStore(work / f"labels_{executor.fingerprint[:12]}")  # of one level of theory
        todo = [frame for frame in frames if store.find(frame, executor.fingerprint, SAME) is None]
        waiting = [executor.submit(frame) for frame in todo]
        for frame, future in zip(
            tqdm(todo, desc="labels"), waiting, strict=True
        ):  # in this order, so that the pool is always the same
            store.write(LabelledFrame(frame, future.result()))
    print(f"{store.export_extxyz(options.output)} frames of H5O2+ in {options.output}")


if __name__ == "__main__":
    main()
