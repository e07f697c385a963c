"""Which frames are nearly the same: a distance that does not see how a structure lies, or in what order its atoms are given.

The shape of a frame is its interatomic distances, sorted for every pair of elements (nearest images in a crystal, and the six
numbers of its cell).  Translations, rotations, reflections and exchanges of like atoms leave it as it is, and moving every atom by
at most δ changes no entry by more than 2δ.  Two shapes differ by their largest difference of an entry, Å.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from ase.geometry import find_mic

from bnn_driver.errors import BnnError
from bnn_driver.records import Array, Frames


def shape(frame: Frames) -> Array:
    """Sorted distances by pair of elements, then for a crystal the sorted lengths and diagonals of its cell.

    Args: frame: B = 1.   Returns: (A (A-1)/2,) or (A (A-1)/2 + 6,) Å.
    """
    if len(frame) != 1:
        raise BnnError(f"a shape belongs to one frame, but this batch has {len(frame)}")
    first, second = np.triu_indices(len(frame.numbers), k=1)
    difference = frame.positions[0][second] - frame.positions[0][first]
    cell = None if frame.cell is None else frame.cell[0]
    distance = np.linalg.norm(difference, axis=-1)
    if cell is not None and len(difference):
        _, distance = find_mic(difference, cell)
    z = np.sort(np.stack([frame.numbers[first], frame.numbers[second]]), axis=0)
    parts = [distance[np.lexsort((distance, z[1], z[0]))]]
    if cell is not None:
        diagonals = [cell[i] + cell[j] for i, j in itertools.combinations(range(3), 2)]
        parts += [np.sort(np.linalg.norm(cell, axis=1)), np.sort(np.linalg.norm(diagonals, axis=1))]
    return np.concatenate(parts)


@dataclass
class Gallery:
    """Frames that have been chosen, or may not be; tells whether another one is nearly one of them."""

    tolerance: float
    """Å, largest difference of shapes that are nearly the same; 0: only equal shapes are."""
    _shapes: dict[tuple[object, ...], list[Array]] = field(default_factory=dict, init=False)

    def add(self, frame: Frames) -> None:
        """One more frame (B = 1)."""
        self._shapes.setdefault(_kind(frame), []).append(shape(frame))

    def has(self, frame: Frames) -> bool:
        """True when a frame of the same atoms is there whose shape differs by at most the tolerance.  Args: frame: B = 1."""
        held = self._shapes.get(_kind(frame), [])
        return bool(held) and bool(np.abs(np.stack(held) - shape(frame)).max(axis=1, initial=0.0).min() <= self.tolerance)


def _kind(frame: Frames) -> tuple[object, ...]:
    """What two frames must share to be compared."""
    return (*np.sort(frame.numbers).tolist(), frame.periodic, frame.charge, frame.multiplicity)
