"""A frame outside the sanity window ends the run before any model or oracle sees it as physics."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bnn_driver.errors import GuardStop
from bnn_driver.records import Array, Frames


def check_sanity(frames: Frames, min_distance: float, max_force: float | None = None, forces: Array | None = None) -> None:
    """Stop at positions that are not finite, atoms that are too close, or absurd forces.

    Args: frames: B frames.   min_distance: Å, between any two atoms or images.   max_force: eV/Å, longest force that is accepted;
    needs `forces`, (B, A, 3) eV/Å.
    Raises: GuardStop naming the frame, the atoms (from 0) and the value.
    """
    if not np.isfinite(frames.positions).all():
        b, atom, _ = np.argwhere(~np.isfinite(frames.positions))[0]
        raise GuardStop(f"atom {atom} of frame {b} has the position {frames.positions[b, atom]}; the dynamics has blown up")
    pairs = _pairs(len(frames.numbers))
    for b in range(len(frames)):
        _check_distances(frames, b, pairs, min_distance)
    if max_force is not None and forces is not None:
        check_forces(forces, max_force)


@lru_cache(maxsize=1)
def _pairs(n_atoms: int) -> tuple[Array, Array]:
    """Both atoms of every pair: a run asks for the same ones at every step, and making them takes longer than using them."""
    return np.triu_indices(n_atoms, k=1)


def _check_distances(frames: Frames, b: int, pairs: tuple[Array, Array], min_distance: float) -> None:
    """Compare the nearest pair of frame b, with periodic images, to the limit."""
    first, second = pairs
    delta = frames.positions[b, second] - frames.positions[b, first]
    if frames.cell is not None:
        cell = frames.cell[b]
        _check_cell(cell, b, min_distance)
        inverse = np.linalg.inv(cell)
        # a distance below half the smallest height has all its fractional components within 1/2: wrapping finds it
        delta = delta - np.rint(delta @ inverse) @ cell
    distance = np.sqrt(np.einsum("pc,pc->p", delta, delta))
    if distance.size and distance.min() < min_distance:
        p = int(distance.argmin())
        i, j = int(first[p]), int(second[p])
        raise GuardStop(
            f"atoms {i} (Z = {frames.numbers[i]}) and {j} (Z = {frames.numbers[j]}) of frame {b} are {distance[p]:.3f} Å apart, "
            f"below the limit of {min_distance} Å; look for a time step that is too long or a start that is not relaxed"
        )


def _check_cell(cell: Array, b: int, min_distance: float) -> None:
    """The heights of the cell must be at least twice the smallest allowed distance."""
    if not np.isfinite(cell).all() or abs(np.linalg.det(cell)) < 1e-12:
        raise GuardStop(f"the cell of frame {b} is not finite or has no volume: {cell.tolist()}")
    height = float(1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0).max())
    if height < 2.0 * min_distance:
        raise GuardStop(
            f"the cell of frame {b} is only {height:.3f} Å high, below twice the smallest distance of {min_distance} Å"
        )


def check_forces(forces: Array, max_force: float) -> None:
    """Compare the longest force to the limit.  Args: forces: (B, A, 3) eV/Å.   Raises: GuardStop."""
    size = np.linalg.norm(forces, axis=-1)
    b, i = np.unravel_index(int(np.argmax(np.where(np.isfinite(size), size, np.inf))), size.shape)
    if not size[b, i] <= max_force:
        raise GuardStop(f"the force on atom {i} of frame {b} is {size[b, i]:.3g} eV/Å, above the limit of {max_force} eV/Å")


def check_disagreement(disagreement: Array, limit: float) -> None:
    """Compare the members' disagreement on the forces to a limit.  Args: disagreement: (B, A) eV/Å.   Raises: GuardStop."""
    b, i = np.unravel_index(int(np.argmax(np.where(np.isfinite(disagreement), disagreement, np.inf))), disagreement.shape)
    if not disagreement[b, i] <= limit:
        raise GuardStop(
            f"the members disagree by {disagreement[b, i]:.3g} eV/Å on the force on atom {i} of frame {b}, above the limit of {limit} eV/Å"
        )


def check_whole(frames: Frames, gap: float) -> None:
    """Stop at a molecule or cluster of which a part has left the others; crystals are not looked at.

    Args: frames: B frames.   gap: Å, least distance from every atom of the part to every other one.   Raises: GuardStop.
    """
    if frames.periodic:
        return
    for b, positions in enumerate(frames.positions):
        distance = np.linalg.norm(positions[:, None] - positions, axis=-1)
        inside = np.arange(len(positions)) == 0
        while True:
            reached = (distance[inside] <= gap).any(axis=0)
            if (reached == inside).all():
                break
            inside = reached
        if not inside.all():
            nearest = distance[inside][:, ~inside].min()
            raise GuardStop(
                f"{int((~inside).sum())} atoms of frame {b}, such as {int(np.argmin(inside))}, are {nearest:.2f} Å away from the others, more "
                f"than the limit of {gap} Å: the system has fallen to pieces"
            )
