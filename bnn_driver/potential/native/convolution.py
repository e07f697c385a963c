"""The convolution of one layer by the kernels, with the derivatives that forces and training on forces need.

A = Σ_k w_k x_k y_k is linear in each of w, x and y.  With g = ∂U/∂A its gradients are sums of the same kind, and so are the
derivatives of these along a direction (dw, dx, dy), which is all that a second reverse pass asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn_driver.potential.architecture import Layer
from bnn_driver.potential.arrangement import Arranged
from bnn_driver.potential.native.library import LANE_BYTES, MAX_DEGREE, NoKernels
from bnn_driver.potential.native.ops import fits, operators


@dataclass(frozen=True)
class ConvolutionPath:
    """One product of a block of the source's features with the harmonics of one degree."""

    component: int
    """First component of the block in the features."""
    l1: int
    l2: int
    l3: int
    column: int
    """Its weights are columns column·C to (column + 1)·C."""
    block: int
    """Block of the result, and its slot there."""
    slot: int
    coupling: Tensor | None
    """(2 l3 + 1, (2 l2 + 1)(2 l1 + 1)); None when it is one."""


@dataclass(frozen=True, eq=False)
class ConvolutionTables:
    """Paths and couplings as the kernels read them."""

    paths: Tensor
    """(P, 11) int64, the struct Path of kernels.cpp."""
    terms: Tensor
    """(n, 2) int64: component of the result, (component of the harmonics)·(2 l1 + 1) + (component of the source)."""
    values: Tensor
    """(n,)."""
    blocks: tuple[tuple[int, int], ...]
    """(2 l3 + 1, slots) of each block of the result."""

    @property
    def rows(self) -> int:
        """Rows of all blocks."""
        return sum(d * slots for d, slots in self.blocks)


def convolution_tables(
    paths: Sequence[ConvolutionPath], blocks: Sequence[tuple[int, int]], dtype: torch.dtype
) -> ConvolutionTables:
    """Args: blocks: (l3, slots) of each block of the result."""
    sizes = [(2 * degree + 1, slots) for degree, slots in blocks]
    before = [sum(d * slots for d, slots in sizes[:i]) for i in range(len(sizes))]
    rows: list[list[int]] = []
    terms: list[list[int]] = []
    values: list[float] = []
    for p in paths:
        d1, d2, d3 = 2 * p.l1 + 1, 2 * p.l2 + 1, 2 * p.l3 + 1
        coupling = torch.eye(d3, dtype=torch.float64) if p.coupling is None else p.coupling.double()
        first = len(terms)
        for place in coupling.abs().gt(1e-12).nonzero().tolist():
            terms.append(place)
            values.append(float(coupling[place[0], place[1]]))
        d3, slots = sizes[p.block]
        rows.append([p.component, d1, p.l2**2, d2, p.column, before[p.block], d3, slots, p.slot, first, len(terms)])
    return ConvolutionTables(torch.tensor(rows), torch.tensor(terms), torch.tensor(values, dtype=dtype), tuple(sizes))


