"""Frames with known labels, and the fast path of a model file for their atoms: what every benchmark on real data starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms

from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.mace import load_mace
from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.records import Array, Frames, Label, LabelledFrame

SPICE = "models/mace_spice/MACE_SPICE_mace0316_float64.model"


@dataclass(frozen=True, eq=False)
class Known:
    """Frames of the same atoms with their labels."""

    frames: Frames
    energy: Array
    """(B,) eV."""
    forces: Array | None = None
    """(B, A, 3) eV/Å."""
    stress: Array | None = None
    """(B, 3, 3) eV/Å^3, ASE's sign."""

    def __len__(self) -> int:
        return len(self.energy)

    def __getitem__(self, rows: slice | Array) -> Known:
        def part(x: Array | None) -> Array | None:
            return None if x is None else x[rows]

        return Known(self.frames[rows], self.energy[rows], part(self.forces), part(self.stress))

    def label(self, i: int, context: Mapping[str, object]) -> LabelledFrame:
        """Frame i as the trainer sees it."""
        frame = self.frames[i]
        name = frame.content_id("benchmark")
        stress = None if self.stress is None else self.stress[i]
        forces = np.zeros_like(frame.positions[0]) if self.forces is None else self.forces[i]
        label = Label(float(self.energy[i]), forces, stress, "file", "benchmark", name, "file")
        return LabelledFrame(frame, label, dict(context))

    def labels(self, foundation_energy: float) -> list[LabelledFrame]:
        """All frames.  Args: foundation_energy: eV, of the first; it fixes the constant between two codes."""
        return [self.label(i, {"foundation_energy": foundation_energy}) for i in range(len(self))]


def known(atoms: list[Atoms], energy: str = "energy", forces: str = "forces", charge: int = 0) -> Known:
    """Labels of ase's atoms, from their info and arrays or their calculators; no forces where there are none."""
    frames = Frames(atoms[0].numbers, np.array([a.positions for a in atoms]), None, charge)
    energies = np.array([a.info[energy] if energy in a.info else a.get_potential_energy() for a in atoms], dtype=float)
    if forces in atoms[0].arrays:
        return Known(frames, energies, np.array([a.arrays[forces] for a in atoms]))
    has = atoms[0].calc is not None and "forces" in atoms[0].calc.results
    return Known(frames, energies, np.array([a.get_forces() for a in atoms]) if has else None)


def read(file: Path, rows: str = ":", energy: str = "energy", forces: str = "forces", charge: int = 0) -> Known:
    """One file of one composition."""
    return known(ase.io.read(file, rows), energy, forces, charge)


def shuffled(pool: Known, seed: int) -> Known:
    """The pool in another order: other labels for another seed."""
    return pool[np.random.default_rng(seed).permutation(len(pool))]


def stacked(model: Path, numbers: Array) -> StackedPotential:
    """The fast path of a model file, float32, for these atoms."""
    return make_potential(load_mace(model).module, numbers, torch.float32, "cpu", "stacked")
