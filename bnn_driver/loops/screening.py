"""One round over the pool: what the committee says of every frame, and which frames it would learn most from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bnn_driver.active import committee as qbc
from bnn_driver.active.likeness import Gallery
from bnn_driver.pool_config import PoolSettings
from bnn_driver.records import Array, Frames, LabelledFrame, Prediction
from bnn_driver.store.pool import Pool


class Committee(Protocol):
    """Members that learn in rounds: `chains.Chains`, `scratch.FromScratch`."""

    def learn(self, rounds: Sequence[Sequence[LabelledFrame]]) -> None:
        """Learn the labels of all rounds so far, unless that is done."""
        ...

    def predict(self, frames: Frames) -> Prediction:
        """What the members say."""
        ...

    def describe(self, frames: Frames) -> Array:
        """(B, D) descriptors of frames."""
        ...

    def foundation_energy(self, frames: Frames) -> Array | None:
        """(B,) eV, before anything was learnt; None for members that have the labels' zero of energy."""
        ...


@dataclass(frozen=True, eq=False)
class Screen:
    """What the committee says of some frames of the pool, in the order asked for."""

    index: Array
    """(B,) int."""
    force: Array
    """(B,) eV/Å, force disagreement."""
    atom: Array
    """(B,) eV/Å, that of the worst atom."""
    energy: Array
    """(B,) eV, energy disagreement, free of the members' constants."""
    mean_energy: Array
    """(B,) eV."""
    energy_sd: Array
    """(B,) eV, predictive, not calibrated."""
    force_error: Array
    """(B,) eV/Å, error of the mean forces against the labels."""

    def ranking(self, rank: str, atoms: Array) -> Array:
        """(B,) what the frames are ranked by.  Args: atoms: (B,) numbers of atoms.

        Energies grow with the number of atoms, so they are compared per atom.  (Calibration multiplies all sds by one factor: no rank
        depends on it.)
        """
        return {"force": self.force, "atom": self.atom, "energy": self.energy / atoms, "predictive": self.energy_sd / atoms}[rank]


def screen(committee: Committee, pool: Pool, index: Array) -> Screen:
    """Evaluate frames of the pool.  Raises: ModelError for an unknown element."""
    rows: list[Array] = []
    columns: list[list[Array]] = []
    for batch in pool.batches(index):
        found = committee.predict(batch.frames)
        columns.append(
            [
                qbc.force_disagreement(found.forces),
                qbc.largest_atom_disagreement(found.forces),
                found.mean_energy,
                found.energy_predictive_sd,
                qbc.force_error(found.mean_forces, batch.forces),
                found.energy.T,
            ]
        )
        rows.append(batch.index)
    order = np.argsort(np.concatenate(rows))[np.argsort(np.argsort(index))]
    force, atom, mean, sd, error, energy = (np.concatenate(part)[order] for part in zip(*columns, strict=True))
    spread = qbc.energy_disagreement(energy.T, pool.atoms()[index])
    return Screen(np.asarray(index), force, atom, spread, mean, sd, error)


@dataclass(frozen=True, eq=False)
class Choice:
    """Frames for the next round."""

    rows: Array
    """(k,) places in the screen."""
    near_duplicates: Array
    """(d,) places of frames that were passed over because they are nearly one that is labelled, held back, or chosen."""


def choose(
    committee: Committee, pool: Pool, found: Screen, settings: PoolSettings, k: int, taken: Gallery, labelled: Array
) -> Choice:
    """At most k frames of a screen, by rank and diversity, no two nearly the same.

    Args: taken: labelled and held-back frames.   labelled: numbers in the pool of the labelled frames, whose neighbourhood is avoided.
    """
    atoms = pool.atoms()[found.index].sum(axis=1)
    scores = found.ranking(settings.rank, atoms)
    wanted = round(settings.shortlist * k) if settings.diversity else k
    rows, duplicates = different(pool, found.index, qbc.most_uncertain(scores, len(scores)), wanted, taken)
    if not settings.diversity or len(rows) <= k:
        return Choice(rows[:k], duplicates)
    place = descriptors(committee, pool, np.concatenate([found.index[rows], labelled]))
    chosen = qbc.most_diverse(scores[rows], place[: len(rows)], k, len(rows), place[len(rows) :])
    return Choice(rows[chosen], duplicates)


def different(pool: Pool, index: Array, order: Array, wanted: int, taken: Gallery) -> tuple[Array, Array]:
    """The first `wanted` frames in an order that are nearly the same as none before, and the places of those passed over.

    Args: index: (B,) numbers in the pool.   order: (B,) places.   taken: frames that count as before; not changed.
    """
    seen = Gallery(taken.tolerance)
    kept: list[int] = []
    passed: list[int] = []
    for row in order.tolist():
        if len(kept) == wanted:
            break
        frame = pool.one(int(index[row])).frames
        if taken.has(frame) or seen.has(frame):
            passed.append(row)
        else:
            seen.add(frame)
            kept.append(row)
    return np.array(kept, dtype=np.int64), np.array(passed, dtype=np.int64)


def descriptors(committee: Committee, pool: Pool, index: Array) -> Array:
    """(B, D) descriptors of frames of the pool, in the order asked for."""
    wanted, inverse = np.unique(index, return_inverse=True)
    place: Array | None = None
    for batch in pool.batches(wanted):
        part = committee.describe(batch.frames)
        place = np.zeros((len(wanted), part.shape[1])) if place is None else place
        place[np.searchsorted(wanted, batch.index)] = part
    return np.zeros((0, 0)) if place is None else place[inverse]
