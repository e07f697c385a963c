"""Protonated water dimers that are known before the exploration: frames of short dynamics with GFN1-xTB, labelled by the oracle of bnn.toml.

Nothing of it is an input from elsewhere: the dimer is built, relaxed and moved here.  Writes known.extxyz beside this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.langevin import Langevin
from ase.optimize import BFGS

from bnn_driver.config import read_toml
from bnn_driver.oracle import Oracle, absolute_paths, load_oracle
from bnn_driver.records import Frames

HERE = Path(__file__).resolve().parent
KELVIN, FEMTOSECONDS, BETWEEN, SETTLING = 300.0, 0.5, 40, 200


class Labelled(Calculator):
    """An oracle of this program as an ASE calculator."""

    implemented_properties = ("energy", "forces")

    def __init__(self, oracle: Oracle, charge: int) -> None:
        super().__init__()
        self.oracle, self.charge = oracle, charge

    def calculate(self, atoms: Atoms | None = None, properties: object = None, system_changes: object = all_changes) -> None:
        """Label the frame."""
        super().calculate(atoms, properties, system_changes)
        label = self.oracle(Frames(self.atoms.numbers, self.atoms.positions[None], charge=self.charge))
        self.results = {"energy": label.energy, "forces": label.forces}


def zundel() -> Atoms:
    """H5O2+, the proton in the middle."""
    water = np.array([[0.0, 0.0, 0.0], [-0.35, 0.78, 0.43], [-0.35, -0.78, 0.43]])
    other = water * [-1.0, 1.0, -1.0] + [2.4, 0.0, 0.0]
    return Atoms("OH2OH2H", np.concatenate([water, other, [[1.2, 0.0, 0.0]]]))


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "bnn.toml")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--output", type=Path, default=HERE / "known.extxyz")
    options = parser.parse_args()
    config = read_toml(options.config)
    kind = config["oracle"]["kind"]
    oracle = load_oracle(kind, absolute_paths(kind, config["oracle"].get(kind, {}), options.config.absolute().parent))
    rng = np.random.default_rng(config["run"]["seed"])
    atoms = zundel()
    charge = config["system"]["charge"]
    atoms.calc = Labelled(load_oracle("tblite", {"method": "GFN1-xTB"}), charge)
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=200)
    atoms.set_momenta(rng.normal(size=(len(atoms), 3)) * np.sqrt(units.kB * KELVIN * atoms.get_masses())[:, None])
    friction = 0.01 / units.fs
    dynamics = Langevin(atoms, FEMTOSECONDS * units.fs, temperature_K=KELVIN, friction=friction, fixcm=False, rng=rng)
    dynamics.run(SETTLING)
    kept = []
    for _ in range(options.frames):
        dynamics.run(BETWEEN)
        label = oracle(Frames(atoms.numbers, atoms.positions[None], charge=charge))
        one = Atoms(atoms.numbers, atoms.positions)
        one.info |= {"REF_energy": label.energy, "charge": charge, "fingerprint": label.fingerprint}
        one.arrays["REF_forces"] = label.forces
        kept.append(one)
    ase.io.write(options.output, kept, format="extxyz")
    print(f"{len(kept)} frames of H5O2+ by {oracle.code} in {options.output}")


if __name__ == "__main__":
    main()
