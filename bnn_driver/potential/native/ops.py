"""The kernels as torch operators without derivatives: opaque to compilers, which call them as they are.

Shapes: M members, N nodes, K slots per node, E = N·K edges, Q bonds, C channels; L is 1 (shared by all members) or M.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bnn_driver.potential.native.library import LANE_BYTES, load_kernels

_TABLES = "Tensor source, Tensor pair, Tensor mask, Tensor paths, Tensor terms, Tensor values"
_ARGUMENTS = "Tensor w, Tensor? dw, Tensor x, Tensor? dx, Tensor y, Tensor? dy"
_POLYNOMIAL = "Tensor single, Tensor pair, Tensor start, int[] slices"
_SCHEMES = {
    "convolve": f"({_ARGUMENTS}, {_TABLES}, int nodes, int rows) -> Tensor",
    "convolve_gradient": f"(Tensor g, {_ARGUMENTS}, Tensor? slope, {_TABLES}, int nodes, bool of_w, bool of_x, bool of_y)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "contract": f"(Tensor x, Tensor c, {_POLYNOMIAL}, int outputs) -> Tensor",
    "contract_gradient": f"(Tensor x, Tensor c, Tensor g, {_POLYNOMIAL}, bool of_c) -> (Tensor, Tensor)",
    "contract_along": f"(Tensor x, Tensor v, Tensor c, Tensor g, {_POLYNOMIAL}, bool of_c) -> (Tensor, Tensor, Tensor)",
}


class Namespace:
    """torch.ops.bnn_driver, and the registration that it lives by."""

    def __init__(self, library: torch.library.Library, ops: Any) -> None:
        self._library, self._ops = library, ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)


@functools.cache
def operators() -> Any:
    """torch.ops.bnn_driver with the kernels behind it.  Raises: NoKernels when they cannot be compiled."""
    load_kernels()
    library = torch.library.Library("bnn_driver", "DEF")
    implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "convolve": (_convolve, _convolve_shapes),
        "convolve_gradient": (_convolve_gradient, _convolve_gradient_shapes),
        "contract": (_contract, _contract_shapes),
        "contract_gradient": (_contract_gradient, _contract_gradient_shapes),
        "contract_along": (_contract_along, _contract_along_shapes),
    }
    for name, (function, shapes) in implementations.items():
        library.define(name + _SCHEMES[name])
        library.impl(name, function, "CPU")
        torch.library.register_fake(f"bnn_driver::{name}", shapes, lib=library)
    return Namespace(library, torch.ops.bnn_driver)


def fits(channels: int, dtype: torch.dtype) -> bool:
    """True when the channels fill whole vectors."""
    return channels > 0 and channels * dtype.itemsize % LANE_BYTES == 0


def _convolve(
    w: Tensor, dw: Tensor | None, x: Tensor, dx: Tensor | None, y: Tensor, dy: Tensor | None,
    source: Tensor, pair: Tensor, mask: Tensor, paths: Tensor, terms: Tensor, values: Tensor, nodes: int, rows: int,
) -> Tensor:  # fmt: skip
    """Sums over neighbours, flat, block after block: (M, N, 2 l3 + 1, slots, C) each; along (dw, dx, dy) where one is given.

    Args: w, dw: (M, Q, paths·C).   x, dx: (M, R, n, C).   y, dy: (L, E, m).   source, pair, mask: (L, E).   rows: of all blocks.
    """
    w, x, y, dw, dy = _rows(w), x.contiguous(), _rows(y), _rows_if(dw), _rows_if(dy)
    dx = None if dx is None else dx.contiguous()
    out = x.new_zeros(len(w) * nodes * rows * x.shape[3])
    sizes = _sizes(w, dw, None, x, y, dy, mask, paths, nodes)
    _call("convolve", w.dtype, sizes, source, pair, mask, paths, terms, values, w, dw, x, dx, y, dy, out)
    return out


def _convolve_shapes(
    w: Tensor, dw: Tensor | None, x: Tensor, dx: Tensor | None, y: Tensor, dy: Tensor | None,
    source: Tensor, pair: Tensor, mask: Tensor, paths: Tensor, terms: Tensor, values: Tensor, nodes: int, rows: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(w.shape[0] * nodes * rows * x.shape[3])


def _convolve_gradient(
    g: Tensor, w: Tensor, dw: Tensor | None, x: Tensor, dx: Tensor | None, y: Tensor, dy: Tensor | None, slope: Tensor | None,
    source: Tensor, pair: Tensor, mask: Tensor, paths: Tensor, terms: Tensor, values: Tensor, nodes: int,
    of_w: bool, of_x: bool, of_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of <g, convolve>, or their change along (dw, dx, dy): of w, x, y (M, E, m) and r (M, Q), each empty when not asked for.

    Args: g: as `convolve` gives it.   slope: (M, Q, paths·C) dw/dr, with which the gradient of r is taken.   of_y: not along a direction.
    """
    w, x, y, dw, dy = _rows(w), x.contiguous(), _rows(y), _rows_if(dw), _rows_if(dy)
    dx = None if dx is None else dx.contiguous()
    slope, g = _rows_if(slope), g.contiguous()
    m, bonds, width = w.shape
    parts = max(1, min(-(-torch.get_num_threads() // m), x.shape[3] * x.element_size() // LANE_BYTES))
    gw = w.new_zeros((m, bonds, width) if of_w else 0)
    gx = torch.zeros_like(x) if of_x else x.new_zeros(0)
    gy = y.new_zeros((parts, m, *y.shape[1:]) if of_y else 0)
    gr = w.new_zeros((parts, m, bonds) if slope is not None else 0)
    sizes = _sizes(w, dw, slope, x, y, dy, mask, paths, nodes)
    tensors = (g, w, dw, x, dx, y, dy, slope, *(t if t.numel() else None for t in (gw, gx, gy, gr)))
    _call("convolve_gradient", w.dtype, sizes, source, pair, mask, paths, terms, values, *tensors, parts)
    return gw, gx, _summed(gy, of_y), _summed(gr, slope is not None)


def _convolve_gradient_shapes(
    g: Tensor, w: Tensor, dw: Tensor | None, x: Tensor, dx: Tensor | None, y: Tensor, dy: Tensor | None, slope: Tensor | None,
    source: Tensor, pair: Tensor, mask: Tensor, paths: Tensor, terms: Tensor, values: Tensor, nodes: int,
    of_w: bool, of_x: bool, of_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    m, bonds, width = w.shape
    return (
        w.new_empty((m, bonds, width) if of_w else 0),
        x.new_empty(x.shape if of_x else 0),
        y.new_empty((m, *y.shape[1:]) if of_y else 0),
        w.new_empty((m, bonds) if slope is not None else 0),
    )


def _contract(x: Tensor, c: Tensor, single: Tensor, pair: Tensor, start: Tensor, slices: Sequence[int], outputs: int) -> Tensor:
    """Values (M, N, R, C) of the polynomial.

    Args: x: (M, N, n, C).   c: (M, elements, C / lanes, terms, lanes).   slices: first and last node of each element, in one row.
    """
    x, c = x.contiguous(), c.contiguous()
    out = x.new_zeros(*x.shape[:2], outputs, x.shape[3])
    _call("contract", x.dtype, *_polynomial(x, c, single, pair, start, slices, outputs), x, c, out)
    return out


def _contract_shapes(
    x: Tensor, c: Tensor, single: Tensor, pair: Tensor, start: Tensor, slices: Sequence[int], outputs: int
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], outputs, x.shape[3])


def _contract_gradient(
    x: Tensor, c: Tensor, g: Tensor, single: Tensor, pair: Tensor, start: Tensor, slices: Sequence[int], of_c: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of <g, contract> with respect to x, and to c when asked for."""
    x, c, g = x.contiguous(), c.contiguous(), g.contiguous()
    gx, gc = torch.zeros_like(x), torch.zeros_like(c) if of_c else c.new_zeros(0)
    tables = _polynomial(x, c, single, pair, start, slices, g.shape[2])
    _call("contract_gradient", x.dtype, *tables, x, c, g, gx, gc if of_c else None)
    return gx, gc


def _contract_gradient_shapes(
    x: Tensor, c: Tensor, g: Tensor, single: Tensor, pair: Tensor, start: Tensor, slices: Sequence[int], of_c: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), c.new_empty(c.shape if of_c else 0)


def _contract_along(
    x: Tensor, v: Tensor, c: Tensor, g: Tensor, single: Tensor, pair: Tensor, start: Tensor, slices: Sequence[int], of_c: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Along the direction v of x: the change of the values, of the gradient of x, and of the gradient of c when asked for."""
    x, v, c, g = x.contiguous(), v.contiguous(), c.contiguous(), g.contiguous()
    out, gx, gc = torch.zeros_like(g), torch.zeros_like(x), torch.zeros_like(c) if of_c else c.new_zeros(0)
    tables = _polynomial(x, c, single, pair, start, slices, g.shape[2])
    _call("contract_along", x.dtype, *tables, x, v, c, g, out, gx, gc if of_c else None)
    return out, gx, gc


def _contract_along_shapes(
    x: Tensor, v: Tensor, c: Tensor, g: Tensor, single: Tensor, pair: Tensor, start: Tensor, slices: Sequence[int], of_c: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return g.new_empty(g.shape), x.new_empty(x.shape), c.new_empty(c.shape if of_c else 0)


def _sizes(
    w: Tensor, dw: Tensor | None, slope: Tensor | None, x: Tensor, y: Tensor, dy: Tensor | None, mask: Tensor, paths: Tensor, nodes: int
) -> list[int]:  # fmt: skip
    """The struct Sizes of kernels.cpp."""
    m, bonds, width = w.shape
    edges = mask.shape[1]
    counts = [m, nodes, edges // nodes, bonds, width, x.shape[1], x.shape[2], x.shape[3], y.shape[2], len(paths)]
    return [*counts, 0 if len(mask) == 1 else edges, _lead(w), _lead(dw), _lead(slope), _lead(y), _lead(dy)]


def _polynomial(
    x: Tensor, c: Tensor, single: Tensor, pair: Tensor, start: Tensor, slices: Sequence[int], outputs: int
) -> tuple[list[int], Tensor, Tensor, Tensor, list[int]]:
    """The struct Polynomial of kernels.cpp and its tables."""
    m, nodes, components, channels = x.shape
    sizes = [m, nodes, c.shape[1], len(single), len(pair), components, outputs, channels]
    return sizes, single, pair, start, list(slices)


def _lead(x: Tensor | None) -> int:
    """Numbers from one member to the next."""
    return 0 if x is None or len(x) == 1 else x.stride(0)


def _rows(x: Tensor) -> Tensor:
    """Each member's matrix without gaps; the members themselves may lie apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _rows_if(x: Tensor | None) -> Tensor | None:
    return None if x is None else _rows(x)


def _summed(parts: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return parts
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


def _call(name: str, dtype: torch.dtype, sizes: list[int], *arguments: Tensor | list[int] | int | None) -> None:
    """One kernel: tensors by their address, numbers as they are, the number of threads last."""
    entry = getattr(load_kernels(), f"{name}_{str(dtype).removeprefix('torch.')}")
    passed: list[object] = [(ctypes.c_int64 * len(sizes))(*sizes)]
    for x in arguments:
        if isinstance(x, Tensor):
            passed.append(ctypes.c_void_p(x.data_ptr()))
        elif isinstance(x, list):
            passed.append((ctypes.c_int64 * len(x))(*x))
        else:
            passed.append(None if x is None else ctypes.c_int64(x))
    entry(*passed, ctypes.c_int(torch.get_num_threads()))
