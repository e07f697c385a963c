"""Last-layer Laplace: what the labels leave open of the weights that act on a network's features, in closed form.

Around the foundation weights energies and forces are nearly linear in these weights, y = f_0(x) + J(x) w + c + noise, with a constant c
for the energies between two codes (flat prior) and w ~ N(0, s²).  s and the size of the noise are those of largest evidence.  The
variance of an energy is then (φ - φ̄)ᵀ Σ (φ - φ̄) + var(c), φ its derivatives by w: it grows with the distance to the labels, has no
sampling noise, and has its scale from the labels themselves.

Daxberger et al. 2021 (arXiv:2106.14806); for interatomic potentials Bigi, Chong, Ceriotti, Grasselli 2024, DOI 10.1088/2632-2153/ad805f;
evidence: MacKay 1992, DOI 10.1162/neco.1992.4.3.415.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnn_driver.errors import BnnError

NOISES = tuple(10.0 ** (k / 2) for k in range(5))
"""Sizes of the noise that are tried, in units of the likelihood's; never below it, or one label that is met exactly would be believed."""
PRIOR_SDS = tuple(10.0 ** (k / 2) for k in range(-8, 9))
"""s that are tried."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over observations: all that the posterior of the linear model depends on; residuals in units of the noise."""

    gram: Tensor
    """(D, D) Σ J Jᵀ, float64."""
    moment: Tensor
    """(D,) Σ J r."""
    squares: float
    """Σ r²."""
    count: float
    """Number of observations (their weights)."""
    energy_slopes: Tensor
    """(D,) Σ over energies of J."""
    energy_residual: float
    """Σ over energies of r."""
    energy_precision: float
    """Σ over energies of 1/σ_E²."""

    @classmethod
    def none(cls, size: int) -> Sums:
        """Before the first label.  Args: size: D."""
        zero = torch.zeros(size, dtype=torch.float64)
        return cls(torch.zeros(size, size, dtype=torch.float64), zero, 0.0, 0.0, zero, 0.0, 0.0)

    def with_label(
        self,
        energy: Tensor,
        energy_residual: float,
        energy_sd: float,
        forces: Tensor,
        force_residual: Tensor,
        force_sd: float,
        weight: float,
    ) -> Sums:
        """The sums with one more label.

        Args:
            energy: (D,) derivatives of its energy.   energy_residual: label minus foundation, any constant added.   energy_sd: σ_E.
            forces: (R, D) derivatives of force components.   force_residual: (R,).   force_sd: σ_F.
            weight: of each of these components, 3A/R.
        """
        e, f = energy.double() / energy_sd, forces.double() / force_sd
        r, rf = energy_residual / energy_sd, force_residual.double() / force_sd
        return Sums(
            self.gram + torch.outer(e, e) + weight * f.T @ f,
            self.moment + r * e + weight * f.T @ rf,
            self.squares + r * r + weight * float(rf @ rf),
            self.count + 1 + weight * len(rf),
            self.energy_slopes + e / energy_sd,
            self.energy_residual + r / energy_sd,
            self.energy_precision + energy_sd**-2,
        )

    def posterior(self) -> LastLayer:
        """The posterior at the prior sd and noise of largest evidence.  Raises: BnnError without labels."""
        if self.energy_precision == 0:
            raise BnnError("a last-layer posterior needs at least one label")
        centre = self.energy_slopes / self.energy_precision
        gram = self.gram - self.energy_precision * torch.outer(centre, centre)
        moment = self.moment - self.energy_residual * centre
        squares = self.squares - self.energy_residual**2 / self.energy_precision
        values, vectors = torch.linalg.eigh(gram)
        values, along = values.clamp_min(0.0), vectors.T @ moment
        tried = [(_evidence(values, along, squares, self.count - 1, s, k), s, k) for s in PRIOR_SDS for k in NOISES]
        _, s, k = max(tried)
        root = (values / k**2 + s**-2.0).rsqrt()[:, None] * vectors.T
        return LastLayer(root, centre, k * self.energy_precision**-0.5, s, k)


def _evidence(values: Tensor, along: Tensor, squares: float, count: float, s: float, k: float) -> float:
    """Log evidence up to a constant.  Args: values, along: (D,) eigenvalues of the gram, the moment along its eigenvectors."""
    precision = values / k**2 + s**-2.0
    fit = float((along.square() / precision).sum()) / k**4
    log_determinant = float(precision.log().sum()) + 2 * len(values) * math.log(s)
    return -0.5 * (squares / k**2 - fit + log_determinant) - count * math.log(k)


@dataclass(frozen=True, eq=False)
class LastLayer:
    """Posterior of the last weights and of the constant between two codes."""

    root: Tensor
    """(D, D) Rᵀ R = Σ."""
    centre: Tensor
    """(D,) φ̄, mean derivatives of the labelled energies."""
    constant_sd: float
    """eV, of the constant."""
    prior_sd: float
    """s."""
    noise: float
    """Size of the noise in units of the likelihood's."""

    def energy_sd(self, slopes: Tensor) -> Tensor:
        """sd of energies.  Args: slopes: (B, D) eV per unit of the weights.   Returns: (B,) eV, float64."""
        return energy_sd(slopes, self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """What `energy_sd` needs, by name."""
        return {"root": self.root, "centre": self.centre, "constant_sd": torch.tensor([self.constant_sd], dtype=torch.float64)}


def energy_sd(slopes: Tensor, posterior: Mapping[str, Tensor]) -> Tensor:
    """sqrt(|R (φ - φ̄)|² + var(c)).

    Args: slopes: (B, D).   posterior: root (D, D), centre (D,), constant_sd (1,).   Returns: (B,) float64.
    """
    along = (slopes.double() - posterior["centre"].double()) @ posterior["root"].double().T
    return (along.square().sum(dim=-1) + posterior["constant_sd"].double() ** 2).sqrt()
