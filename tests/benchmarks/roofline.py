"""Counted work of a job, and the share of what the device could do at best.

Operations: matrix products by torch's own counter (2 per multiply-add), everything else one per number written (elementwise) or
read (sums).  Bytes: at most what every operator of the plain code reads and writes; at least the job's weights, inputs and outputs
once.  The roofline is max(operations / peak, least bytes / bandwidth): no program for the same formula can be quicker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry


@dataclass(frozen=True)
class Peak:
    """What a device can do at best."""

    flops: float
    """1/s."""
    bandwidth: float
    """B/s."""
    source: str


_H100 = "NVIDIA H100 datasheet, without sparsity; float64 on tensor cores, float32 without TF32"
#: part of the device's name -> peak in float64 and float32 (TFLOP/s), bandwidth (TB/s), source; the first that fits holds
_GPUS: tuple[tuple[str, float, float, float, str], ...] = (
    ("H200", 67, 67, 4.8, "NVIDIA H200 datasheet (SXM), without sparsity; float64 on tensor cores, float32 without TF32"),
    ("H100 NVL", 60, 60, 3.9, _H100),
    ("H100 PCIe", 51, 51, 2.0, _H100),
    ("H100", 67, 67, 3.35, _H100),
    ("A100-PCIE-40GB", 19.5, 19.5, 1.555, "NVIDIA A100 datasheet; float64 on tensor cores, float32 without TF32"),
    ("A100-SXM4-40GB", 19.5, 19.5, 1.555, "NVIDIA A100 datasheet; float64 on tensor cores, float32 without TF32"),
    ("A100 80GB PCIe", 19.5, 19.5, 1.935, "NVIDIA A100 datasheet; float64 on tensor cores, float32 without TF32"),
    ("A100", 19.5, 19.5, 2.039, "NVIDIA A100 datasheet (80 GB SXM); float64 on tensor cores, float32 without TF32"),
)


def peak(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """Of the device; None for a GPU that the table does not know."""
    if device.type != "cuda":
        return measured_peak(dtype)
    name = torch.cuda.get_device_name(device)
    for part, double, single, bandwidth, source in _GPUS:
        if part in name:
            return Peak(1e12 * (double if dtype == torch.float64 else single), 1e12 * bandwidth, source)
    return None


def measured_peak(dtype: torch.dtype, n: int = 768, megabytes: int = 128) -> Peak:
    """Of this processor and as many threads as torch has: the best of a few products of square matrices, and of a few copies."""
    a = torch.rand(n, n, dtype=dtype)
    x = torch.rand(megabytes * 2**20 // dtype.itemsize, dtype=dtype)
    y = torch.empty_like(x)
    product, copy = _best(lambda: a @ a), _best(lambda: y.copy_(x))
    return Peak(2 * n**3 / product, 2 * x.nbytes / copy, f"measured: product of {n} x {n}, copy of {megabytes} MiB")


def _best(job: Callable[[], object], times: int = 7) -> float:
    job()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        job()
        found.append(time.perf_counter() - begin)
    return float(np.min(found))


@dataclass(frozen=True)
class Work:
    """Of one call."""

    products: float
    """Operations of matrix products."""
    rest: float
    """All other operations."""
    most: float
    """Bytes that the operators read and write."""
    least: float
    """Bytes of weights, inputs and outputs."""

    def seconds(self, peak: Peak) -> float:
        """Least possible time."""
        return max((self.products + self.rest) / peak.flops, self.least / peak.bandwidth)

    def columns(self, ms: float, peak: Peak | None) -> dict[str, Any]:
        """For a table.  Args: ms: measured time of one call."""
        return {
            "gflop": 1e-9 * (self.products + self.rest),
            "gflop_products": 1e-9 * self.products,
            "gb": 1e-9 * self.most,
            "gb_least": 1e-9 * self.least,
            "of_roofline": None if peak is None else 1e3 * self.seconds(peak) / ms,
        }


def counted(job: Callable[[], object], least: float = 0.0) -> Work:
    """Work of one call of the plain code.  Args: least: bytes of its weights, inputs and outputs."""
    with FlopCounterMode(display=False) as products, _Traffic() as traffic:
        job()
    return Work(float(products.get_total_flops()), traffic.operations, traffic.bytes, least)


def nbytes(tensors: Iterable[Tensor]) -> float:
    """Of all tensors, as if each was dense."""
    return float(sum(x.numel() * x.element_size() for x in tensors))


class _Traffic(TorchDispatchMode):
    """Bytes of all operators that run under it, and operations of those that are no matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.is_view or name in _FREE:
            return out
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.bytes += nbytes(inputs) + nbytes(outputs)
        if function.overloadpacket not in flop_registry and name not in _MOVES:
            sizes = [x.numel() for x in outputs] + ([x.numel() for x in inputs] if name in _SUMS else [])
            self.operations += float(max(sizes, default=0))
        return out


_FREE = {
    "detach",
    "alias",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_reshape_alias",
    "lift_fresh",
}
_MOVES = {
    "_to_copy", "arange", "cat", "clone", "copy_", "expand", "fill_", "full", "full_like", "gather", "index", "index_select", "new_full",
    "new_ones", "new_zeros", "ones", "ones_like", "scalar_tensor", "select_backward", "slice_backward", "split_with_sizes_copy", "stack",
    "zero_", "zeros", "zeros_like",
}  # fmt: skip
_SUMS = {"sum", "mean", "amax", "max", "linalg_vector_norm", "index_add", "index_add_", "all", "any", "norm"}
