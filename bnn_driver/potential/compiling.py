"""Functions of tensors, compiled when that pays and used only while they agree with what they replace.

A compiler for tensor programs can be wrong without a word (torch 2.13 on CPUs made wrong code of two graphs of this kind), so
every compiled function is compared with the eager one, output by output, on the tensors it was made from and on the next ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Mode = Literal["off", "auto", "on"]
Function = Callable[..., tuple[Tensor, ...]]

#: seconds that one shape may cost before it is compiled: about what compiling costs on a CPU, so that at most about twice the least
#: possible time is spent
PATIENCE = 120.0
#: largest difference of an output, relative to its largest entry
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}
_CHECKS = 2


@dataclass
class _Shape:
    """What is known of one function at one shape."""

    spent: float = 0.0
    refused: bool = False
    compiled: Function | None = None
    checks: int = 0


class Compiler:
    """Runs functions eagerly, and compiled where that pays ("auto"), at once ("on"), or never ("off")."""

    def __init__(self, mode: Mode, patience: float = PATIENCE) -> None:
        """Args: patience: s, see `PATIENCE`."""
        self.mode = mode
        self.patience = patience
        self.tracing = False
        """True while a function is read for compiling: what compiles best is not what runs best."""
        self._shapes: dict[Hashable, _Shape] = {}
        self._unavailable = False

    def __call__(self, what: str, key: Hashable, function: Function, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of `function(*tensors)`.

        Args: what: name for messages.   key: everything but the tensors' values that the outputs depend on, shapes included.
            function: of tensors alone, without random numbers and without reading a tensor's values on the host.
        """
        if not self.active or self._unavailable:
            return function(*tensors)
        shape = self._shapes.setdefault((what, key), _Shape())
        if shape.refused:
            return function(*tensors)
        if shape.compiled is None:
            return self._eager(what, shape, function, tensors)
        if shape.checks < _CHECKS:
            return self._checked(what, shape, function(*tensors), tensors)
        return shape.compiled(*tensors)

    @property
    def active(self) -> bool:
        """False when nothing is ever compiled, so that shapes need not be few."""
        return self.mode != "off"

    @property
    def compiled(self) -> int:
        """Number of shapes that run compiled."""
        return sum(shape.compiled is not None and not shape.refused for shape in self._shapes.values())

    def _eager(self, what: str, shape: _Shape, function: Function, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        begin = time.perf_counter()
        out = function(*tensors)
        shape.spent += time.perf_counter() - begin
        if self.mode == "auto" and shape.spent < self.patience:
            return out
        logger.info("%s: compiling for these shapes, once; it takes minutes on a CPU", what)
        begin = time.perf_counter()
        try:
            self.tracing = True
            shape.compiled = compile_function(function, tensors)
            self._checked(what, shape, out, tensors)
        except Exception as error:  # whatever a compiler raises: the eager way still stands
            self._unavailable = True
            logger.warning("%s cannot be compiled (%s: %.300s); it goes on as it was", what, type(error).__name__, error)
            return out
        finally:
            self.tracing = False
        logger.info("%s: compiled in %.0f s", what, time.perf_counter() - begin)
        return out

    def _checked(self, what: str, shape: _Shape, expected: tuple[Tensor, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The eager outputs, after the compiled ones were compared with them."""
        if shape.compiled is None:
            return expected
        error = disagreement(shape.compiled(*tensors), expected)
        shape.checks += 1
        if not error <= 1.0:
            shape.refused = True
            logger.warning(
                "%s: the compiled function differs from the plain one %.1f times the tolerance; it is dropped", what, error
            )
        return expected


def compile_function(function: Function, tensors: Sequence[Tensor]) -> Function:
    """The function as machine code for tensors of these shapes, derivatives that it takes inside included."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function)(*tensors)
    for (
        node
    ) in graph.graph.nodes:  # the compiler may lay tensors out otherwise than the eager kernels did, where a view would fail
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    compiled: Function = torch.compile(graph, dynamic=False)  # made at its first call
    return compiled


def disagreement(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of an output, relative to its own largest entry, in units of `TOLERANCE`; inf when not finite.

    An output a million times smaller than the largest one may be the rounding left of a sum that is zero: it counts as that large.
    """
    tolerance = max(TOLERANCE[b.dtype] for b in expected)
    sizes = [float(b.detach().abs().max()) if b.numel() else 0.0 for b in expected]
    least = max(1e-6 * max(sizes), torch.finfo(torch.float32).tiny)
    worst = 0.0
    for a, b, size in zip(found, expected, sizes, strict=True):
        difference = float((a - b).detach().abs().max()) if b.numel() else 0.0
        error = difference / (max(size, least) * tolerance)
        worst = max(worst, error) if error == error else float("inf")
    return worst