def refusal(layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernels cannot be used; empty when they can."""
    if device.type != "cpu":
        return f"they are for CPUs, the potential is on {device}"
    for layer in layers:
        if not (fits(layer.channels, dtype) and fits(layer.mixed, dtype)):
            return f"{layer.channels} and {layer.mixed} channels of {dtype} do not fill vectors of {LANE_BYTES} bytes"
        if max(max(p.l1, p.l2) for p in layer.paths) > MAX_DEGREE:
            return f"a degree above {MAX_DEGREE}"
    try:
        operators()
    except NoKernels as error:
        return str(error)
    return ""


def layer_tables(layer: Layer, dtype: torch.dtype) -> ConvolutionTables:
    """Of one layer of MACE: its contracted blocks that anything reaches, in their order."""
    component, first = 0, []
    for part, degree in zip(layer.up.parts, _source_degrees(layer), strict=True):
        first.append(component)
        component += 0 if part is None else 2 * degree + 1
    parts = [(degree, part) for degree, part in zip(layer.degrees, layer.mid.parts, strict=True) if part is not None]
    slot_of = {target: (block, slot) for block, (_, part) in enumerate(parts) for slot, target in enumerate(part.inputs)}
    paths = [
        ConvolutionPath(first[p.source], p.l1, p.l2, p.l3, column, *slot_of[p.target], p.coupling)
        for column, p in enumerate(layer.paths)
        if p.target in slot_of and layer.up.parts[p.source] is not None
    ]
    return convolution_tables(paths, [(degree, len(part.inputs)) for degree, part in parts], dtype)


def _source_degrees(layer: Layer) -> list[int]:
    """l of each block of the neighbours' features."""
    found = {p.source: p.l1 for p in layer.paths}
    return [found.get(i, 0) for i in range(len(layer.up.parts))]


@dataclass(frozen=True, eq=False)
class Convolution:
    """One layer on one graph."""

    tables: ConvolutionTables
    source: Tensor
    """(L, E) row of x of each edge."""
    pair: Tensor
    """(L, E) bond."""
    mask: Tensor
    """(L, E) 1 where there is an edge."""
    nodes: int
    inner_x: bool
    """False when x depends on weights alone, so that forces never ask for its gradient."""

    @classmethod
    def on(cls, tables: ConvolutionTables, g: Arranged, source: Tensor, inner_x: bool) -> Convolution:
        """On an arranged graph; `source` is its `source`, or its `source_kind` for features per element."""
        return cls(tables, source.contiguous(), g.pair.contiguous(), g.mask.contiguous(), g.kind.numel(), inner_x)

    def __call__(self, w: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
        """Sums over neighbours, differentiable twice: per block (M, N·(2 l3 + 1), slots·C).

        Args: w: (M, Q, paths·C).   x: (M, R, n, C).   y: (M, E, m), a constant of the second derivative.
        """
        return self._blocks(_Convolve.apply(self, w, x, y), len(w), x.shape[3])

    def along_bonds(self, r: Tensor, w: Tensor, slope: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
        """The same, differentiable once: with respect to r, of which w has the derivative `slope`, x and y.

        Args: r: (M, Q), its values are not read.   slope: (M, Q, paths·C) dw/dr.
        """
        return self._blocks(_AlongBonds.apply(self, r, w, slope, x, y), len(w), x.shape[3])

    def value(self, w: Tensor, dw: Tensor | None, x: Tensor, dx: Tensor | None, y: Tensor, dy: Tensor | None) -> Tensor:
        """See `ops._convolve`."""
        t = self.tables
        index = (self.source, self.pair, self.mask, t.paths, t.terms, t.values)
        return operators().convolve(w, dw, x, dx, y, dy, *index, self.nodes, t.rows)

    def gradient(
        self, g: Tensor, w: Tensor, dw: Tensor | None, x: Tensor, dx: Tensor | None, y: Tensor, dy: Tensor | None,
        slope: Tensor | None, of_w: bool, of_x: bool, of_y: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """See `ops._convolve_gradient`."""
        t = self.tables
        index = (self.source, self.pair, self.mask, t.paths, t.terms, t.values)
        return operators().convolve_gradient(g, w, dw, x, dx, y, dy, slope, *index, self.nodes, of_w, of_x, of_y)

    def _blocks(self, flat: Tensor, members: int, channels: int) -> list[Tensor]:
        n = members * self.nodes * channels
        parts = flat.split([n * d * slots for d, slots in self.tables.blocks])
        shapes = [(members, self.nodes * d, slots * channels) for d, slots in self.tables.blocks]
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Convolution, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(w, x, y)
        return layer.value(w, None, x, None, y, None)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, x, y = ctx.saved_tensors
        of_x = ctx.layer.inner_x or not torch.is_grad_enabled()
        gw, gx, gy = _Gradient.apply(ctx.layer, of_x, g, w, x, y)
        return None, gw, gx if of_x else None, gy


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Convolution, of_x: bool, g: Tensor, w: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, w, x, y)
        return layer.gradient(g, w, None, x, None, y, None, None, True, of_x, True)[:3]

    @staticmethod
    def backward(ctx: Any, dw: Tensor | None, dx: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        g, w, x, y = ctx.saved_tensors
        if dx is not None and not dx.numel():
            dx = None
        if dw is None and dx is None and dy is None:
            return (None,) * 6
        of_g = ctx.layer.value(w, dw, x, dx, y, dy)
        of_w, of_x, _, _ = ctx.layer.gradient(g, w, dw, x, dx, y, dy, None, True, True, False)
        return None, None, of_g, of_w, of_x, None


class _AlongBonds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Convolution, r: Tensor, w: Tensor, slope: Tensor, x: Tensor, y: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(w, slope, x, y)
        return layer.value(w, None, x, None, y, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, slope, x, y = ctx.saved_tensors
        of_x = ctx.needs_input_grad[4]
        _, gx, gy, gr = ctx.layer.gradient(g, w, None, x, None, y, None, slope, False, of_x, True)
        return None, gr, None, None, gx if of_x else None, gy
