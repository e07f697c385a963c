"""Functions of tensors, made faster when that pays, and only while they agree with what they replace.

Two ways, which can be combined: machine code (a compiler for tensor programs), and on a GPU replaying a recording (`capturing.py`).
A compiler can be wrong without a word (torch 2.13 on CPUs made wrong code of two graphs of this kind), and so can a recording, so
every fast function is compared with the plain one, output by output, on the tensors it was made from and on the next ones.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bnn_driver.potential.capturing import Captured, CudaRecorder, Function, Recorder

logger = logging.getLogger(__name__)

Mode = Literal["off", "auto", "on"]

#: seconds that one shape may cost before it is compiled: about what compiling costs on a CPU, so that at most about twice the least
#: possible time is spent
PATIENCE = 120.0
#: calls of one shape before it is recorded, which costs about five
REPEATS = 3
#: recordings that are kept; each holds the memory of its inputs and outputs
MOST_RECORDINGS = 16
#: largest difference of an output, relative to its largest entry
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}
_CHECKS = 2


@dataclass(frozen=True)
class _Way:
    """A way to run a function, and from when on it is taken."""

    name: str
    compiled: bool
    recorded: bool
    calls: int
    seconds: float


@dataclass
class _Shape:
    """What is known of one function at one shape."""

    calls: int = 0
    spent: float = 0.0
    """s."""
    seconds: float = 0.0
    """Of one call of the fast function."""
    refused: set[str] = field(default_factory=set)
    way: _Way | None = None
    fast: Function | None = None
    code: Function | None = None
    """Machine code for the buffers of a recording, kept when the recording is not."""
    checks: int = 0


class Compiler:
    """Runs functions as they are, and faster where that pays ("auto"), at once ("on"), or never ("off")."""

    def __init__(self, mode: Mode, patience: float = PATIENCE, recorder: Recorder | None = None) -> None:
        """Args: patience: s, see `PATIENCE`.   recorder: CUDA graphs for tensors on a GPU, none elsewhere, when not given."""
        self.mode = mode
        self.patience = patience
        self.tracing = False
        """True while a function is read for compiling: what compiles best is not what runs best."""
        self._recorder = recorder
        self._shapes: dict[Hashable, _Shape] = {}
        self._recorded: OrderedDict[int, _Shape] = OrderedDict()
        self._unavailable: set[str] = set()
        self._ways: tuple[_Way, ...] = ()

    def __call__(self, what: str, key: Hashable, function: Function, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of `function(*tensors)`.

        Args: what: name for messages.   key: everything that the outputs depend on but the tensors.
            function: of tensors alone, without random numbers and without reading a tensor's values on the host.
        """
        if not self.active:
            return function(*tensors)
        self._ways = self._ways or self._possible(tensors[0].device)
        shape = self._shapes.setdefault((what, key, *_layout(tensors)), _Shape())
        shape.calls += 1
        if shape.fast is None or self._due(shape) != shape.way:
            return self._advance(what, shape, function, tensors)
        if shape.checks < _CHECKS:
            return self._checked(what, shape, function(*tensors), tensors)
        if id(shape) in self._recorded:
            self._recorded.move_to_end(id(shape))
        shape.spent += shape.seconds
        return shape.fast(*tensors)

    @property
    def active(self) -> bool:
        """False when nothing is ever compiled, so that shapes need not be few."""
        return self.mode != "off"

    @property
    def compiled(self) -> int:
        """Number of shapes that do not run as they are."""
        return sum(shape.fast is not None for shape in self._shapes.values())

    def _possible(self, device: torch.device) -> tuple[_Way, ...]:
        """Ways of this mode on this device, the best first."""
        calls, seconds = (1, 0.0) if self.mode == "on" else (REPEATS, self.patience)
        compiled = _Way("compiled", True, False, 1, seconds)
        if self._recorder is None and device.type != "cuda":
            return (compiled,)
        return _Way("compiled and recorded", True, True, calls, seconds), _Way("recorded", False, True, calls, 0.0), compiled

    def _due(self, shape: _Shape) -> _Way | None:
        """The best way for a shape by now; None: as it is."""
        for way in self._ways:
            barred = way.name in self._unavailable or way.name in shape.refused
            if not barred and shape.calls >= way.calls and shape.spent >= way.seconds:
                return way
        return None

    def _advance(self, what: str, shape: _Shape, function: Function, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The plain outputs; then a faster way is made where one is due."""
        begin = time.perf_counter()
        out = function(*tensors)
        _wait(tensors[0].device)
        shape.spent += time.perf_counter() - begin
        way = self._due(shape)
        if way is None:
            return out
        begin = time.perf_counter()
        if way.compiled:
            logger.info("%s: compiling for these shapes, once; it takes minutes on a CPU", what)
        try:
            shape.way, shape.checks = way, 0
            shape.fast = self._made(shape, way, function, tensors)
            self._keep(shape, way)
            self._checked(what, shape, out, tensors)
        except Exception as error:  # whatever a compiler or a driver raises: the plain way still stands
            self._unavailable.add(way.name)
            self._drop(shape)
            why = f"{type(error).__name__}: {error!s:.300}"
            logger.warning("%s cannot be %s (%s); it goes on as it was", what, way.name, why)
            return out
        logger.info("%s: %s in %.1f s", what, way.name, time.perf_counter() - begin)
        return out

    def _made(self, shape: _Shape, way: _Way, function: Function, tensors: Sequence[Tensor]) -> Function:
        def make(buffers: Sequence[Tensor]) -> Function:
            if not way.compiled:
                return function
            shape.code = shape.code or self._machine_code(function, buffers)
            return shape.code

        if not way.recorded:
            return self._machine_code(function, tensors)
        if self._recorder is None:
            self._recorder = CudaRecorder(tensors[0].device)
        return Captured(make, tensors, self._recorder)

    def _machine_code(self, function: Function, tensors: Sequence[Tensor]) -> Function:
        self.tracing = True
        try:
            return compile_function(function, tensors)
        finally:
            self.tracing = False

    def _keep(self, shape: _Shape, way: _Way) -> None:
        """Recordings are few: the one that was not used for the longest time makes room; its shape begins anew."""
        if not way.recorded:
            return
        self._recorded[id(shape)] = shape
        self._recorded.move_to_end(id(shape))
        if len(self._recorded) > MOST_RECORDINGS:
            oldest = next(iter(self._recorded.values()))
            self._drop(oldest)
            oldest.calls = 0

    def _drop(self, shape: _Shape) -> None:
        shape.way = shape.fast = None
        self._recorded.pop(id(shape), None)

    def _checked(self, what: str, shape: _Shape, expected: tuple[Tensor, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The plain outputs, after the fast ones were compared with them."""
        if shape.fast is None or shape.way is None:
            return expected
        begin = time.perf_counter()
        found = shape.fast(*tensors)
        _wait(tensors[0].device)
        shape.seconds = time.perf_counter() - begin
        error = disagreement(found, expected)
        shape.checks += 1
        if not error <= 1.0:
            message = "%s: the %s function differs from the plain one %.1f times the tolerance; it is dropped"
            logger.warning(message, what, shape.way.name, error)
            shape.refused.add(shape.way.name)
            self._drop(shape)
        return expected


def compile_function(function: Function, tensors: Sequence[Tensor]) -> Function:
    """The function as machine code for tensors of these shapes and strides, derivatives that it takes inside included.

    The graph goes to the compiler itself: `torch.compile` would look it up among guards at every call (0.2 to 0.4 ms).
    """
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function)(*tensors)
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.view.default:  # a view would fail where the compiler lays tensors out otherwise
            node.target = torch.ops.aten.reshape.default
        node.meta.clear()  # its fake tensors are not those of the compiler
    graph.recompile()
    # on a GPU the wrapper's time is gone once it is recorded
    options: list[dict[str, Any]] = [{"cpp_wrapper": True}, {}] if tensors[0].device.type == "cpu" else [{}]
    inputs: list[Any] = [x.detach() for x in tensors]
    for choice in options:
        try:
            with torch.no_grad():
                found: Function = torch._inductor.compile(copy.deepcopy(graph), inputs, options=choice)
                found(*inputs)
            return torch.no_grad()(found)
        except Exception as error:  # what a compiler raises differs between versions
            logger.debug("not compiled with %s: %s", choice, error)
    fallback: Function = torch.compile(graph, dynamic=False)  # made at its first call
    return fallback


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


def _layout(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """Shapes, strides and types; column by column, which is several times faster than tensor by tensor."""
    return tuple([x.shape for x in tensors]), tuple([x.stride() for x in tensors]), tuple([x.dtype for x in tensors])


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
