"""From the host to the device without waiting for it, and back in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnn_driver.records import Array


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on another device, in another precision when one is given.

    From ordinary memory a copy to a GPU would wait for all that the GPU still has to do; from pinned memory it is queued behind it.
    """
    x = x.to(dtype or x.dtype)
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Array]:
    """Float64 arrays of tensors of one device: one transfer, and on a GPU one wait, for all of them."""
    if not tensors:
        return []
    flat = torch.cat([x.detach().reshape(-1).to(torch.float64) for x in tensors]).cpu().numpy()
    found, first = [], 0
    for x in tensors:
        found.append(flat[first : first + x.numel()].reshape(x.shape))
        first += x.numel()
    return found
