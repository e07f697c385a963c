"""From the gradient of the energy with respect to edge vectors to forces and virials."""

from __future__ import annotations

import torch
from torch import Tensor


def edge_forces(gradient: Tensor, source: Tensor) -> Tensor:
    """F_a = -Σ_k G[a, k] + Σ_{source = a} G.

    Args: gradient: (M, B, A, K, 3) eV/Å, zero in unused slots.   source: (B, A, K) or (M, B, A, K) int64.
    Returns: (M, B, A, 3) eV/Å.
    """
    m, b, a = gradient.shape[:3]
    if source.dim() == 3:
        first = torch.arange(b, device=source.device).view(b, 1, 1) * a
        flat = gradient.reshape(m, -1, 3)
        on_source = gradient.new_zeros(m, b * a, 3).index_add(1, (source + first).reshape(-1), flat)
    else:
        first = torch.arange(m * b, device=source.device).view(m, b, 1, 1) * a
        flat = gradient.reshape(-1, 3)
        on_source = gradient.new_zeros(m * b * a, 3).index_add(0, (source + first).reshape(-1), flat)
    return on_source.view(m, b, a, 3) - gradient.sum(dim=-2)


def edge_virial(gradient: Tensor, vectors: Tensor) -> Tensor:
    """W = -Σ G⊗r, i-PI's sign.

    Args: gradient: (M, B, A, K, 3) eV/Å.   vectors: (B, A, K, 3) or (M, B, A, K, 3) Å.   Returns: (M, B, 3, 3) eV.
    """
    m, b = gradient.shape[:2]
    g = gradient.reshape(m, b, -1, 3)
    r = vectors.reshape(*vectors.shape[:-3], -1, 3)
    return -torch.matmul(g.transpose(-1, -2), r)
