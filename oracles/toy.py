"""Toy: an analytic potential, exact and free, for tests, tutorials and rehearsals of a slow code."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase.data import covalent_radii

from bnn_driver.errors import OracleConfigError
from bnn_driver.oracle import Capabilities, make_label, pairs_within
from bnn_driver.records import Array, Frames, Label
from bnn_driver.units import volume

COULOMB = 14.399645  # eV Å, e²/(4πε0)
HYDROGENS = (0.02, 1.8)
"""Depth (eV) and length (Å) of the well between two hydrogens, so that they do not bond."""
TETRAHEDRAL = -1.0 / 3.0
"""Cosine of the angle that the three-body term prefers."""
REACH = 1.5
"""The three-body term ends at this multiple of a bond length."""


@dataclass(frozen=True)
class Toy:
    """Morse pairs, harmonic in the cosine of bond angles, and a screened repulsion of the total charge.

    E = 1/2 Σ_ij f(r) {D [(1 - exp(-a (r - r_ij)))² - 1] + C q² exp(-r/Å)/r} + 1/2 Σ_i Σ_{j≠k} K w_ij w_ik (cos θ_jik + 1/3)²,
    with r_ij the sum of covalent radii, f = (1 - r²/cutoff²)³, w = (1 - r²/(1.5 r_ij)²)³, q² = (charge² + (multiplicity-1)²)/A².
    No reality is claimed beyond atoms that stay apart and molecules that stay together.
    """

    depth: float = field(default=3.0, metadata={"quantity": "energy"})
    """D, eV, of all pairs but two hydrogens."""
    steepness: float = 2.5
    """a, 1/Å."""
    bending: float = field(default=1.5, metadata={"quantity": "energy"})
    """K, eV."""
    cutoff: float = field(default=6.0, metadata={"quantity": "length"})
    """Å; energy and two derivatives vanish there."""
    delay: float = field(default=0.0, metadata={"quantity": "wall time"})
    """Seconds to sleep per label, to rehearse a slow code; not physics."""

    def __post_init__(self) -> None:
        if self.cutoff <= 0 or self.steepness <= 0 or self.delay < 0:
            raise OracleConfigError(
                "toy: cutoff and steepness must be positive and delay not negative, got "
                f"{self.cutoff} Å, {self.steepness} 1/Å, {self.delay} s"
            )

    @property
    def code(self) -> str:
        """Name and version of the formula."""
        return "toy 1"

    @property
    def capabilities(self) -> Capabilities:
        """Everything."""
        return Capabilities(stress=True, periodic=True, charge=True, spin=True)

    def physics(self) -> dict[str, Any]:
        """All but the delay."""
        return {
            "code": self.code,
            "depth": self.depth,
            "steepness": self.steepness,
            "bending": self.bending,
            "cutoff": self.cutoff,
        }

    def check(self, frame: Frames) -> None:
        """Any frame of known elements will do."""
        if frame.numbers.min() < 1 or frame.numbers.max() >= len(covalent_radii):
            raise OracleConfigError(
                f"toy: atomic numbers must be 1 to {len(covalent_radii) - 1}, got {sorted(set(frame.numbers.tolist()))}"
            )

    def __call__(self, frame: Frames) -> Label:
        """Energy, forces and (periodic) stress; exact derivatives of the formula above."""
        if self.delay > 0:
            time.sleep(self.delay)
        i, j, vectors = pairs_within(frame, self.cutoff)
        pair_energy, pair_gradient = self._pairs(frame, i, j, vectors)
        bend_energy, bend_gradient = self._bending(frame, i, j, vectors)
        gradient = pair_gradient + bend_gradient
        forces = np.zeros((len(frame.numbers), 3))
        np.add.at(forces, i, gradient)
        np.add.at(forces, j, -gradient)
        stress = None
        if frame.cell is not None:
            stress = gradient.T @ vectors / volume(frame.cell[0])
            stress = (stress + stress.T) / 2
        return make_label(self, frame, pair_energy + bend_energy, forces, stress, evidence="analytic")

    def _well(self, frame: Frames, i: Array, j: Array) -> tuple[Array, Array, Array]:
        """Depth (P,) eV, length (P,) Å and whether both are hydrogens (P,)."""
        both = (frame.numbers[i] == 1) & (frame.numbers[j] == 1)
        bond = covalent_radii[frame.numbers[i]] + covalent_radii[frame.numbers[j]]
        return np.where(both, HYDROGENS[0], self.depth), np.where(both, HYDROGENS[1], bond), both

    def _pairs(self, frame: Frames, i: Array, j: Array, vectors: Array) -> tuple[float, Array]:
        """Energy, eV, and its derivative (P, 3) eV/Å by the vector of each ordered pair."""
        depth, length, _ = self._well(frame, i, j)
        r = np.linalg.norm(vectors, axis=1)
        decay = np.exp(-self.steepness * (r - length))
        screened = COULOMB * (frame.charge**2 + (frame.multiplicity - 1) ** 2) / len(frame.numbers) ** 2 * np.exp(-r) / r
        value = depth * ((1 - decay) ** 2 - 1) + screened
        slope = 2 * depth * self.steepness * (1 - decay) * decay - screened * (1 + 1 / r)
        fade, fade_slope = _fade(r, np.full_like(r, self.cutoff))
        gradient = 0.5 * (slope * fade + value * fade_slope)
        return 0.5 * float(value @ fade), (gradient / r)[:, None] * vectors

    def _bending(self, frame: Frames, i: Array, j: Array, vectors: Array) -> tuple[float, Array]:
        """As `_pairs`, of the sum over two neighbours of one atom."""
        _, length, both = self._well(frame, i, j)
        r = np.linalg.norm(vectors, axis=1)
        gradient = np.zeros_like(vectors)
        bonded = np.nonzero((r < REACH * length) & ~both)[0]
        if len(bonded) == 0:
            return 0.0, gradient
        centre, r, unit = i[bonded], r[bonded], vectors[bonded] / r[bonded, None]
        weight, weight_slope = _fade(r, REACH * length[bonded])
        shared = (centre[:, None] == centre[None, :]) & ~np.eye(len(bonded), dtype=bool)
        cosine = unit @ unit.T
        off = np.where(shared, cosine - TETRAHEDRAL, 0.0)
        energy = 0.5 * self.bending * float(weight @ off**2 @ weight)
        radial = weight_slope * (off**2 @ weight)
        turning = 2 * weight[:, None] * off * weight[None, :]
        across = turning @ unit - (turning * cosine).sum(axis=1)[:, None] * unit
        gradient[bonded] = self.bending * (radial[:, None] * unit + across / r[:, None])
        return energy, gradient


def _fade(r: Array, end: Array) -> tuple[Array, Array]:
    """(1 - r²/end²)³ and its derivative by r, both zero beyond the end."""
    inside = np.clip(1 - (r / end) ** 2, 0.0, None)
    return inside**3, -6 * r / end**2 * inside**2
