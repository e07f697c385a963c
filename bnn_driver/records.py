"""The nouns: frozen records with shape and unit on every field.

Axes: M members, B frames (beads), A atoms.  Units: eV, Å, eV/Å, eV/Å^3.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from bnn_driver.errors import BnnError

Array = np.ndarray
Criterion = Literal["none", "first", "energy", "force", "audit"]


@dataclass(frozen=True, eq=False)
class Frames:
    """A batch of B structures of the same atoms."""

    numbers: Array
    """(A,) int, atomic numbers."""
    positions: Array
    """(B, A, 3) Å."""
    cell: Array | None = None
    """(B, 3, 3) Å, vectors in rows; None for molecules in vacuum."""
    charge: int = 0
    """Total charge in units of e."""
    multiplicity: int = 1
    """Spin multiplicity 2S+1."""

    def __post_init__(self) -> None:
        b = len(self.positions)
        if self.positions.shape != (b, len(self.numbers), 3):
            raise BnnError(f"positions have shape {self.positions.shape}, expected (B, {len(self.numbers)}, 3)")
        if self.cell is not None and self.cell.shape != (b, 3, 3):
            raise BnnError(f"cell has shape {self.cell.shape}, expected ({b}, 3, 3)")

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def periodic(self) -> bool:
        """True in all three directions or in none."""
        return self.cell is not None

    def __getitem__(self, index: int | slice | Array) -> Frames:
        """The frames of `index`; an int gives a batch of one."""
        rows = slice(index, index + 1 or None) if isinstance(index, int) else index
        cell = None if self.cell is None else self.cell[rows]
        return replace(self, positions=self.positions[rows], cell=cell)

    def content_id(self, fingerprint: str) -> str:
        """Hash of the one frame and of the oracle's settings: the name of its label.

        Positions enter rounded to 1e-6 Å, as 64-bit integers.
        """
        if len(self) != 1:
            raise BnnError(f"a content id belongs to one frame, but this batch has {len(self)}")
        digest = hashlib.sha256(fingerprint.encode())
        digest.update(np.asarray(self.numbers, dtype="<i8").tobytes())
        for x in (self.positions, self.cell):
            digest.update(b"none" if x is None else np.rint(x * 1e6).astype("<i8").tobytes())
        digest.update(f"{self.charge} {self.multiplicity}".encode())
        return digest.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What M members say about B frames, and what follows for the mean and its uncertainty."""

    energy: Array
    """(M, B) eV."""
    forces: Array
    """(M, B, A, 3) eV/Å."""
    virial: Array
    """(M, B, 3, 3) eV, W = -dU/dε = Σ f⊗r (i-PI's sign, not divided by the volume)."""
    energy_noise_sd: Array
    """(M, B) eV, each member's sd of a label's energy; with what the distance to the labels adds."""
    force_noise_sd: Array
    """(M, B, A) eV/Å, each member's sd of a label's force components."""
    generation: int = 0
    """The generation of weights that made it."""

    def __getitem__(self, rows: slice) -> Prediction:
        """What is said of some of the frames."""
        return Prediction(
            self.energy[:, rows], self.forces[:, rows], self.virial[:, rows], self.energy_noise_sd[:, rows], self.force_noise_sd[:, rows],
            self.generation,
        )  # fmt: skip

    @property
    def members(self) -> int:
        """M."""
        return len(self.energy)

    # Every step pays for what follows, with cold caches, where plain sums take two thirds of the time of `mean` and `var`.
    @cached_property
    def mean_energy(self) -> Array:
        """(B,) eV."""
        return np.add.reduce(self.energy, axis=0) / self.members

    @cached_property
    def mean_forces(self) -> Array:
        """(B, A, 3) eV/Å."""
        return np.add.reduce(self.forces, axis=0) / self.members

    @cached_property
    def mean_virial(self) -> Array:
        """(B, 3, 3) eV."""
        return np.add.reduce(self.virial, axis=0) / self.members

    @property
    def energy_posterior_sd(self) -> Array:
        """(B,) eV, spread of the members (ddof 1)."""
        return self.energy.std(axis=0, ddof=1)

    @cached_property
    def energy_predictive_sd(self) -> Array:
        """(B,) eV, sqrt(var_m(E) + mean_m(noise_sd²)): law of total variance."""
        spread = np.add.reduce((self.energy - self.mean_energy) ** 2, axis=0) / (self.members - 1)
        return np.sqrt(spread + np.add.reduce(self.energy_noise_sd**2, axis=0) / self.members)

    @property
    def force_posterior_sd(self) -> Array:
        """(B, A, 3) eV/Å, spread of the members per component (ddof 1)."""
        return self.forces.std(axis=0, ddof=1)

    @cached_property
    def force_predictive_sd(self) -> Array:
        """(B, A, 3) eV/Å, spread and noise of each component added in variance."""
        noise = np.mean(self.force_noise_sd**2, axis=0)[..., None]
        return np.sqrt(self.forces.var(axis=0, ddof=1) + noise)


@dataclass(frozen=True)
class Decision:
    """What is done with one frame."""

    ask: bool
    """True: the oracle labels the frame and its forces move it; False: the ensemble mean does."""
    criterion: Criterion
    """Why it is asked (or audited); "none" when it is only served."""
    probability: float
    """The largest calibrated P(|error| >= accuracy) over the criteria; 1 on the first frame."""
    energy_predictive_sd: float
    """eV, before calibration."""
    atom: int | None = None
    """The atom whose force fired the criterion."""


@dataclass(frozen=True, eq=False)
class Label:
    """A converged ab initio result; an unconverged one is never a Label."""

    energy: float
    """eV, the energy consistent with the forces (free energy at finite electronic temperature)."""
    forces: Array
    """(A, 3) eV/Å."""
    stress: Array | None
    """(3, 3) eV/Å^3 with ASE's sign, or None."""
    code: str
    """Name and version of the code."""
    fingerprint: str
    """Hash of every setting that fixes the level of theory."""
    frame_id: str
    """`Frames.content_id` of the structure."""
    evidence: str
    """What said that it converged, such as "mf.converged"."""
    rung: int = 0
    """Rung of the fallback ladder; 0 is the plain calculation."""
    seconds: float = 0.0
    """Wall time."""


@dataclass(frozen=True, eq=False)
class LabelledFrame:
    """A label with its structure and with what was believed before it came."""

    frame: Frames
    """B = 1."""
    label: Label
    context: dict[str, Any] = field(default_factory=dict)
    """Facts of the decision: step, bead, criterion, audit, generation, probability, predicted_energy, energy_predictive_sd,
    foundation_energy (eV; all energies of the model, without offset), and arrays predicted_forces, force_predictive_sd,
    foundation_forces (A, 3)."""


@dataclass(frozen=True, eq=False)
class Generation:
    """The weights of all members after an update of the chains."""

    number: int
    """0 is the foundation model itself, repeated."""
    weights: dict[str, Array]
    """name -> (M, ...) float arrays, every sampled weight."""
    label_ids: tuple[str, ...]
    """`frame_id` of the labels learnt, in order."""
    state: dict[str, Any] = field(default_factory=dict)
    """JSON-able: seeds, settings, diagnostics of the update."""
