"""A graph in the order in which the fast path computes: atoms sorted by element, frames innermost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnn_driver.potential.graph import Graph


@dataclass(frozen=True, eq=False)
class Arranged:
    """Nodes are (atom, frame), N = A·B; edges (atom, frame, slot), E = N·K; L is 1 (shared) or M (own frames)."""

    inverse: Tensor
    """(A,) place of each atom of the graph in the sorted order."""
    kind: Tensor
    """(N,) element number of each node."""
    source_kind: Tensor
    """(L, E) element number of each edge's source."""
    slices: tuple[tuple[int, int, int], ...]
    """(element, first node, last node + 1)."""
    source: Tensor
    """(L, E) node."""
    pair: Tensor
    """(L, E) bond, of the Q bonds of all frames."""
    half: Tensor
    """(L, Q) one edge of each bond."""
    mask: Tensor
    """(L, E) 1 where there is an edge."""
    bond: Tensor
    """(L, Q, 1) 1 where there is a bond."""
    vectors: Tensor
    """(L, E, 3) Å."""
    z: tuple[Tensor, Tensor]
    """Atomic numbers (L, Q) at both ends of a bond."""
    shape: tuple[int, int, int]
    """(A, B, K)."""


@dataclass(frozen=True, eq=False)
class Sorting:
    """Atoms sorted by element; follows from the atomic numbers alone."""

    numbers: Tensor
    """(A,) int64, in the order of the frames."""
    kind: Tensor
    """(A,) element number of each atom, in the order of the frames."""
    order: Tensor
    """(A,) atom at each place of the sorted order."""
    inverse: Tensor
    """(A,) place of each atom in the sorted order."""
    counts: tuple[int, ...]
    """Atoms of each element."""
    key: tuple[int, ...]
    """The atomic numbers once more, on the host."""

    def slices(self, frames: int) -> tuple[tuple[int, int, int], ...]:
        """(element, first node, last node + 1) of the elements that are there."""
        out, first = [], 0
        for e, count in enumerate(self.counts):
            if count:
                out.append((e, first * frames, (first + count) * frames))
            first += count
        return tuple(out)


def sort_atoms(numbers: Tensor, elements: Tensor) -> Sorting:
    """Args: numbers: (A,) int64.   elements: (E,) ascending atomic numbers."""
    kind = torch.searchsorted(elements, numbers)
    order = torch.argsort(kind, stable=True)
    counts = torch.bincount(kind, minlength=len(elements)).tolist()
    return Sorting(numbers, kind, order, torch.argsort(order), tuple(counts), tuple(numbers.tolist()))


def arrange(graph: Graph, atoms: Sorting) -> Arranged:
    """Tensor operations alone, none of which reads a value on the host.  Args: graph: leading axes (B,) or (M, B)."""
    lead = graph.lead
    b, (a, k) = lead[-1], graph.source.shape[-2:]
    device = graph.source.device
    numbers, kind, order, inverse = atoms.numbers, atoms.kind, atoms.order, atoms.inverse
    frame = torch.arange(b, device=device)

    def sorted_edges(x: Tensor) -> Tensor:  # (..., B, A, K, *) -> (L, A, B, K, *)
        x = x.reshape(-1, b, a, k, *x.shape[len(lead) + 2 :])
        return x.index_select(2, order).transpose(1, 2)

    source = sorted_edges(graph.source)
    pair = sorted_edges(graph.pair) + (frame * graph.half.shape[-1]).view(1, 1, b, 1)
    half = graph.half.reshape(-1, b, graph.half.shape[-1])
    atom = torch.div(half, k, rounding_mode="floor")
    edge = (inverse[atom] * b + frame.view(1, b, 1)) * k + half % k
    size = len(source)
    mask = sorted_edges(graph.mask).reshape(size, -1)
    flat_pair = pair.reshape(size, -1)
    edge = edge.reshape(size, -1)
    bonds = torch.arange(edge.shape[1], device=device)
    real = torch.gather(mask, 1, edge) & (torch.gather(flat_pair, 1, edge) == bonds)
    z_source = torch.gather(numbers[source].reshape(size, -1), 1, edge)
    dtype = graph.positions.dtype
    return Arranged(
        inverse=inverse,
        kind=kind[order].repeat_interleave(b),
        source_kind=kind[source].reshape(size, -1),
        slices=atoms.slices(b),
        source=(inverse[source] * b + frame.view(1, 1, b, 1)).reshape(size, -1),
        pair=flat_pair,
        half=edge,
        mask=mask.to(dtype),
        bond=real.to(dtype).unsqueeze(-1),
        vectors=sorted_edges(graph.vectors()).reshape(size, -1, 3),
        z=(numbers[atom].reshape(size, -1), z_source),
        shape=(a, b, k),
    )


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of every member.  Args: x: (M, R, ...).   index: (1, E), the same for all members, or (M, E).   Returns: (M, E, ...)."""
    if len(index) == 1:
        return x.index_select(1, index[0])
    return torch.flatten(x, 0, 1).index_select(0, _end_to_end(index, x.shape[1])).view(*index.shape, *x.shape[2:])


def add_rows(x: Tensor, index: Tensor, count: int) -> Tensor:
    """The transpose of `rows`: x (M, E, ...) added up into (M, count, ...)."""
    if len(index) == 1:
        return x.new_zeros(len(x), count, *x.shape[2:]).index_add(1, index[0], x)
    out = x.new_zeros(len(x) * count, *x.shape[2:])
    return out.index_add(0, _end_to_end(index, count), torch.flatten(x, 0, 1)).view(len(x), count, *x.shape[2:])


def _end_to_end(index: Tensor, size: int) -> Tensor:
    first = torch.arange(len(index), device=index.device).view(-1, 1) * size
    return (index + first).reshape(-1)


def edge_sums(gradient_y: Tensor, slope: Tensor, slopes: Tensor, length: Tensor, g: Arranged) -> tuple[Tensor, Tensor]:
    """Forces (M, B, A, 3) eV/Å and virial (M, B, 3, 3) eV from the derivatives of the energy.

    Args: gradient_y: (M, N, K, n) ∂E/∂Y.   slope: (M, Q) ∂E/∂r of the bonds.   slopes: (L, E, n, 3) dY/dr.   length: (L, E) Å.
    """
    a, b, k = g.shape
    m, edges = len(gradient_y), a * b * k
    angular = (gradient_y.reshape(m, edges, -1, 1) * slopes).sum(dim=2)
    along = torch.gather(g.vectors, 1, g.half.unsqueeze(-1).expand(-1, -1, 3)) / torch.gather(length, 1, g.half).unsqueeze(-1)
    radial = add_rows(slope.unsqueeze(-1) * along, g.half, edges)
    gradient = (angular + radial) * g.mask.unsqueeze(-1)
    forces = add_rows(gradient, g.source, a * b) - gradient.view(m, a * b, k, 3).sum(dim=2)
    forces = forces.view(m, a, b, 3).index_select(1, g.inverse).transpose(1, 2)
    by_frame = gradient.view(m, a, b, k, 3).transpose(1, 2).reshape(m, b, a * k, 3)
    vectors = g.vectors.view(-1, a, b, k, 3).transpose(1, 2).reshape(-1, b, a * k, 3)
    return forces, -torch.matmul(by_frame.transpose(-1, -2), vectors)
