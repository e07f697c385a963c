"""Whether energies, forces and stress belong together: along a line the energy must rise by the integral of its slope.

Three labels, at -h, 0 and h, give both halves of the line by the rule of Adams and Moulton,

    E(h) - E(0) = h/12 [5 s(h) + 8 s(0) - s(-h)] + O(h^4),

with the slope s = -F·e (forces) or V σ:ε (stress).  Other than a central difference at one point it also sees a wrong scale of
the forces at a minimum, where they vanish, and needs no small h: rounding and the SCF's noise count for less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bnn_driver.records import Array, Frames, Label, Prediction
from bnn_driver.units import volume

DISPLACEMENT = 0.01
"""Å by which the furthest atom moves for a label."""
STRAIN = 0.005
"""Norm of the strain for a label."""
FORCE_TOLERANCE = 5e-3
"""eV/Å; what labels may differ along a unit direction, as much as `Limits.max_net_force` lets forces add up to."""
STRESS_TOLERANCE = 5e-4
"""eV/Å^3 (0.08 GPa)."""
MODEL_DISPLACEMENT = 0.05
MODEL_POINTS = 9
"""Of the line for a potential, on which a frame costs little; 4 n + 1."""
MODEL_TOLERANCE = 1e-2
"""eV/Å; energies in float32 leave 1e-3."""


@dataclass(frozen=True, eq=False)
class Line:
    """A straight line of structures through a frame, at parameters -h, 0 and h."""

    what: str
    """"forces" or "stress"."""
    frame: Frames
    direction: Array
    """(A, 3), of norm 1, or a symmetric strain (3, 3) of norm 1."""
    h: float
    """Å, or the norm of the strain."""
    path: str
    """In words."""

    def at(self, s: float) -> Frames:
        """The structure at a parameter."""
        f = self.frame
        if self.what == "forces":
            return replace(f, positions=f.positions + s * self.direction)
        stretch = np.eye(3) + s * self.direction
        return replace(f, positions=f.positions @ stretch, cell=None if f.cell is None else f.cell @ stretch)

    def slope(self, s: float, label: Label) -> float:
        """dE/ds as the forces or the stress of a label have it."""
        if self.what == "forces":
            return -float(np.sum(label.forces * self.direction))
        cell = self.at(s).cell
        if cell is None or label.stress is None:
            return float("nan")
        rate = self.direction @ np.linalg.inv(np.eye(3) + s * self.direction)
        return float(volume(cell[0]) * np.sum(label.stress * rate))

    def deviation(self, minus: Label, centre: Label, plus: Label) -> float:
        """How far energies and slopes differ, eV/Å along a unit direction, or eV/Å^3: the larger one of both halves."""
        m, c, p = (self.slope(s, label) for s, label in ((-self.h, minus), (0.0, centre), (self.h, plus)))
        ahead = plus.energy - centre.energy - self.h / 12 * (5 * p + 8 * c - m)
        back = centre.energy - minus.energy - self.h / 12 * (5 * m + 8 * c - p)
        per = 1.0 if self.what == "forces" or self.frame.cell is None else float(volume(self.frame.cell[0]))
        return float(np.max(np.abs([ahead, back]))) / self.h / per

    @property
    def tolerance(self) -> float:
        """What `deviation` may be."""
        return FORCE_TOLERANCE if self.what == "forces" else STRESS_TOLERANCE

    @property
    def unit(self) -> str:
        """Of deviation and tolerance."""
        return "eV/Å" if self.what == "forces" else "eV/Å^3"


def lines(frame: Frames, forces: Array, stress: bool, seed: int) -> list[Line]:
    """A line along the forces, one along a random direction and, with stress, one along a random strain.

    Args: frame: B = 1.   forces: (A, 3) eV/Å.   stress: whether the labels carry it.
    """
    draw = np.random.default_rng(seed)
    random = draw.normal(size=forces.shape)
    found = [_displacement(frame, random, "a random direction")]
    if np.linalg.norm(forces) > FORCE_TOLERANCE:
        found.insert(0, _displacement(frame, forces, "the forces"))
    else:
        found.append(_displacement(frame, draw.normal(size=forces.shape), "another random direction"))
    if stress and frame.periodic:
        strain = draw.normal(size=(3, 3))
        strain = strain + strain.T
        found.append(Line("stress", frame, strain / np.linalg.norm(strain), STRAIN, "a random strain"))
    return found


def _displacement(frame: Frames, direction: Array, path: str, furthest: float = DISPLACEMENT) -> Line:
    unit = direction / np.linalg.norm(direction)
    return Line("forces", frame, unit, furthest / float(np.linalg.norm(unit, axis=1).max()), path)


def model_line(frame: Frames, seed: int) -> tuple[Line, Frames]:
    """A line along a random direction, and its structures as one batch, for `model_deviation`."""
    direction = np.random.default_rng(seed).normal(size=frame.positions[0].shape)
    line = _displacement(frame, direction, "a random direction", MODEL_DISPLACEMENT)
    places = [line.at(s) for s in np.linspace(-line.h, line.h, MODEL_POINTS)]
    cell = None if frame.cell is None else np.concatenate([place.cell for place in places if place.cell is not None])
    return line, replace(frame, positions=np.concatenate([place.positions for place in places]), cell=cell)


def model_deviation(line: Line, prediction: Prediction) -> float:
    """How far the mean energies and forces of a potential along a line differ, eV/Å: Simpson's rule on both halves."""
    slopes = -np.einsum("bac,ac->b", prediction.mean_forces, line.direction)
    middle = MODEL_POINTS // 2
    halves = [slice(0, middle + 1), slice(middle, MODEL_POINTS)]
    return max(abs(_residual(prediction.mean_energy[half], slopes[half], line.h / middle)) for half in halves) / line.h


def _residual(energies: Array, slopes: Sequence[float] | Array, step: float) -> float:
    """Rise of the energy less Simpson's integral of the slope."""
    weights = np.ones(len(slopes))
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float(energies[-1] - energies[0] - step / 3 * weights @ np.asarray(slopes))
