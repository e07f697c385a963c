"""Small random MACE models and frames for the tests of this room."""

from __future__ import annotations

from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from e3nn import o3
from mace import modules

from bnn_driver.potential.params import repeat_weights
from bnn_driver.records import Frames

VARIANTS: dict[str, dict[str, Any]] = {
    "residual": {},
    "first layer without skip": {"first": "RealAgnosticInteractionBlock", "hidden": "8x0e"},
    "few channels": {"hidden": "4x0e+4x1o"},
    "lmax 2, correlation 3": {"hidden": "8x0e+8x1o+8x2e", "max_ell": 3, "correlation": 3},
    "one layer": {"num_interactions": 1},
    "three layers": {"num_interactions": 3},
    "density": {"first": "RealAgnosticDensityInteractionBlock", "other": "RealAgnosticDensityResidualInteractionBlock"},
    "agnesi and repulsion": {"distance_transform": "Agnesi", "pair_repulsion": True},
    "no scale and shift": {"scaled": False},
    "second of two heads": {"heads": ["a", "b"]},
    "cutoff outside": {"apply_cutoff": False, "num_polynomial_cutoff": 6},
}


def random_mace(
    first: str = "RealAgnosticResidualInteractionBlock",
    other: str = "RealAgnosticResidualInteractionBlock",
    hidden: str = "8x0e+8x1o",
    elements: tuple[int, ...] = (1, 6, 8),
    scaled: bool = True,
    heads: list[str] | None = None,
    **more: Any,
) -> torch.nn.Module:
    """A (ScaleShift)MACE with random float64 weights."""
    n = len(heads or [""])
    settings: dict[str, Any] = {
        "r_max": 4.0, "num_bessel": 6, "num_polynomial_cutoff": 5, "max_ell": 2, "num_interactions": 2, "correlation": 2,
        "interaction_cls": modules.interaction_classes[other], "interaction_cls_first": modules.interaction_classes[first],
        "num_elements": len(elements), "hidden_irreps": o3.Irreps(hidden), "MLP_irreps": o3.Irreps("6x0e"),
        "atomic_energies": np.linspace(-500.0, -10.0, n * len(elements)).reshape(n, -1)[slice(None) if heads else 0],
        "avg_num_neighbors": 7.0, "atomic_numbers": list(elements), "gate": torch.nn.functional.silu, "radial_MLP": [12, 12],
        "heads": heads,
    }  # fmt: skip
    settings.update(more)
    if scaled:
        settings["atomic_inter_scale"] = 0.8 if n == 1 else [0.8 + 0.1 * i for i in range(n)]
        settings["atomic_inter_shift"] = 0.1 if n == 1 else [0.1 * i for i in range(n)]
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        return (modules.ScaleShiftMACE if scaled else modules.MACE)(**settings)
    finally:
        torch.set_default_dtype(before)


def molecules(frames: int = 3, seed: int = 0) -> Frames:
    """Distorted formaldehyde-like frames, elements out of order on purpose."""
    x = np.array([[0.0, 0.0, 0.7], [0.95, 0.0, -1.1], [0.0, 0.0, -0.5], [-0.95, 0.1, -1.1], [1.9, 1.2, 0.9]])
    noise = 0.1 * np.random.default_rng(seed).standard_normal((frames, 5, 3))
    return Frames(np.array([8, 1, 6, 1, 1]), x + noise)


def crystals(frames: int = 2, seed: int = 1) -> Frames:
    """Triclinic cells shorter than one cutoff, so that an atom sees several of its own images."""
    rng = np.random.default_rng(seed)
    cell = np.array([[2.9, 0.0, 0.0], [0.7, 3.1, 0.0], [-0.4, 0.6, 3.4]]) + 0.05 * rng.standard_normal((frames, 3, 3))
    fractional = np.array([[0.05, 0.0, 0.1], [0.5, 0.45, 0.5], [0.1, 0.6, 0.55]])
    positions = fractional @ cell + 0.05 * rng.standard_normal((frames, 3, 3))
    return Frames(np.array([8, 6, 1]), positions, cell)


def members(weights: dict[str, torch.Tensor], count: int, seed: int = 0, spread: float = 0.05) -> dict[str, torch.Tensor]:
    """`count` different members around θ_0."""
    generator = torch.Generator().manual_seed(seed)
    stacked = repeat_weights(weights, count)
    return {k: x + spread * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for k, x in stacked.items()}
