"""MACE's own code with the operators of cuEquivariance, one member after the other.

The weights stay those of the plain module, whose names the sampler and the stored generations know.  They are mapped to the
converted module's in each evaluation: other shapes, and one linear map per symmetric contraction.  On a CPU the operators are plain
torch and gain nothing; the point is their CUDA kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn_driver.potential.mace import converted_to_cueq, cueq_projection
from bnn_driver.potential.modules import ModulesPotential


@dataclass(frozen=True, eq=False)
class _Contraction:
    """Where the weights of one symmetric contraction come from."""

    name: str
    sources: tuple[str, ...]
    projection: Tensor
    """(k, k')."""


class CueqPotential(ModulesPotential):
    """See `Potential` for the contract."""

    def __init__(self, module: Any, elements: tuple[int, ...], head: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises: ModelError when the package is missing; whatever it raises for models that it does not cover."""
        super().__init__(module, elements, head, dtype, device, "with cuEquivariance")
        self.network = converted_to_cueq(module, device).to(dtype)
        self._shapes = {name: p.shape for name, p in self.network.named_parameters()}
        self._contractions = [_read(module, i, dtype, device) for i in range(len(module.products))]

    def _parameters(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        full = super()._parameters(weights)
        out = {name: x.reshape(self._shapes[name]) for name, x in full.items() if name in self._shapes}
        for part in self._contractions:
            together = torch.cat([full[name] for name in part.sources], dim=1)  # (elements, k, C)
            out[part.name] = torch.einsum("zku,kj->zju", together, part.projection).reshape(self._shapes[part.name])
        return out


def _read(module: Any, number: int, dtype: torch.dtype, device: torch.device) -> _Contraction:
    prefix = f"products.{number}.symmetric_contractions"
    contraction = module.products[number].symmetric_contractions
    correlation = int(contraction.contractions[0].correlation)
    entries = ["weights_max", *(f"weights.{nu}" for nu in range(correlation - 1))]
    sources = tuple(f"{prefix}.contractions.{i}.{entry}" for i in range(len(contraction.contractions)) for entry in entries)
    projection = cueq_projection(contraction, correlation).to(device, dtype)
    return _Contraction(f"{prefix}.weight", sources, projection)
