"""Operators that would wait for a GPU, found where there is none."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: operators that read a value on the host, and those that make a tensor of Python numbers (copied to a GPU from ordinary memory)
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount", "equal",
    "is_nonzero", "lift_fresh", "lift_fresh_copy",
}  # fmt: skip


class NoWait(TorchDispatchMode):
    """Raises where an operator would wait for a GPU, boolean indices among them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in WAITS or (name.startswith("index") and _boolean(args)):
            raise AssertionError(f"{name} would wait for a GPU")
        return function(*args, **(kwargs or {}))


def _boolean(args: Any) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices)
