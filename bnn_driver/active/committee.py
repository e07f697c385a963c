"""Query by committee: how much the members disagree on a frame, and which frames teach most.

Schran, Brezina, Marsalek, J. Chem. Phys. 153, 104105 (2020), DOI 10.1063/5.0016004: population spread (division by the number of
members), the vector norm per atom, the mean over the atoms.  Axes: M members, B frames, A atoms, Z elements.
"""

from __future__ import annotations

import numpy as np

from bnn_driver.errors import BnnError
from bnn_driver.records import Array


def atom_disagreement(forces: Array) -> Array:
    """Spread of the force on every atom, sqrt(1/M Σ_m |F_ma - F̄_a|²).

    Args: forces: (M, B, A, 3) eV/Å.   Returns: (B, A) eV/Å.   Raises: BnnError for fewer than 2 members.
    """
    _at_least_two(forces)
    return np.asarray(np.sqrt(np.sum(np.var(forces, axis=0), axis=-1)))


def force_disagreement(forces: Array) -> Array:
    """Mean over the atoms of `atom_disagreement`.  Args: forces: (M, B, A, 3) eV/Å.   Returns: (B,) eV/Å."""
    return np.asarray(atom_disagreement(forces).mean(axis=-1))


def largest_atom_disagreement(forces: Array) -> Array:
    """That of the atom on which the members agree least.  Args: forces: (M, B, A, 3) eV/Å.   Returns: (B,) eV/Å."""
    return np.asarray(atom_disagreement(forces).max(axis=-1))


def energy_disagreement(energy: Array, atoms: Array) -> Array:
    """Spread of the energies, freed of the constants in which members trained apart differ.

    An energy is defined up to a constant per atom of each element, so what a least-squares fit Σ_z n_z c_mz makes of a member's
    difference to the mean is taken off it; with one composition that is the mean difference over all frames.

    Args: energy: (M, B) eV, of all frames that are to be compared.   atoms: (B, Z) numbers of atoms of each element.
    Returns: (B,) eV, sqrt(1/M Σ_m d_m²).   Raises: BnnError for fewer than 2 members, or frames that do not match.
    """
    _at_least_two(energy)
    if atoms.ndim != 2 or len(atoms) != energy.shape[1]:
        raise BnnError(f"expected the atoms of {energy.shape[1]} frames, but got an array of shape {atoms.shape}")
    difference = (energy - energy.mean(axis=0)).T
    return np.asarray(np.sqrt(np.mean((difference - fitted_constants(difference, atoms)) ** 2, axis=1)))


def fitted_constants(values: Array, atoms: Array) -> Array:
    """The part of values per frame that constants per atom explain, by least squares (the smallest constants where several do).

    Args: values: (B, ...) eV.   atoms: (B, Z) numbers of atoms of each element.   Returns: (B, ...) eV.
    """
    flat = values.reshape(len(values), -1)
    # frames of one composition share their part, so few rows, weighted by their frames, hold all there is to fit
    kinds, kind_of, frames = np.unique(atoms, axis=0, return_inverse=True, return_counts=True)
    sums = np.zeros((len(kinds), flat.shape[1]))
    np.add.at(sums, kind_of.ravel(), flat)
    weight = np.sqrt(frames)[:, None]
    constants = np.linalg.lstsq(kinds * weight, sums / weight, rcond=None)[0]
    return np.asarray((kinds @ constants)[kind_of.ravel()].reshape(values.shape))


def force_error(forces: Array, reference: Array) -> Array:
    """Error of a frame's forces, sqrt(1/A Σ_a |F_a - F_a,ref|²); its mean over frames is the generalisation error.

    Args: forces, reference: (B, A, 3) eV/Å.   Returns: (B,) eV/Å.
    """
    return np.asarray(np.sqrt(np.mean(np.sum((forces - reference) ** 2, axis=-1), axis=-1)))


def most_uncertain(scores: Array, k: int) -> Array:
    """The k frames with the largest scores, in falling order; of equals, those that come first.

    Args: scores: (B,).   k: 1 to B.   Returns: (k,) int.   Raises: BnnError for another k, or scores that are not finite.
    """
    _check_choice(scores, k)
    return np.argsort(-np.asarray(scores, float), kind="stable")[:k]


def most_diverse(scores: Array, descriptors: Array, k: int, shortlist: int, known: Array | None = None) -> Array:
    """k frames of the `shortlist` most uncertain ones, each as far as can be from those chosen before and from the known ones.

    Farthest-point traversal (Gonzalez 1985, DOI 10.1016/0304-3975(85)90224-5), begun with the most uncertain frame; of equally far
    ones the more uncertain.

    Args: scores: (B,).   descriptors: (B, D) any unit, rows that are not in the shortlist are not read.   k: 1 to B.
        shortlist: frames to choose from, at least k and at most B count.   known: (L, D) descriptors of the labelled frames.
    Returns: (k,) int, in the order in which they were chosen.   Raises: BnnError as `most_uncertain`.
    """
    _check_choice(scores, k)
    candidates = most_uncertain(scores, min(len(scores), max(k, shortlist)))
    place = np.asarray(descriptors, float)[candidates]
    nearest = np.full(len(candidates), np.inf)
    for row in known if known is not None else ():
        nearest = np.minimum(nearest, _distances(place, row))
    chosen = [0]
    while len(chosen) < k:
        nearest = np.minimum(nearest, _distances(place, place[chosen[-1]]))
        nearest[chosen] = -1.0
        chosen.append(int(np.argmax(nearest)))
    return np.asarray(candidates[chosen])


def _distances(rows: Array, point: Array) -> Array:
    return np.asarray(np.sqrt(np.sum((rows - point) ** 2, axis=-1)))


def _at_least_two(values: Array) -> None:
    if len(values) < 2:
        raise BnnError(f"a committee needs at least 2 members to disagree, but this one has {len(values)}")


def _check_choice(scores: Array, k: int) -> None:
    scores = np.asarray(scores, float)
    if scores.ndim != 1 or not 1 <= k <= len(scores):
        raise BnnError(
            f"expected to choose between 1 and {scores.size} frames, but got k = {k} of scores of shape {scores.shape}"
        )
    wrong = np.flatnonzero(~np.isfinite(scores))
    if wrong.size:
        raise BnnError(f"the score of frame {wrong[0]} is {scores[wrong[0]]} ({wrong.size} of {len(scores)} are not finite)")
