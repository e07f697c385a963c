"""What is promised: the energy of a frame, the force on an atom, each with its own accuracy and its own calibration.

Every criterion reduces to pairs (error, sd) of one kind: error / sd is meant to have the variance 1/λ of the calibration.

Energy: error of the total energy, its predictive sd.  Force of an atom: the length |ΔF_i| of the error vector against
sd_i = sqrt(Σ_c s_ic²), s_ic the predictive sd of component c; both are free of the choice of axes.  |ΔF_i|²/sd_i² is a
quadratic form of Gaussians with mean 1/λ, and beyond 1.54 times its mean no such form has a heavier tail than the square of one
Gaussian (Székely, Bakirov 2003, DOI 10.1007/s00440-003-0262-6).  So P(|ΔF_i| >= K) from the one-dimensional Student-t
is an upper bound wherever it is small enough to serve; for three equal components the bound asks at an sd 18 % smaller than
the exact law would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import numpy as np
from ase.data import atomic_numbers

from bnn_driver.errors import ConfigError
from bnn_driver.records import Array, LabelledFrame, Prediction


class Calibration(Protocol):
    """What a criterion needs to know about the trust in predicted standard deviations."""

    def probability_exceeds(self, sd: Array, accuracy: float) -> Array:
        """P(|error| >= accuracy) for each sd.  Args: sd: (...).  Returns: (...)."""
        ...

    def observe(self, error: float, sd: float) -> Self:
        """The calibration after one more pair."""
        ...


@dataclass(frozen=True)
class EnergyCriterion:
    """P(|error of the total energy| >= accuracy) is kept small in every served frame."""

    accuracy: float
    """eV, or eV per atom."""
    needs: ClassVar[frozenset[str]] = frozenset({"predicted_energy", "energy_predictive_sd"})
    """Facts of a label's context that it judges by."""
    per_atom: bool = False
    """True: the accuracy is multiplied by the number of atoms."""
    name: str = "energy"

    def limit(self, n_atoms: int) -> float:
        """K of the total energy, eV."""
        return self.accuracy * (n_atoms if self.per_atom else 1)

    def probabilities(self, prediction: Prediction, numbers: Array, calibration: Calibration) -> Array:
        """P(|e| >= K) of every frame.  Returns: (B, 1)."""
        return calibration.probability_exceeds(prediction.energy_predictive_sd, self.limit(len(numbers)))[:, None]

    def combine(self, probabilities: Array) -> float:
        """The frame's probability.  Args: probabilities: (1,)."""
        return float(probabilities[0])

    def pair(self, labelled: LabelledFrame, offset: float) -> tuple[float, float]:
        """Error and sd of the energy that was predicted before the label came, eV.  Args: offset: added to the label's energy."""
        known = labelled.context
        error = float(known["predicted_energy"]) - (labelled.label.energy + offset)
        return error, float(known["energy_predictive_sd"])

    def exceeded(self, labelled: LabelledFrame, offset: float) -> bool:
        """True when the predicted energy was wrong by the accuracy or more."""
        return abs(self.pair(labelled, offset)[0]) >= self.limit(len(labelled.frame.numbers))


