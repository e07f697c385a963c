"""Radial and angular functions of edges with their derivatives, so that no automatic derivative runs through the geometry.

E(Y, w) is differentiated by the network with respect to Y and w(r) alone; the chain rule to positions is linear in these
gradients, with the constants dY/dr and dw/dr from here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Angular:
    """Spherical harmonics as polynomials of the unit vector."""

    exponents: Tensor
    """(T, 3) int64, exponents of the monomials x^a y^b z^c, all of degree at most lmax."""
    table: Tensor
    """(T, 4 n): columns Y_1..Y_n, dY/dx, dY/dy, dY/dz."""
    lmax: int

    def to(self, device: torch.device, dtype: torch.dtype) -> Angular:
        """The same tables elsewhere."""
        return Angular(self.exponents.to(device), self.table.to(device, dtype), self.lmax)

    def __call__(self, unit: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Y (..., n) and dY/dr (..., n, 3) 1/Å.  Args: unit: (..., 3).   length: (...) Å."""
        powers = [torch.ones_like(unit)]
        for _ in range(self.lmax):
            powers.append(powers[-1] * unit)
        stacked = torch.stack(powers, dim=-1)  # (..., 3, lmax + 1)
        x, y, z = (stacked[..., i, :].index_select(-1, self.exponents[:, i]) for i in range(3))
        values = (x * y * z) @ self.table
        n = (self.lmax + 1) ** 2
        harmonics, slopes = values[..., :n], values[..., n:].reshape(*values.shape[:-1], 3, n).transpose(-1, -2)
        along = (slopes * unit.unsqueeze(-2)).sum(dim=-1, keepdim=True)
        return harmonics, (slopes - along * unit.unsqueeze(-2)) / length[..., None, None]


def angular(lmax: int, harmonics: Callable[[Tensor], Tensor]) -> Angular:
    """Tables that reproduce given harmonics of unit vectors, by linear least squares (exact: they are polynomials).

    Args: harmonics: unit vectors (n, 3) float64 -> (n, (lmax+1)²).
    """
    exponents = np.array([e for e in itertools.product(range(lmax + 1), repeat=3) if sum(e) <= lmax])
    rng = np.random.default_rng(0)
    points = rng.standard_normal((8 * len(exponents), 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    values = harmonics(torch.as_tensor(points)).double().numpy()
    table = np.zeros((len(exponents), values.shape[1]))
    for degree in range(lmax + 1):  # homogeneous: degree l only, else x²+y²+z² = 1 would make the fit ambiguous
        rows = exponents.sum(axis=1) == degree
        columns = slice(degree**2, (degree + 1) ** 2)
        monomials = np.prod(points[:, None, :] ** exponents[None, rows], axis=-1)
        table[rows, columns] = np.linalg.lstsq(monomials, values[:, columns], rcond=None)[0]
    place = {tuple(e): i for i, e in enumerate(exponents)}
    slopes = []
    for axis in range(3):
        slope = np.zeros_like(table)
        for i, e in enumerate(exponents):
            if e[axis] > 0:
                lower = tuple(int(v) - (a == axis) for a, v in enumerate(e))
                slope[place[lower]] += e[axis] * table[i]
        slopes.append(slope)
    full = np.concatenate([table, *slopes], axis=1)
    return Angular(torch.as_tensor(exponents), torch.as_tensor(full), lmax)


@dataclass(frozen=True, eq=False)
class Radial:
    """Bessel functions of a (transformed) distance times a polynomial cutoff, as MACE has them."""

    frequencies: Tensor
    """(n,) 1/Å."""
    prefactor: float
    cutoff: float
    """Å."""
    power: int
    """p of the polynomial cutoff."""
    agnesi: tuple[float, float, float] | None
    """q, p, a of the Agnesi transform (doi 10.1063/5.0158783), or None."""
    radii: Tensor
    """(119,) Å, covalent radii by atomic number."""
    inside: bool
    """True: the cutoff multiplies the basis; False: it multiplies what the network makes of the basis."""

    def __call__(self, r: Tensor, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Basis (..., n), its derivative, envelope (..., 1) and its derivative.

        Args: r: (...) Å.   z: atomic numbers (...) of both ends.
        """
        cut, cut_slope = (x.unsqueeze(-1) for x in envelope(r, self.cutoff, self.power))
        t, t_slope = (r, None) if self.agnesi is None else self._transform(r, z)
        phase = t.unsqueeze(-1) * self.frequencies
        over = self.prefactor / t.unsqueeze(-1)
        basis = torch.sin(phase) * over
        slope = (torch.cos(phase) * self.frequencies * self.prefactor - basis) / t.unsqueeze(-1)
        if t_slope is not None:
            slope = slope * t_slope.unsqueeze(-1)
        if self.inside:
            return basis * cut, slope * cut + basis * cut_slope, torch.ones_like(cut), torch.zeros_like(cut)
        return basis, slope, cut, cut_slope

    def _transform(self, r: Tensor, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Agnesi transform t = 1/(1 + a x^q / (1 + x^(q-p))), x = r/r_0, and dt/dr."""
        q, p, a = self.agnesi or (0.0, 0.0, 0.0)
        scale = 0.5 * (self.radii[z[0]] + self.radii[z[1]])
        x = r / scale
        tail = x ** (q - p)
        g = a * x**q / (1 + tail)
        slope = g / x * (q - (q - p) * tail / (1 + tail))
        t = 1 / (1 + g)
        return t, -t * t * slope / scale


def envelope(r: Tensor, cutoff: Tensor | float, power: int) -> tuple[Tensor, Tensor]:
    """Polynomial cutoff f = 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2), x = r/r_c, and df/dr.

    df/dx = -p(p+1)(p+2)/2 x^(p-1) (1-x)².  Args: r: (...) Å.   Returns: (...) and (...) 1/Å.
    """
    p, x = float(power), r / cutoff
    near = (x < 1).to(r.dtype)
    below = x ** (power - 1)
    value = 1 - below * x * ((p + 1) * (p + 2) / 2 - x * (p * (p + 2) - x * (p * (p + 1) / 2)))
    slope = -0.5 * p * (p + 1) * (p + 2) * below * (1 - x) ** 2
    return value * near, slope * near / cutoff
