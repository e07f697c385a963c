"""Minibatch estimate of U/N, the potential energy of the weights per label: where N, the minibatch and the prior meet.

U(θ) = -Σ_i log p(y_i | x_i, θ) - log p(θ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bnn_driver.bayes.prior import GaussianPrior

#: (theta (M, D), index (M, b), weight (M, b)) -> (M,) Σ_b weight · (-log-likelihood of label index_b); member m reads only row m.
#: theta lies on its device, index and weight on the host.
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class OwnGradient(Protocol):
    """A `Forward` that also knows its gradient."""

    def gradient(self, theta: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (M, D) of the sum over the chains, and the loss (M,) of each."""
        ...


@dataclass(frozen=True, eq=False)
class MinibatchPosterior:
    """Gradient of U/N on minibatches, for M independent chains at once."""

    forward: Forward
    prior: GaussianPrior
    n_labels: int
    """N."""

    def gradient(self, theta: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate of ∇U/N, unbiased when the weights come from `minibatch`.

        The chains are summed before the one backward pass; since member m reads only its own row, the gradients stay apart.

        Args: theta: (M, D), not changed.   index, weight: (M, b), the chains' minibatches.
        Returns: gradient (M, D) and loss (M,), the weighted negative log-likelihood without the prior.
        """
        if isinstance(self.forward, OwnGradient):
            gradient, loss = self.forward.gradient(theta, index, weight)
        else:
            leaf = theta.detach().requires_grad_(True)
            loss = self.forward(leaf, index, weight)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return gradient - self.prior.gradient(theta) / self.n_labels, loss.detach()