@dataclass(frozen=True)
class ForceCriterion:
    """P(|error vector of the force on atom i| >= accuracy) is kept small for every atom of a group in every served frame."""

    accuracy: float
    """eV/Å."""
    needs: ClassVar[frozenset[str]] = frozenset({"predicted_forces", "force_predictive_sd"})
    """Facts of a label's context that it judges by."""
    name: str = "force"
    """Names the group and its calibration."""
    atoms: tuple[int, ...] | None = None
    """Indices from 0; None: all."""
    species: tuple[int, ...] | None = None
    """Atomic numbers; None: all."""
    joint: bool = False
    """False: the promise holds for each atom.  True: for all atoms of the group together (sum of their probabilities)."""

    def members(self, numbers: Array) -> Array:
        """Indices of the group's atoms.  Raises: ConfigError when an index does not exist or nobody is left."""
        index = np.arange(len(numbers)) if self.atoms is None else np.asarray(self.atoms, dtype=int)
        if index.size and (index.min() < 0 or index.max() >= len(numbers)):
            raise ConfigError(f"force criterion {self.name!r} names atom {index.max()}, but the atoms are 0..{len(numbers) - 1}")
        if self.species is not None:
            index = index[np.isin(numbers[index], self.species)]
        if index.size == 0:
            raise ConfigError(f"force criterion {self.name!r} selects no atom (atoms {self.atoms}, species {self.species})")
        return index

    def probabilities(self, prediction: Prediction, numbers: Array, calibration: Calibration) -> Array:
        """P(|ΔF_i| >= K) of the group's atoms, in the order of `members`.  Returns: (B, G)."""
        sd = np.sqrt(np.sum(prediction.force_predictive_sd[:, self.members(numbers)] ** 2, axis=-1))
        return calibration.probability_exceeds(sd, self.accuracy)

    def combine(self, probabilities: Array) -> float:
        """The frame's probability: of the worst atom, or the sum (at most 1) with `joint`.  Args: probabilities: (G,)."""
        return min(1.0, float(probabilities.sum())) if self.joint else float(probabilities.max())

    def _errors(self, labelled: LabelledFrame) -> tuple[Array, Array]:
        """Lengths of the error vectors and their sds, eV/Å.  Returns: (G,), (G,)."""
        group = self.members(labelled.frame.numbers)
        error = np.asarray(labelled.context["predicted_forces"])[group] - labelled.label.forces[group]
        sd = np.asarray(labelled.context["force_predictive_sd"])[group]
        return np.linalg.norm(error, axis=-1), np.linalg.norm(sd, axis=-1)

    def pair(self, labelled: LabelledFrame, offset: float) -> tuple[float, float]:
        """The one pair a label is worth: (rms sd · sqrt(mean_i (|ΔF_i|/sd_i)²), rms sd), eV/Å.

        The errors of one frame's atoms are correlated (one set of weights made them all, and forces balance), so G atoms are not
        G observations: counted as such, a label of 100 atoms would pin λ after one frame.  The mean of their squared ratios keeps
        E[e²/sd²] = 1/λ and counts once: right on average and, as one observation, never over-certain.
        """
        error, sd = self._errors(labelled)
        scale = float(np.sqrt(np.mean(sd**2)))
        return scale * float(np.sqrt(np.mean((error / sd) ** 2))), scale

    def exceeded(self, labelled: LabelledFrame, offset: float) -> bool:
        """True when the promise was broken: by the atom that was least certain, or with `joint` by any atom.

        One yes or no per frame, whose probability the promise bounds; the least certain atom is known before the label.
        """
        error, sd = self._errors(labelled)
        return bool(np.any(error >= self.accuracy) if self.joint else error[np.argmax(sd)] >= self.accuracy)


ErrorCriterion = EnergyCriterion | ForceCriterion


def promised(
    energy: float, forces: float | None, species: Mapping[str, float], groups: Mapping[str, tuple[Sequence[int], float]]
) -> tuple[ErrorCriterion, ...]:
    """The criteria of the section [accuracy].

    Args: energy: eV.   forces: eV/Å, of any atom, or None.   species: symbol -> eV/Å.   groups: name -> (indices, eV/Å).
    Raises: ConfigError for a symbol that is no element.
    """
    criteria: list[ErrorCriterion] = [EnergyCriterion(energy)]
    if forces is not None:
        criteria.append(ForceCriterion(forces))
    for symbol, limit in species.items():
        if symbol not in atomic_numbers:
            raise ConfigError(f"[accuracy] species: {symbol!r} is no element")
        criteria.append(ForceCriterion(limit, f"force {symbol}", species=(atomic_numbers[symbol],)))
    criteria.extend(ForceCriterion(limit, f"force {name}", atoms=tuple(atoms)) for name, (atoms, limit) in groups.items())
    return tuple(criteria)
