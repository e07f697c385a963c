"""The layers whose weights do not move: their outputs, and how those change with positions and strain.

Where only the last weights of a network are sampled, all that the members need of the layers before is X, some numbers per atom.
In training its Jacobian is kept too, so that forces are -(∂E/∂X)·(dX/dr): a little dense algebra, and no pass through the layers.
The Jacobian comes in forward mode made of two reverse ones, one direction after the other: the gradient of u·X is linear in u, and
the derivative of that gradient along a direction v with respect to u is dX along v.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bnn_driver.potential.architecture import Architecture, Layer
from bnn_driver.potential.arrangement import Arranged, arrange, edge_sums
from bnn_driver.potential.graph import Graph
from bnn_driver.potential.layers import Bonds
from bnn_driver.potential.params import repeat_weights
from bnn_driver.potential.stacked import StackedPotential

#: the six independent strains, in the order in which `KnownFrames` counts them behind the positions
STRAINS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))


@dataclass(frozen=True, eq=False)
class KnownFrames(Graph):
    """Frames with the outputs X of the fixed layers; D = 3A positions, and 6 strains of periodic frames."""

    fixed_energy: Tensor
    """(...,) eV, float64, free atoms and nuclear repulsion."""
    fixed_slopes: Tensor
    """(..., D) their derivatives, eV/Å and eV."""
    outputs: Tensor
    """(..., A, F) X, in the order that `Split` says."""
    slopes: Tensor
    """(..., A·J, D) derivatives of the first J columns of X."""
    sums: Tensor
    """(..., S, D) derivatives of the next S columns, summed over atoms."""


@dataclass(frozen=True)
class Split:
    """Which layers are fixed, and which of their numbers are handed on: the columns of X."""

    fixed: int
    """Number of fixed layers."""
    widths: tuple[tuple[int, int], ...]
    """(2l+1, C) of the blocks of the last fixed layer, all of them when another layer follows, none otherwise."""
    scalars: tuple[tuple[int, int], ...]
    """(layer, C) of the scalars that are handed on by themselves."""
    first_sum: int
    """J: columns before enter the energy in any way, those behind by one linear map that is the same for all atoms, or not at all."""
    first_plain: int
    """J + S: columns behind do not enter the energy (the noise head reads them)."""

    def pieces(self, x: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Blocks (M, N, 2l+1, C) and scalars by layer (M, N, C).  Args: x: (M, N, F)."""
        sizes = [d * c for d, c in self.widths] + [c for _, c in self.scalars]
        parts = x.split(sizes, dim=-1)
        blocks = [part.unflatten(2, width).contiguous() for part, width in zip(parts, self.widths, strict=False)]
        return blocks, {layer: part for (layer, _), part in zip(self.scalars, parts[len(blocks) :], strict=True)}


def split_at(tables: Architecture, fixed: int) -> Split:
    """X of the first `fixed` layers: what later layers, readouts and the noise head need of them."""
    layers = tables.layers
    on = fixed < len(layers)
    last = layers[fixed - 1]
    widths = tuple((2 * degree + 1, _channels(last, j)) for j, degree in enumerate(last.hidden)) if on else ()
    reads = {r.layer: r for r in tables.readouts if r.layer < fixed - int(on)}
    free = [t for t, r in reads.items() if r.second is not None]
    linear = [t for t, r in reads.items() if r.second is None]
    seen = range(max(0, len(layers) - 2), fixed - int(on))  # by the noise head
    plain = [t for t in seen if t not in reads]
    order = [(t, _channels(layers[t], layers[t].scalar)) for t in (*free, *linear, *plain)]
    size = dict(order)
    first_sum = sum(d * c for d, c in widths) + sum(size[t] for t in free)
    return Split(fixed, widths, tuple(order), first_sum, first_sum + sum(size[t] for t in linear))


def _channels(layer: Layer, block: int) -> int:
    part = layer.product.parts[block]
    return layer.mixed if part is None else part.columns


