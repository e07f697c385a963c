"""The pieces of one layer of the fast path: radial networks, convolution, linear maps, readouts; weights are folded ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnn_driver.potential.architecture import Dense, ElementPart, Layer, LinearPart, Readout
from bnn_driver.potential.arrangement import rows

Slices = Sequence[tuple[int, int, int]]


@dataclass(frozen=True, eq=False)
class Bonds:
    """What the radial networks of one layer make of every bond."""

    w: Tensor
    """(M, Q, paths·C) weights of the convolution."""
    dw: Tensor
    """dw/dr, 1/Å."""
    rho: Tensor | None
    """(M, Q, 1) contribution to the density, where the model has one."""
    drho: Tensor | None
    r: Tensor | None = None
    """(M, Q) stands for the bond lengths where the convolution is differentiated by them and not by w; its values are not read."""

    @property
    def leaves(self) -> list[Tensor]:
        """What the energy is differentiated by on its way to the bond lengths."""
        return [x for x in (self.w if self.r is None else self.r, self.rho) if x is not None]

    @property
    def slopes(self) -> list[Tensor | None]:
        """How each of the leaves changes along its bond; None: by one."""
        of_w = self.dw if self.r is None else None
        return [of_w] if self.rho is None else [of_w, self.drho]

    def made_leaves(self, kernels: bool) -> Bonds:
        """The same, ready for one derivative.  Args: kernels: these take it by the bond lengths."""
        r = self.w.new_zeros(self.w.shape[:2]).requires_grad_(True) if kernels else None
        w = self.w if kernels else self.w.requires_grad_(True)
        return Bonds(w, self.dw, None if self.rho is None else self.rho.requires_grad_(True), self.drho, r)

    def of_members(self, members: int) -> Bonds:
        """Those of the first members, or equal ones where there is but one; no leaves."""
        rho, drho = (None if x is None else _first(x, members) for x in (self.rho, self.drho))
        return Bonds(_first(self.w, members), _first(self.dw, members), rho, drho)

    def shortened(self, members: int) -> Bonds:
        """Of the first members alone, leaves as they are: for the slopes of their gradients."""
        rho, drho, r = (None if x is None else x[:members] for x in (self.rho, self.drho, self.r))
        return Bonds(self.w[:members], self.dw[:members], rho, drho, r)


def _first(x: Tensor, members: int) -> Tensor:
    return x.detach().expand(members, *x.shape[1:]).clone() if len(x) == 1 else x.detach()[:members]


def slope_along_bonds(gradients: Sequence[Tensor], radial: Sequence[Bonds]) -> Tensor:
    """∂E/∂r (M, Q) of the bonds.  Args: gradients: of the leaves of `radial`, in their order."""
    slopes = [slope for bonds in radial for slope in bonds.slopes]
    parts = [g if slope is None else (g * slope).sum(dim=-1) for g, slope in zip(gradients, slopes, strict=True)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def forward_mode(network: Dense, weights: Mapping[str, Tensor], x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """A radial network and its derivative along r, in one pass.

    Args: x, dx: (L, Q, in), L = 1 or M.   Returns: (M, Q, out) twice.
    """
    q = x.shape[1]
    h = torch.cat([x, dx], dim=1)
    for i, name in enumerate(network.names):
        w = weights[name]
        h = torch.bmm(h if len(h) == len(w) else h.expand(len(w), *h.shape[1:]), w)
        if i < len(network.names) - 1:
            value, slope = h.split(q, dim=1)
            gate = torch.sigmoid(value)
            silu = value * gate
            h = torch.cat([silu, slope * (gate + silu * (1 - gate))], dim=1)
    value, slope = h.split(q, dim=1)
    return value, slope


def matrix(weight: Tensor, part: LinearPart) -> Tensor:
    """(M, rows, columns) of one output block."""
    return _block(weight, part.start, part.rows * part.columns).view(-1, part.rows, part.columns)


def element_matrix(weight: Tensor, part: ElementPart) -> Tensor:
    """(M, elements, in, out)."""
    a, e, c = part.shape
    return _block(weight, part.start, a * e * c).view(-1, a, e, c).transpose(1, 2)


def _block(weight: Tensor, start: int, size: int) -> Tensor:
    return weight if weight.shape[1] == size else weight[:, start : start + size]


def by_element(x: Tensor, w: Tensor, slices: Slices, width: int) -> Tensor:
    """Each element's own linear map.

    Args: x: (M, N·width, in), nodes sorted by element.   w: (M, elements, in, out).   Returns: (M, N·width, out).
    """
    of_element = w.unbind(1)
    nodes = x.split([(b - a) * width for _, a, b in slices], dim=1)
    parts = [torch.bmm(part, of_element[e]) for (e, _, _), part in zip(slices, nodes, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def convolve(layer: Layer, w: Tensor, sources: Sequence[Tensor | None], y: Tensor, edge_pair: Tensor) -> list[Tensor | None]:
    """Messages summed over neighbours, per contracted block: (M, N·(2l+1), slots·C); None where nothing arrives.

    Args: w: (M, Q, paths·C) of the bonds.   sources: per block (M, E, 2 l1 + 1, C).   y: (M, N, K, n) harmonics.   edge_pair: (L, E) bond.
    """
    m, n, k, _ = y.shape
    nodes, c, n_paths = m * n, layer.channels, len(layer.paths)
    per_path = rows(w, edge_pair).view(m, n * k, n_paths, c)
    degrees = y.reshape(nodes, k, -1).transpose(1, 2).split([2 * degree + 1 for degree in range(math.isqrt(y.shape[-1]))], dim=1)
    only = sources[0] if len(sources) == 1 else None
    if only is not None and only.shape[2] == 1:  # scalars alone: one product for all paths
        columns = list((per_path * only).view(nodes, k, n_paths * c).split(c, dim=-1))
    else:
        columns = []
        w_of = per_path.unsqueeze(3).unbind(2)
        for p, path in enumerate(layer.paths):
            x = sources[path.source]
            columns.append(y.new_zeros(nodes, k, c * (2 * path.l1 + 1)) if x is None else (w_of[p] * x).view(nodes, k, -1))
    slots = {}
    for path, z in zip(layer.paths, columns, strict=True):
        summed = torch.bmm(degrees[path.l2], z)
        if path.coupling is not None:
            summed = torch.matmul(path.coupling, summed.view(nodes, -1, c))
        slots[path.target] = summed.view(nodes, 2 * path.l3 + 1, c)
    out: list[Tensor | None] = []
    for part in layer.mid.parts:
        if part is None:
            out.append(None)
            continue
        x = slots[part.inputs[0]] if len(part.inputs) == 1 else torch.cat([slots[i] for i in part.inputs], dim=-1)
        out.append(x.view(m, -1, part.rows))
    return out


def mix(layer: Layer, weights: Mapping[str, Tensor], messages: Sequence[Tensor | None], slices: Slices) -> list[Tensor | None]:
    """Messages mixed over paths and channels, per contracted block: (M, N·(2l+1), C).  Args: messages: see `convolve`."""
    out: list[Tensor | None] = []
    for number, (degree, part, x) in enumerate(zip(layer.degrees, layer.mid.parts, messages, strict=True)):
        if part is None or x is None:
            out.append(None)
            continue
        w = matrix(weights[layer.mid.weight], part)
        if layer.residual:
            out.append(torch.bmm(x, w))
        else:
            element = next(p for p in layer.skip.parts if p.source == number)
            own = torch.matmul(w.unsqueeze(1), element_matrix(weights[layer.skip.weight], element))
            out.append(by_element(x, own, slices, 2 * degree + 1))
    return out


def product(layer: Layer, weights: Mapping[str, Tensor], contracted: Tensor, skip: Mapping[int, Tensor]) -> list[Tensor]:
    """Node features after the product: per block (M, N, 2l+1, C).  Args: contracted: (M, N, R, C)."""
    m, nodes, _, c = contracted.shape
    blocks = contracted.split([2 * degree + 1 for degree in layer.hidden], dim=2)
    out = []
    for j, (degree, part) in enumerate(zip(layer.hidden, layer.product.parts, strict=True)):
        if part is None:
            block = contracted.new_zeros(m, nodes, 2 * degree + 1, c)
        else:
            x = blocks[part.inputs[0]].reshape(m, -1, c)
            block = torch.bmm(x, matrix(weights[layer.product.weight], part)).view(m, nodes, 2 * degree + 1, -1)
        out.append(block + skip[j] if j in skip else block)
    return out


def read(readout: Readout, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Energy per node (M, N).  Args: x: (M, N, C) scalars."""
    m, n, c = x.shape
    first = weights[readout.first].view(m, c, -1)
    h = torch.bmm(x, first)
    if readout.second is None:
        return h.view(m, n)
    second = weights[readout.second].view(m, -1, 1)
    return torch.bmm(torch.nn.functional.silu(h), second).view(m, n)
