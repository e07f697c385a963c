"""The screened nuclear repulsion that some MACE models add (Ziegler, Biersack, Littmark)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn_driver.potential.geometry import envelope

_EXPONENTS = 3.2, 0.9423, 0.4028, 0.2016
_COULOMB = 14.3996
"""eV Å, e²/(4πε_0) as MACE has it."""
_BOHR = 0.529
"""Å, as MACE has it."""


@dataclass(frozen=True, eq=False)
class Repulsion:
    """Its constants, read from the module once."""

    radii: Tensor
    """(119,) Å, covalent radii by atomic number."""
    prefactor: float
    exponent: float
    coefficients: tuple[float, ...]
    power: int
    """p of the polynomial cutoff."""

    def __call__(self, r: Tensor, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Energy of each pair (...) eV and its derivative (...) eV/Å.  Args: r: (...) Å.   z: atomic numbers (...) of both ends."""
        za, zb = (x.to(r.dtype) for x in z)
        a = self.prefactor * _BOHR / (za**self.exponent + zb**self.exponent)
        terms = [(c, -b) for c, b in zip(self.coefficients, _EXPONENTS, strict=True)]
        phi = sum(c * torch.exp(b * r / a) for c, b in terms)
        dphi = sum(c * b / a * torch.exp(b * r / a) for c, b in terms)
        cut, dcut = envelope(r, self.radii[z[0]] + self.radii[z[1]], self.power)
        front = _COULOMB * za * zb / r
        return front * phi * cut, front * (dphi * cut + phi * dcut - phi * cut / r)


def read_repulsion(module: Any, dtype: torch.dtype, device: torch.device) -> Repulsion | None:
    """Of a MACE module that has one."""
    zbl = getattr(module, "pair_repulsion_fn", None)
    if zbl is None:
        return None
    coefficients = tuple(float(c) for c in zbl.c)
    radii = zbl.covalent_radii.detach().to(device, dtype)
    return Repulsion(radii, float(zbl.a_prefactor), float(zbl.a_exp), coefficients, int(zbl.p))