class Trunk:
    """The first layers of a potential with their foundation weights."""

    def __init__(self, potential: StackedPotential, split: Split) -> None:
        self.potential = potential
        self.split = split
        self._copies: dict[int, Mapping[str, Tensor]] = {}

    def outputs(self, copies: int, y: Tensor, radial: Sequence[Bonds], g: Arranged) -> Tensor:
        """X (copies, N, F) of equal members, each a function of its own y.  Args: y, radial: (copies, ...), as in an evaluation."""
        p, weights = self.potential, self._weights(copies)
        blocks: list[Tensor] = []
        scalars = []
        for t in range(self.split.fixed):
            blocks = p._layer(t, weights, blocks, y, radial[t], g)
            scalars.append(blocks[p.tables.layers[t].scalar].flatten(2))
        handed = [block.flatten(2) for block in blocks] if self.split.widths else []
        return torch.cat([*handed, *(scalars[t] for t, _ in self.split.scalars)], dim=2)

    def radial(self, basis: tuple[Tensor, ...]) -> list[Bonds]:
        """What the radial networks of the fixed layers make of the bonds, once for all members."""
        p, weights = self.potential, self._weights(1)
        return [p._radial(layer, weights, basis) for layer in p.tables.layers[: self.split.fixed]]

    def known(self, graph: Graph) -> KnownFrames:
        """X and its Jacobian.  Args: graph: leading axes (B,)."""
        p = self.potential
        g = arrange(graph, p._sorting(graph.numbers))
        a, b, _ = g.shape
        with torch.no_grad():
            length, harmonics, angular_slopes, basis = p._geometry(g)
            radial = self.radial(basis)
        with torch.enable_grad():
            y = harmonics.clone().requires_grad_(True)
            radial = [bonds.made_leaves(kernels=False) for bonds in radial]
            leaves = [leaf for bonds in radial for leaf in bonds.leaves]
            x = self.outputs(1, y, radial, g)
            u = torch.zeros_like(x).requires_grad_(True)
            pulled = torch.autograd.grad(x, [y, *leaves], u, create_graph=True)
        j, s = self.split.first_sum, self.split.first_plain
        slopes, sums = [], []
        directions = tangents(g, graph.cell is not None)
        for k, move in enumerate(directions):
            change = (angular_slopes * move.unsqueeze(2)).sum(dim=-1).view(y.shape)
            stretch = _stretch(g, length, move)
            along = [change, *((slope * stretch).detach() for bonds in radial for slope in bonds.slopes if slope is not None)]
            (dx,) = torch.autograd.grad(pulled, u, along, retain_graph=k + 1 < len(directions))
            dx = dx.view(a, b, -1).index_select(0, g.inverse).transpose(0, 1)  # (B, A, F)
            slopes.append(dx[..., :j].reshape(b, a * j))
            sums.append(dx[..., j:s].sum(dim=1))
        energy, fixed_slopes = self._fixed(graph, g, length)
        outputs = x.detach().view(a, b, -1).index_select(0, g.inverse).transpose(0, 1)
        extra = {
            "fixed_energy": energy, "fixed_slopes": fixed_slopes, "outputs": outputs.contiguous(),
            "slopes": torch.stack(slopes, dim=-1), "sums": torch.stack(sums, dim=-1),
        }  # fmt: skip
        return with_known(graph, extra)

    def bytes_per_frame(self, atoms: int, periodic: bool) -> int:
        """What `known` keeps of a frame."""
        columns = 3 * atoms + (6 if periodic else 0)
        return (atoms * self.split.first_sum + self.split.first_plain) * columns * self.potential.dtype.itemsize

    def _fixed(self, graph: Graph, g: Arranged, length: Tensor) -> tuple[Tensor, Tensor]:
        """Energy (B,) eV of the free atoms and of the nuclear repulsion, and its slopes (B, D)."""
        p = self.potential
        slope = length.new_zeros(1, g.half.shape[1])
        node, slope = p._with_repulsion(length.new_zeros(1, g.kind.numel()), slope, g, length)
        none = length.new_zeros(1, length.shape[1], 1)
        forces, virial = edge_sums(none, slope, none.unsqueeze(-1).expand(-1, -1, 1, 3), length, g)
        b = graph.lead[-1]
        parts = [-forces.reshape(b, -1)]
        if graph.cell is not None:
            parts.append(-torch.stack([virial[0, :, i, k] for i, k in STRAINS], dim=-1))
        return p._total(node, g)[0], torch.cat(parts, dim=-1)

    def _weights(self, copies: int) -> Mapping[str, Tensor]:
        """θ_0 of `copies` equal members, with what follows from it."""
        if copies not in self._copies:
            with torch.no_grad():
                self._copies[copies] = self.potential.prepare(repeat_weights(self.potential.weights, copies))
        return self._copies[copies]


def with_known(graph: Graph, extra: Mapping[str, Tensor]) -> KnownFrames:
    """The frames with the fields that `KnownFrames` adds."""
    same: dict[str, Any] = {f.name: getattr(graph, f.name) for f in fields(Graph)}
    return KnownFrames(**same, **extra)


def tangents(g: Arranged, periodic: bool) -> list[Tensor]:
    """Changes of the edge vectors (L, E, 3) for a step of each atom along each axis, the same in all frames, and for each strain."""
    a, b, k = g.shape
    receiver = torch.arange(a * b * k, device=g.source.device).div(b * k, rounding_mode="floor").unsqueeze(0)
    source = g.source.div(b, rounding_mode="floor")
    mask = g.mask.unsqueeze(-1)
    axes = torch.eye(3, dtype=g.vectors.dtype, device=g.vectors.device)
    out = []
    for place in g.inverse.tolist():
        sign = (receiver == place).to(g.vectors) - (source == place).to(g.vectors)
        out += [sign.unsqueeze(-1) * axis * mask for axis in axes]
    if periodic:
        for i, j in STRAINS:
            strain = 0.5 * (torch.outer(axes[i], axes[j]) + torch.outer(axes[j], axes[i]))
            out.append(g.vectors @ strain * mask)
    return out


def _stretch(g: Arranged, length: Tensor, move: Tensor) -> Tensor:
    """Changes of the bond lengths (L, Q, 1)."""
    return torch.gather((g.vectors / length.unsqueeze(-1) * move).sum(dim=-1), 1, g.half).unsqueeze(-1)
