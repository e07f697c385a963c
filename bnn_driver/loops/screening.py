"""One round over many frames: what the committee says of each, and which frames it would learn most from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bnn_driver.active import committee as qbc
from bnn_driver.active.likeness import Gallery
from bnn_driver.pool_config import Choosing
from bnn_driver.records import Array, Frames, LabelledFrame, Prediction
from bnn_driver.store.pool import Batch, Pool


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


class Candidates(Protocol):
    """Frames numbered through: `store.pool.Pool`, `store.trajectory.Trajectories`."""

    def batches(self, index: Sequence[int] | Array, atoms: int = 2000) -> Iterator[Batch]:
        """These frames, those of the same atoms together, in batches of about so many atoms."""
        ...

    def one(self, index: int) -> Batch:
        """One frame."""
        ...

    def atoms(self) -> Array:
        """(N, Z) numbers of atoms of each element."""
        ...


@dataclass(frozen=True, eq=False)
class Screen:
    """What the committee says of some frames, in the order asked for."""

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

    def ranking(self, rank: str, atoms: Array) -> Array:
        """(B,) what the frames are ranked by.  Args: atoms: (B,) numbers of atoms.

        Energies grow with the number of atoms, so they are compared per atom.  (Calibration multiplies all sds by one factor: no rank
        depends on it.)
        """
        return {"force": self.force, "atom": self.atom, "energy": self.energy / atoms, "predictive": self.energy_sd / atoms}[rank]


@dataclass(frozen=True, eq=False)
class JudgedScreen(Screen):
    """The same of labelled frames."""

    force_error: Array
    """(B,) eV/Å, error of the mean forces against the labels."""


def screen(committee: Committee, source: Candidates, index: Array) -> Screen:
    """Evaluate frames.  Raises: ModelError for an unknown element."""
    table = [(batch.index, _columns(committee.predict(batch.frames))) for batch in source.batches(index)]
    return Screen(np.asarray(index), *_in_order(table, index, source.atoms()))


def judge(committee: Committee, pool: Pool, index: Array) -> JudgedScreen:
    """Evaluate labelled frames.  Raises: ModelError for an unknown element."""
    table: list[tuple[Array, list[Array]]] = []
    for batch in pool.batches(index):
        found = committee.predict(batch.frames)
        table.append((batch.index, [*_columns(found), qbc.force_error(found.mean_forces, batch.forces)]))
    return JudgedScreen(np.asarray(index), *_in_order(table, index, pool.atoms()))


def _columns(found: Prediction) -> list[Array]:
    """The columns of a `Screen`, with the members' energies (B, M) in place of their disagreement."""
    return [
        qbc.force_disagreement(found.forces),
        qbc.largest_atom_disagreement(found.forces),
        found.energy.T,
        found.mean_energy,
        found.energy_predictive_sd,
    ]


def _in_order(table: Sequence[tuple[Array, Sequence[Array]]], index: Array, atoms: Array) -> list[Array]:
    """Columns in the order asked for, and the members' energies compared over all frames.  Args: atoms: of the whole source."""
    order = np.argsort(np.concatenate([rows for rows, _ in table]))[np.argsort(np.argsort(index))]
    force, atom, energy, *rest = (np.concatenate(part)[order] for part in zip(*(columns for _, columns in table), strict=True))
    return [force, atom, qbc.energy_disagreement(energy.T, atoms[index]), *rest]


@dataclass(frozen=True, eq=False)
class Choice:
    """Frames for the next round."""

    rows: Array
    """(k,) places in the screen."""
    reserve: Array
    """Places of those that would come next, in order."""
    near_duplicates: Array
    """(d,) places of frames that were passed over because they are nearly one that is labelled, held back, or chosen."""


def choose(
    committee: Committee,
    source: Candidates,
    found: Screen,
    settings: Choosing,
    k: int,
    taken: Gallery,
    labelled: Callable[[], Array],
) -> Choice:
    """At most k frames of a screen, by rank and diversity, no two nearly the same.

    Args: taken: labelled and held-back frames.   labelled: gives the (L, D) descriptors of the labelled frames, whose neighbourhood
        is avoided.
    """
    atoms = source.atoms()[found.index].sum(axis=1)
    scores = found.ranking(settings.rank, atoms)
    wanted = round(settings.shortlist * k)
    rows, passed = different(source, found.index, qbc.most_uncertain(scores, len(scores)), wanted, taken)
    if settings.diversity and len(rows) > k:
        place = descriptors(committee, source, found.index[rows])
        rows = rows[qbc.most_diverse(scores[rows], place, len(rows), len(rows), labelled())]
    mine = Gallery(taken.tolerance)
    for row in rows[:k]:
        mine.add(source.one(int(found.index[row])).frames)
    # one that is nearly a frame of the shortlist that is not taken now may be taken later
    near = [row for row in passed if any(some.has(source.one(int(found.index[row])).frames) for some in (taken, mine))]
    return Choice(rows[:k], rows[k:], np.array(near, dtype=np.int64))


def different(source: Candidates, index: Array, order: Array, wanted: int, taken: Gallery) -> tuple[Array, Array]:
    """The first `wanted` frames in an order that are nearly the same as none before, and the places of those passed over.

    Args: index: (B,) numbers of the frames.   order: (B,) places.   taken: frames that count as before; not changed.
    """
    seen = Gallery(taken.tolerance)
    kept: list[int] = []
    passed: list[int] = []
    for row in order.tolist():
        if len(kept) == wanted:
            break
        frame = source.one(int(index[row])).frames
        if taken.has(frame) or seen.has(frame):
            passed.append(row)
        else:
            seen.add(frame)
            kept.append(row)
    return np.array(kept, dtype=np.int64), np.array(passed, dtype=np.int64)


def descriptors(committee: Committee, source: Candidates, index: Array) -> Array:
    """(B, D) descriptors of frames, in the order asked for."""
    wanted, inverse = np.unique(index, return_inverse=True)
    place: Array | None = None
    for batch in source.batches(wanted):
        part = committee.describe(batch.frames)
        place = np.zeros((len(wanted), part.shape[1])) if place is None else place
        place[np.searchsorted(wanted, batch.index)] = part
    return np.zeros((0, 0)) if place is None else place[inverse]
