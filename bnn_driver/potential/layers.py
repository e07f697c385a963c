"""The pieces of one layer of the fast path: radial networks, convolution, linear maps, readouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bnn_driver.potential.architecture import Dense, ElementPart, Layer, LinearPart, Readout

Slices = Sequence[tuple[int, int, int]]


def forward_mode(network: Dense, weights: Mapping[str, Tensor], x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """A radial network and its derivative along r, in one pass.

    Args: x, dx: (L, Q, in), L = 1 or M.   Returns: (M, Q, out) twice.
    """
    q = x.shape[1]
    h = torch.cat([x, dx], dim=1)
    for i, (name, scale) in enumerate(zip(network.names, network.scales, strict=True)):
        w = weights[name] * scale
        h = torch.bmm(h if len(h) == len(w) else h.expand(len(w), *h.shape[1:]), w)
        if i < len(network.names) - 1:
            value, slope = h.split(q, dim=1)
            gate = torch.sigmoid(value)
            silu = value * gate
            h = torch.cat([silu, slope * (gate + silu * (1 - gate))], dim=1)
    value, slope = h.split(q, dim=1)
    return value, slope


def matrix(weight: Tensor, part: LinearPart) -> Tensor:
    """(M, rows, columns) of one output block, scaled."""
    return _block(weight, part.start, part.rows * part.columns).view(-1, part.rows, part.columns) * part.scale


def element_matrix(weight: Tensor, part: ElementPart) -> Tensor:
    """(M, elements, in, out), scaled."""
    a, e, c = part.shape
    return _block(weight, part.start, a * e * c).view(-1, a, e, c).transpose(1, 2) * part.scale


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


def convolve(layer: Layer, w: Tensor, sources: Sequence[Tensor | None], y: Tensor) -> dict[int, Tensor]:
    """Messages summed over neighbours, by slot of the tensor product: (M·N, 2 l3 + 1, C), each still to be scaled.

    Args: w: (M, E, paths·C [+ 1]).   sources: per block (M, E, 2 l1 + 1, C).   y: (M·N, K, n) harmonics.
    """
    m, e = w.shape[:2]
    nodes, k, _ = y.shape
    c, n_paths = layer.channels, len(layer.paths)
    per_path = (w if w.shape[-1] == n_paths * c else w[..., : n_paths * c]).reshape(m, e, n_paths, c)
    degrees = y.transpose(1, 2).split([2 * degree + 1 for degree in range(math.isqrt(y.shape[-1]))], dim=1)
    only = sources[0] if len(sources) == 1 else None
    if only is not None and only.shape[2] == 1:  # scalars alone: one product for all paths
        columns = list((per_path * only).view(nodes, k, n_paths * c).split(c, dim=-1))
    else:
        columns = []
        w_of = per_path.unsqueeze(3).unbind(2)
        for p, path in enumerate(layer.paths):
            x = sources[path.source]
            columns.append(y.new_zeros(nodes, k, c * (2 * path.l1 + 1)) if x is None else (w_of[p] * x).view(nodes, k, -1))
    out = {}
    for path, z in zip(layer.paths, columns, strict=True):
        summed = torch.bmm(degrees[path.l2], z)
        if path.coupling is not None:
            summed = torch.matmul(path.coupling, summed.view(nodes, -1, c))
        out[path.target] = summed.view(nodes, 2 * path.l3 + 1, c)
    return out


def mix(layer: Layer, weights: Mapping[str, Tensor], mid: Mapping[int, Tensor], m: int, slices: Slices) -> list[Tensor | None]:
    """Messages mixed over paths and channels, per contracted block: (M, N·(2l+1), C); None where nothing arrives."""
    out: list[Tensor | None] = []
    for number, (degree, part) in enumerate(zip(layer.degrees, layer.mid.parts, strict=True)):
        if part is None:
            out.append(None)
            continue
        x = mid[part.inputs[0]] if len(part.inputs) == 1 else torch.cat([mid[i] for i in part.inputs], dim=-1)
        x = x.view(m, -1, part.rows)
        w = matrix(weights[layer.mid.weight], part) * layer.factors[number]
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
    first = weights[readout.first].view(m, c, -1) * readout.scale
    h = torch.bmm(x, first)
    if readout.second is None:
        return h.view(m, n)
    second = weights[readout.second].view(m, -1, 1) * (readout.second_scale * readout.gain)
    return torch.bmm(torch.nn.functional.silu(h), second).view(m, n)
