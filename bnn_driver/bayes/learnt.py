"""When the new labels of an update are learnt: when samples of the posterior would meet them no better.

Given labels that come from the model, the true weights and a sample of the posterior have one law.  The squared residuals of K
components at a sample, in units of their noise, therefore add up to a χ² variable with K degrees of freedom, however many weights
there are.  A model that is not quite right, or steps that are still large, leave larger residuals, but then in old labels too: in
the posterior new and old labels are exchangeable.  New labels are learnt when for every chain, and for energies, forces and
stresses apart (one energy would be lost among many forces), averaged over the last tests,

    Σ_new z² <= q_K · max(1, mean_old z²)        z: residual over noise sd,   q_K: quantile of χ² with K degrees of freedom.

Tests begin when the noise has its full amplitude: before, the chains are on their way to the mode, not samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from scipy import special
from torch import Tensor

QUANTILE = 0.99
"""Of the χ² law: about one new label in a hundred is beyond it even for samples of the posterior, and its update is a whole one."""
TESTS = 50
"""In one whole update; each one evaluates the new labels and at most a minibatch of old ones."""
WINDOW = 5
"""Tests over which the sums are averaged: single samples scatter."""


@runtime_checkable
class Residuals(Protocol):
    """A `posterior.Forward` that also knows how well the labels are met."""

    def squared_residuals(self, theta: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sums (M, K) of squared residuals of these labels in units of the noise, by kind, and the components (K,) in each sum."""
        ...


@dataclass
class Watch:
    """Tests the new labels during one update."""

    residuals: Residuals
    newest: Sequence[int]
    """Indices of the new labels; without any there is nothing to be learnt, and the answer is always no."""
    old: Sequence[int]
    """Indices of the labels to compare with; without any only χ² counts."""
    begin: float
    """Steps before the first test."""
    every: int
    """Steps between tests."""
    _recent: deque[tuple[Tensor, Tensor]] = field(default_factory=lambda: deque(maxlen=WINDOW), init=False)

    def learnt(self, steps: int, theta: Tensor) -> bool:
        """Whether all chains have learnt the new labels.  Args: steps: made so far.   theta: (M, D) after them."""
        if not self.newest or steps < self.begin or steps % self.every:
            return False
        sums, components = self.residuals.squared_residuals(theta, self.newest)
        self._recent.append((sums, self._usual(theta, sums)))
        if len(self._recent) < WINDOW:
            return False
        new, usual = (torch.stack(x).mean(0) for x in zip(*self._recent, strict=True))
        return bool((new <= limits(components).to(new) * usual.clamp(min=1.0)).all())  # NaN: no

    def _usual(self, theta: Tensor, like: Tensor) -> Tensor:
        """(M, K) mean squared residual of the old labels; 1 where there are none."""
        if not self.old:
            return torch.ones_like(like)
        sums, components = self.residuals.squared_residuals(theta, self.old)
        return torch.where(components.to(sums.device) > 0, sums / components.clamp(min=1).to(sums), torch.ones_like(sums))


def compared(n_labels: int, newest: Sequence[int], most: int) -> list[int]:
    """At most so many old labels, spread evenly over all of them.  Args: n_labels: N.   newest: indices of the new ones."""
    old = sorted(set(range(n_labels)) - set(newest))
    return old[:: -(-len(old) // most)] if old else []


def limits(components: Tensor) -> Tensor:
    """Quantile of the χ² law; 0 where there are no components.  Args: components: (K,).   Returns: (K,) float64."""
    limit = torch.as_tensor(special.chdtri(components.double().clamp(min=1).numpy(), 1.0 - QUANTILE))
    return torch.where(components > 0, limit, torch.zeros_like(limit))
