"""Other calibrations than the product's, behind the same protocol, for replays through the real policy.

All see the pairs (error, sd) that the policy hands on: of asked frames, and of audits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from scipy import special

from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.records import Array


@dataclass(frozen=True)
class ByRegime:
    """A factor for each range of sd, each with the common factor as its prior: λ_r ~ Gamma(strength, strength · mean of 1/λ)."""

    common: GammaCalibration
    unit: float
    """sd that separates the ranges: below a quarter of it, below it, above."""
    strength: float = 3.0
    pairs: tuple[tuple[float, float], ...] = ()

    @property
    def inflation(self) -> float:
        """Of the common factor."""
        return self.common.inflation

    def _regime(self, sd: Array) -> Array:
        return np.digitize(np.asarray(sd, float), (0.25 * self.unit, self.unit))

    def observe(self, error: float, sd: float) -> ByRegime:
        """One more pair for its range and for the common factor."""
        return replace(self, common=self.common.observe(error, sd), pairs=(*self.pairs, (float(error), float(sd))))

    def probability_exceeds(self, sd: Array, accuracy: float) -> Array:
        """P(|e| >= K) of the Student-t of the range."""
        sd = np.asarray(sd, float)
        found = np.empty(sd.shape)
        for r in range(3):
            own = GammaCalibration(self.strength, self.strength * self.common.inflation**2)
            for error, s in self.pairs:
                if self._regime(s) == r:
                    own = own.observe(error, s)
            here = self._regime(sd) == r
            found[here] = own.probability_exceeds(sd[here], accuracy)
        return found


@dataclass(frozen=True)
class PowerLaw:
    """Regression of the error on the sd: e ~ N(0, u² (sd/u)^(2β) / λ), β on a grid, averaged with its posterior.

    β = 1 is the product's law, β = 0 one error for all frames: where the sd does not order the errors, β falls.
    """

    unit: float
    powers: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    each: tuple[GammaCalibration, ...] = ()
    log_weights: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 1.0)

    @classmethod
    def around(cls, prior: GammaCalibration, unit: float) -> PowerLaw:
        """The same prior for every power.  Args: unit: typical sd."""
        return cls(unit, each=tuple(prior for _ in cls.powers))

    @property
    def inflation(self) -> float:
        """Of the power 1."""
        return self.each[-1].inflation

    def _sd(self, sd: Array, power: float) -> Array:
        return self.unit * (np.asarray(sd, float) / self.unit) ** power

    def observe(self, error: float, sd: float) -> PowerLaw:
        """Every power by its own Student-t."""
        gains = []
        for c, power in zip(self.each, self.powers, strict=True):
            scale, nu = float(c.scale(self._sd(sd, power))), c.dof
            gains.append(-np.log(scale) - 0.5 * (nu + 1) * np.log1p((error / scale) ** 2 / nu))
        each = tuple(c.observe(error, float(self._sd(sd, b))) for c, b in zip(self.each, self.powers, strict=True))
        return replace(self, each=each, log_weights=tuple(np.add(self.log_weights, gains).tolist()))

    def probability_exceeds(self, sd: Array, accuracy: float) -> Array:
        """Mean over the powers."""
        weights = special.softmax(np.array(self.log_weights))
        parts = [c.probability_exceeds(self._sd(sd, b), accuracy) for c, b in zip(self.each, self.powers, strict=True)]
        return np.einsum("k,k...->...", weights, np.array(parts))


@dataclass(frozen=True)
class Conformal:
    """Bound from the order statistics of |e|/sd over the pairs (split conformal, Vovk et al. 2005); the Gamma's until there are enough.

    The largest nominal exceedance α at which the ⌈(n+1)(1-α)⌉-th smallest ratio times the sd stays below the accuracy.
    """

    before: GammaCalibration
    ratios: tuple[float, ...] = ()
    enough: int = 19
    inflation: float = field(default=float("nan"))

    def observe(self, error: float, sd: float) -> Conformal:
        """One more ratio."""
        return replace(self, before=self.before.observe(error, sd), ratios=tuple(sorted((*self.ratios, abs(error) / sd))))

    def probability_exceeds(self, sd: Array, accuracy: float) -> Array:
        """1 - (number of ratios below accuracy/sd) / (n + 1)."""
        if len(self.ratios) < self.enough:
            return self.before.probability_exceeds(sd, accuracy)
        below = np.searchsorted(np.array(self.ratios), accuracy / np.asarray(sd, float))
        return 1.0 - below / (len(self.ratios) + 1.0)
