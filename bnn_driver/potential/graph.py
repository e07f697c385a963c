"""Neighbour graphs of frames of the same atoms, one list for all members, padded per receiving atom.

Slot (a, k) is the k-th neighbour of atom a: edge vector r = positions[a] - positions[source[a, k]] + shift[a, k], the
sign of MACE (receiver minus sender).  With G = dE/dr per slot the force is F_a = -Σ_k G[a, k] + Σ_{source = a} G and the
virial W = -Σ G⊗r.  Unused slots point at the atom itself with a shift beyond the cutoff, where every potential is zero.
Both directions of a bond have the same length; `half` lists one slot of every bond, `pair` says which bond a slot is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn_driver.errors import GuardStop
from bnn_driver.potential.transfer import to_device
from bnn_driver.records import Array, Frames

#: molecules up to this size are searched pair by pair, all frames at once
_ALL_PAIRS_ATOMS = 256


@dataclass(frozen=True, eq=False)
class Graph:
    """Frames and their neighbours; leading axes (B,), shared by all members, or (M, B), one batch per member."""

    numbers: Tensor
    """(A,) int64."""
    positions: Tensor
    """(..., A, 3) Å."""
    source: Tensor
    """(..., A, K) int64, the neighbour within its own frame."""
    shift: Tensor
    """(..., A, K, 3) Å, Cartesian lattice shift."""
    mask: Tensor
    """(..., A, K) bool, True where the slot is an edge."""
    pair: Tensor
    """(..., A, K) int64 in [0, P): the bond that the slot is one direction of."""
    half: Tensor
    """(..., P) int64 in [0, A·K): one slot of every bond."""
    cell: Tensor | None
    """(..., 3, 3) Å, vectors in rows, or None."""

    @property
    def lead(self) -> tuple[int, ...]:
        """(B,) or (M, B)."""
        return tuple(self.positions.shape[:-2])

    def _named(self) -> dict[str, Tensor]:
        """Everything that is there but the atomic numbers."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "numbers"}
        return {name: x for name, x in values.items() if x is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Graph:
        return self.with_tensors([change(x) for x in self.tensors()])

    def tensors(self) -> list[Tensor]:
        """Everything but the atomic numbers."""
        return list(self._named().values())

    def with_tensors(self, tensors: Sequence[Tensor]) -> Graph:
        """The same atoms with other tensors, in the order of `tensors()`."""
        changed: dict[str, Any] = dict(zip(self._named(), tensors, strict=True))
        return replace(self, **changed)

    def take(self, index: Tensor) -> Graph:
        """Some frames of a (B,)-graph.  Args: index: (b,) or (M, b) int64.  Returns: a graph with those leading axes."""
        if len(self.lead) != 1:
            raise ValueError(f"frames can be taken from a graph of leading axes (B,), this one has {self.lead}")
        return self._map(lambda x: x.index_select(0, index.reshape(-1)).reshape(*index.shape, *x.shape[1:]))

    def with_positions(self, positions: Tensor) -> Graph:
        """The same neighbours at other positions (..., A, 3) Å; the caller knows that no neighbour is missed."""
        return replace(self, positions=to_device(positions, self.positions.device, self.positions.dtype))

    def to(self, device: torch.device, dtype: torch.dtype) -> Graph:
        """The graph on another device, its coordinates in another precision."""
        moved = self._map(lambda x: x.to(device, dtype) if x.is_floating_point() else x.to(device))
        return replace(moved, numbers=self.numbers.to(device))

    def vectors(self) -> Tensor:
        """(..., A, K, 3) Å, edge vectors, receiver minus source."""
        atoms = self.positions.shape[-2]
        first = torch.arange(self.positions.numel() // (3 * atoms), device=self.source.device) * atoms
        rows = self.source + first.view(*self.lead, 1, 1)
        source = self.positions.reshape(-1, 3).index_select(0, rows.reshape(-1)).view(*self.source.shape, 3)
        return self.positions.unsqueeze(-2) - source + self.shift


@dataclass(frozen=True, eq=False)
class _Edges:
    """Edges of one batch, sorted by frame and receiver: each (E,), shift (E, 3) Å; bond counts from 0 in each frame."""

    frame: Array
    receiver: Array
    source: Array
    shift: Array
    bond: Array


def build_graph(
    frames: Frames,
    cutoff: float,
    dtype: torch.dtype,
    device: torch.device,
    capacity: int | None = None,
    rounded: bool = False,
) -> Graph:
    """Neighbours closer than the cutoff; of small periodic cells every image.

    Args: cutoff: Å.   capacity: smallest number of slots K per atom.   rounded: make K and the number of bonds one of few
        numbers, so that most lists of a run have the same shapes.
    Raises: GuardStop when a position is not finite.
    """
    if not np.isfinite(frames.positions).all():
        frame = int(np.argmax(~np.isfinite(frames.positions).all(axis=(1, 2))))
        raise GuardStop(f"frame {frame} has positions that are not finite: the simulation has blown up; look at its time step")
    small = len(frames.numbers) <= _ALL_PAIRS_ATOMS
    edges = _molecule_edges(frames, cutoff) if small and not frames.periodic else _listed_edges(frames, cutoff)
    arrays = _padded(edges, frames, cutoff, capacity or 1, rounded_up if rounded else int)

    def tensor(x: Array) -> Tensor:
        return to_device(torch.as_tensor(x), device, dtype if x.dtype == np.float64 else None)

    return Graph(
        numbers=_numbers(tuple(frames.numbers.tolist()), device),
        positions=tensor(np.asarray(frames.positions, dtype=np.float64)),
        cell=None if frames.cell is None else tensor(np.asarray(frames.cell, dtype=np.float64)),
        **{name: tensor(x) for name, x in arrays.items()},
    )


@functools.lru_cache(maxsize=64)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """(A,) int64, the same tensor for all graphs of the same atoms; nobody changes it."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _molecule_edges(frames: Frames, cutoff: float) -> _Edges:
    """All pairs of all frames at once."""
    x = np.asarray(frames.positions, dtype=np.float64)
    near = ((x[:, :, None] - x[:, None]) ** 2).sum(axis=-1) < cutoff**2
    near &= ~np.eye(x.shape[1], dtype=bool)
    upper = np.triu(near)
    count = np.cumsum(upper.reshape(len(x), -1), axis=1).reshape(near.shape) - 1
    bond = np.where(upper, count, np.swapaxes(count, 1, 2))
    frame, receiver, source = np.nonzero(near)
    return _Edges(frame, receiver, source, np.zeros((len(frame), 3)), bond[near])


def _listed_edges(frames: Frames, cutoff: float) -> _Edges:
    """Cell lists frame by frame (matscipy), with every periodic image inside the cutoff."""
    from matscipy.neighbours import neighbour_list

    parts = []
    for b, x in enumerate(np.asarray(frames.positions, dtype=np.float64)):
        cell = np.eye(3) if frames.cell is None else np.asarray(frames.cell[b], dtype=np.float64)
        pbc = np.full(3, frames.periodic)
        if frames.cell is None:  # matscipy wants a box around open boundaries
            cell = np.diag(np.ptp(x, axis=0) + 2 * cutoff + 1.0)
            x = x - x.min(axis=0) + cutoff
        source, receiver, images = neighbour_list("ijS", positions=x, cell=cell, pbc=pbc, cutoff=cutoff)
        order = np.lexsort((source, receiver))
        source, receiver, images = source[order], receiver[order], images[order]
        parts.append((np.full(len(source), b), receiver, source, images @ cell, _bonds(receiver, source, images, len(x))))
    return _Edges(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _bonds(receiver: Array, source: Array, images: Array, atoms: int) -> Array:
    """Number of the bond (E,) of each directed edge: (a, s, S) and (s, a, -S) are the two directions of one."""
    if len(receiver) == 0:
        return np.zeros(0, dtype=np.int64)
    base = 2 * int(np.abs(images).max(initial=0)) + 1
    weight = np.array([base * base, base, 1], dtype=np.int64)
    forward = images.astype(np.int64) @ weight
    flip = (receiver > source) | ((receiver == source) & (forward < 0))
    low, high = np.minimum(receiver, source).astype(np.int64), np.maximum(receiver, source)
    key = (low * atoms + high) * (2 * base**3) + np.where(flip, -forward, forward)
    return np.unique(key, return_inverse=True)[1]


def rounded_up(n: int) -> int:
    """The next of 1, 2, ..., 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...: at most a quarter more."""
    step = 1 << max(0, (n - 1).bit_length() - 3)
    return -(-n // step) * step


def _padded(edges: _Edges, frames: Frames, cutoff: float, capacity: int, size: Callable[[int], int]) -> dict[str, Array]:
    """Edges as (B, A, K) slots and (B, P) bonds."""
    b, a = frames.positions.shape[:2]
    node = edges.frame * a + edges.receiver
    degree = np.bincount(node, minlength=b * a)
    k = size(max(capacity, int(degree.max(initial=1))))
    place = np.arange(len(node)) - (np.cumsum(degree) - degree)[node]
    slot = node * k + place
    bonds = 1 + int(edges.bond.max(initial=-1))
    source = np.repeat(np.tile(np.arange(a), b), k)
    shift = np.zeros((b * a * k, 3))
    shift[:, 0] = cutoff + 1.0
    mask = np.zeros(b * a * k, dtype=bool)
    pair = np.full(b * a * k, bonds)
    source[slot], shift[slot], mask[slot], pair[slot] = edges.source, edges.shift, True, edges.bond
    # bonds that a frame lacks, and the last one, stand for its unused slots (slot 0 where it has none: never read)
    free = np.argmin(mask.reshape(b, a * k), axis=1)
    half = np.repeat(free[:, None], size(bonds + 1), axis=1)
    half[edges.frame, edges.bond] = slot - edges.frame * (a * k)
    return {
        "source": source.reshape(b, a, k),
        "shift": shift.reshape(b, a, k, 3),
        "mask": mask.reshape(b, a, k),
        "pair": pair.reshape(b, a, k),
        "half": half,
    }
