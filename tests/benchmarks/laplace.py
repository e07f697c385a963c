"""Last-layer Laplace for forces too: the product's closed-form posterior, every force component learnt and its sd wanted.

The product adds the sd of energies alone to the spread of its chains, see `bnn_driver/bayes/laplace.py`; 3A derivatives a frame make
that of the forces dear.
"""

from __future__ import annotations

import numpy as np
import torch

from bnn_driver.bayes.laplace import LastLayer, Sums
from bnn_driver.loops.distance import derivatives
from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.records import Array, Frames


def jacobian(potential: StackedPotential, frames: Frames) -> Array:
    """Derivatives of energy and forces with respect to the last layer's weights at θ_0.  Returns: (B, 1 + 3A, D), eV and eV/Å."""
    components = range(3 * len(frames.numbers))
    return np.array([derivatives(potential, frames[i], components)[2].numpy() for i in range(len(frames))])


def fit(slopes: Array, residual: Array, energy_noise: float, force_noise: float) -> LastLayer:
    """The posterior of largest evidence.

    Args: slopes: (N, 1 + 3A, D), energies first.   residual: (N, 1 + 3A) labels minus foundation, eV and eV/Å.
    """
    sums = Sums.none(slopes.shape[2])
    for j, r in zip(torch.as_tensor(slopes), torch.as_tensor(residual), strict=True):
        sums = sums.with_label(j[0], float(r[0]), energy_noise, j[1:], r[1:], force_noise, 1.0)
    return sums.posterior()


def sds(posterior: LastLayer, slopes: Array) -> tuple[Array, Array]:
    """Posterior sds of energies (B,) eV and forces (B, A, 3) eV/Å.  Args: slopes: (B, 1 + 3A, D)."""
    j = torch.as_tensor(slopes).double()
    force = (j[:, 1:] @ posterior.root.double().T).norm(dim=-1)
    return posterior.energy_sd(j[:, 0]).numpy(), force.numpy().reshape(len(j), -1, 3)
