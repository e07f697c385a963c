"""Last-layer Laplace (LLPR): closed-form variances of energies and forces from the gradients with respect to the readout weights.

Linear model y = f_0(x) + J(x) w + noise around the foundation weights, w ~ N(0, s²), J the derivatives of energies and forces with
respect to all readout weights; s and the noise maximise the evidence of the labels.  Daxberger et al. 2021 (arXiv:2106.14806);
for potentials Bigi, Chong, Ceriotti, Grasselli 2024, DOI 10.1088/2632-2153/ad805f (there the last hidden layer alone).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from bnn_driver.loops.distance import derivatives
from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.records import Array, Frames

OFFSET_SD = 5.0
"""eV, of the constant between two codes before the first label."""
NOISES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Multiples of the noise that are tried."""
SCALES = tuple(10.0 ** np.arange(-3.0, 4.0, 0.5))
"""Prior sds that are tried."""


def jacobian(potential: StackedPotential, frames: Frames) -> Array:
    """Derivatives of energy and forces with respect to the last layer's weights at θ_0.  Returns: (B, 1 + 3A, D), eV and eV/Å."""
    components = range(3 * len(frames.numbers))
    return np.array([derivatives(potential, frames[i], components)[2].numpy() for i in range(len(frames))])


@dataclass(frozen=True)
class Laplace:
    """Posterior of the readout weights and of the constant between two codes."""

    factor: tuple[Array, bool]
    """Cholesky factor of the precision (D + 1, D + 1)."""
    prior_sd: float
    noise: float
    """Multiple of the noise that the evidence chose."""

    @classmethod
    def fit(cls, slopes: Array, residual: Array, energy_noise: float, force_noise: float) -> Laplace:
        """The prior sd and noise of largest evidence.

        Args: slopes: (N, 1 + 3A, D), energies first.   residual: (N, 1 + 3A) labels minus foundation, eV and eV/Å.
        """
        n, rows, d = slopes.shape
        noise = np.r_[energy_noise, np.full(rows - 1, force_noise)]
        design = np.concatenate([slopes, np.broadcast_to((np.arange(rows) == 0)[None, :, None], (n, rows, 1))], axis=2)
        x, y = (design / noise[:, None]).reshape(n * rows, d + 1), (residual / noise).ravel()
        gram, moment = x.T @ x, x.T @ y
        tried = [cls._with_evidence(gram, moment, y, s, k) for s in SCALES for k in NOISES]
        return max(tried, key=lambda pair: pair[0])[1]

    @classmethod
    def _with_evidence(cls, gram: Array, moment: Array, y: Array, s: float, k: float) -> tuple[float, Laplace]:
        """Log evidence of a prior sd and a multiple of the noise, up to a constant."""
        prior = np.r_[np.full(len(gram) - 1, s**-2.0), OFFSET_SD**-2.0]
        factor = cho_factor(gram / k**2 + np.diag(prior), lower=True)
        fit = moment @ cho_solve(factor, moment) / k**4
        log_determinant = 2 * np.log(np.diag(factor[0])).sum() - np.log(prior).sum()
        evidence = -0.5 * (y @ y / k**2 - fit + log_determinant) - len(y) * np.log(k)
        return float(evidence), cls(factor, s, k)

    def sds(self, slopes: Array) -> tuple[Array, Array]:
        """Posterior sds of energies (B,) eV and forces (B, A, 3) eV/Å.  Args: slopes: (B, 1 + 3A, D)."""
        b, rows, d = slopes.shape
        design = np.concatenate([slopes, np.broadcast_to((np.arange(rows) == 0)[None, :, None], (b, rows, 1))], axis=2)
        flat = design.reshape(-1, d + 1)
        variance = np.einsum("nd,dn->n", flat, cho_solve(self.factor, flat.T)).reshape(b, rows)
        return np.sqrt(variance[:, 0]), np.sqrt(variance[:, 1:].reshape(b, -1, 3))
