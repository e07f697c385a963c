"""Functions of fixed shapes, recorded once and replayed: on a GPU one launch instead of hundreds (a CUDA graph).

A recording knows addresses, not tensors: it always reads the same buffers and always writes the same outputs.  `Captured`
keeps both: a call copies what has changed into the buffers, replays, and copies the outputs out.  How a recording is made is an
argument, so that the bookkeeping can be tried where there is no GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]

_WARM_UP = 3
"""Calls before a recording: libraries allocate, and kernels are chosen, in the first ones."""


@dataclass(frozen=True, eq=False)
class Recording:
    """What a function did, ready to be done again."""

    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]
    """Written anew by every replay."""


#: runs a function without arguments and records it; the function reads and writes the same memory at every call
Recorder = Callable[[Callable[[], tuple[Tensor, ...]]], Recording]


class CudaRecorder:
    """Recordings as CUDA graphs, which share one pool of memory: they are replayed one after the other, and `Captured` has copied
    the outputs of one before the next begins."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            # one stream for warming up and recording: cuBLAS keeps a workspace per stream, which may not be allocated in a recording
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()
            # an empty recording keeps the pool alive when no other does: it could not be used again
            self._keeper = torch.cuda.CUDAGraph()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with self._recording_into(self._keeper):
                    pass

    def __call__(self, function: Callable[[], tuple[Tensor, ...]]) -> Recording:
        """Args: function: launches kernels alone: no value is read on the host, nothing comes from the host's memory."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(_WARM_UP):
                    function()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with self._recording_into(graph):
                outputs = function()
        return Recording(graph.replay, outputs)

    def _recording_into(self, graph: torch.cuda.CUDAGraph) -> AbstractContextManager[None]:
        # of this thread alone: the derivatives are taken in another one, which may have to allocate
        return torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")


class Captured:
    """A function of tensors of fixed shapes, replayed."""

    def __init__(self, make: Callable[[Sequence[Tensor]], Function], tensors: Sequence[Tensor], record: Recorder) -> None:
        """Args: make: from the buffers, which are contiguous, to the function of them; the function is kept, and with it whatever
        tensors it closes over, whose addresses are in the recording."""
        self._buffers = [torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x.detach()) for x in tensors]
        self._sources = [_Source.of(x) for x in tensors]
        self._function = make(self._buffers)
        self._packing: _Packing | None = None
        self._recording = record(self._run)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs for these inputs, in memory of their own."""
        if self._packing is None:
            raise RuntimeError("nothing was recorded: the recorder did not run the function it was given")
        self._fill(tensors)
        self._recording.replay()
        return self._packing.unpacked([x.clone() for x in self._recording.outputs])

    def _run(self) -> tuple[Tensor, ...]:
        outputs = self._function(*self._buffers)
        self._packing = _Packing.of(outputs)
        return self._packing.packed(outputs)

    def _fill(self, tensors: Sequence[Tensor]) -> None:
        """Copy into the buffers what is not in them yet, tensors of one type together."""
        changed: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for i, (x, source) in enumerate(zip(tensors, self._sources, strict=True)):
            if source.holds(x):
                continue
            into, out_of = changed.setdefault(x.dtype, ([], []))
            into.append(self._buffers[i])
            out_of.append(x.detach())
            self._sources[i] = _Source.of(x)
        for into, out_of in changed.values():
            torch._foreach_copy_(into, out_of)


@dataclass(frozen=True, eq=False)
class _Source:
    """The tensor that was last copied into a buffer; it is kept, so that no other tensor can come to lie at its address."""

    tensor: Tensor
    address: int
    version: int
    """Counts the changes in place of a tensor and all its views; -1 where nobody counts."""

    @classmethod
    def of(cls, x: Tensor) -> _Source:
        return cls(x, x.data_ptr(), _version(x))

    def holds(self, x: Tensor) -> bool:
        """True when x has the values that were copied."""
        if self.version < 0 or self.version != _version(x):
            return False
        return x is self.tensor or (x.data_ptr() == self.address and x.stride() == self.tensor.stride())


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


@dataclass(frozen=True, eq=False)
class _Packing:
    """Outputs end to end in one tensor per type: one copy takes them all."""

    shapes: tuple[torch.Size, ...]
    groups: tuple[tuple[int, ...], ...]
    """Places of the outputs of each type."""

    @classmethod
    def of(cls, outputs: Sequence[Tensor]) -> _Packing:
        types = dict.fromkeys(x.dtype for x in outputs)
        groups = tuple(tuple(i for i, x in enumerate(outputs) if x.dtype == t) for t in types)
        return cls(tuple(x.shape for x in outputs), groups)

    def packed(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One flat tensor per type."""
        return tuple(torch.cat([outputs[i].detach().reshape(-1) for i in group]) for group in self.groups)

    def unpacked(self, packed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inverse; views."""
        found: dict[int, Tensor] = {}
        for group, flat in zip(self.groups, packed, strict=True):
            shapes = [self.shapes[i] for i in group]
            parts = flat.split([shape.numel() for shape in shapes])
            found |= {i: part.view(shape) for i, part, shape in zip(group, parts, shapes, strict=True)}
        return tuple(found[i] for i in range(len(self.shapes)))
