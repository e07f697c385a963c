"""The symmetric contraction of one layer by the kernels, with the derivatives that forces and training on forces need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn_driver.potential.native.library import LANE_BYTES
from bnn_driver.potential.native.ops import operators


@dataclass(frozen=True, eq=False)
class PolynomialTables:
    """out_r = Σ_pairs (x_a x_b) Σ_i c x_i with the terms of nonzero coefficient alone, sorted by pair."""

    single: Tensor
    """(Q,) int64: i of each term; the last component is the constant 1."""
    pair: Tensor
    """(P, 3) int64: a, b and the output r."""
    start: Tensor
    """(P + 1,) int64: first term of each pair."""
    table: Tensor
    """(k of all output irreps, Q): c = table^T W."""
    outputs: int

    def weights(self, weights: Sequence[Sequence[Tensor]]) -> Tensor:
        """c of every element, (M, E, C / lanes, Q, lanes), lanes being the channels of one vector, as the kernels read them.

        Args: weights: per output irrep and ν: (M, E, k_ν, C).
        """
        w = torch.cat([x for group in weights for x in group], dim=2)
        lanes = LANE_BYTES // w.element_size()
        blocks = w.unflatten(3, (-1, lanes)).transpose(2, 3)  # (M, E, C / lanes, k, lanes)
        return torch.matmul(self.table.T, blocks)

    def __call__(self, x: Tensor, coefficients: Tensor, slices: Sequence[tuple[int, int, int]]) -> Tensor:
        """out (M, N, R, C), differentiable twice with respect to x, once with respect to the coefficients.

        Args: x: (M, N, n, C).   slices: (element, first node, last node + 1), nodes being sorted by element.
        """
        ranges = [0] * (2 * coefficients.shape[1])
        for element, first, last in slices:
            ranges[2 * element : 2 * element + 2] = [first, last]
        return _Contract.apply(self, tuple(ranges), x, coefficients)

    def arguments(self, ranges: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Sequence[int]]:
        """The tables in the order of the operators."""
        return self.single, self.pair, self.start, ranges


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tables: PolynomialTables, ranges: tuple[int, ...], x: Tensor, c: Tensor) -> Tensor:
        ctx.tables, ctx.ranges = tables, ranges
        ctx.save_for_backward(x, c)
        return operators().contract(x, c, *tables.arguments(ranges), tables.outputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, c = ctx.saved_tensors
        if torch.is_grad_enabled():  # forces to be differentiated again: they are no derivative with respect to weights
            return None, None, _Gradient.apply(ctx.tables, ctx.ranges, x, c, g), None
        of_c = ctx.needs_input_grad[3]
        gx, gc = operators().contract_gradient(x, c, g, *ctx.tables.arguments(ctx.ranges), of_c)
        return None, None, gx, gc if of_c else None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tables: PolynomialTables, ranges: tuple[int, ...], x: Tensor, c: Tensor, g: Tensor) -> Tensor:
        ctx.tables, ctx.ranges = tables, ranges
        ctx.save_for_backward(x, c, g)
        return operators().contract_gradient(x, c, g, *tables.arguments(ranges), False)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        x, c, g = ctx.saved_tensors
        of_c = ctx.needs_input_grad[3]
        of_g, of_x, gc = operators().contract_along(x, v, c, g, *ctx.tables.arguments(ctx.ranges), of_c)
        return None, None, of_x, gc if of_c else None, of_g
