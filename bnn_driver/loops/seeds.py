"""Every random stream is derived from the one root seed and from what it is for."""

from __future__ import annotations

import hashlib

import numpy as np


def derive(root: int, *purpose: object) -> int:
    """Seed of one stream, a function of the root seed and the purpose alone.

    Args: root: [run] seed.   purpose: words and numbers, such as ("chain", 3, "generation", 17).
    Returns: 63-bit non-negative integer.
    """
    text = "/".join(str(part) for part in (root, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(root: int, *purpose: object) -> np.random.Generator:
    """numpy generator of one stream."""
    return np.random.default_rng(derive(root, *purpose))


def uniform(root: int, *purpose: object) -> float:
    """One number, uniform in [0, 1), of one purpose: the hash itself, much cheaper than a generator for every frame."""
    return derive(root, *purpose) / 2**63
