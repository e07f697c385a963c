"""Calibration of predicted standard deviations on the fly: a Gamma posterior of one precision factor, Student-t errors.

Model: error e ~ N(0, σ²/λ) with predicted sd σ and λ ~ Gamma(a, b) (shape, rate).  After n pairs with S = Σ (e/σ)²,
λ | data ~ Gamma(a + n/2, b + S/2), and the error at a new σ* is Student-t with 2a + n degrees of freedom and scale
σ* sqrt((b + S/2) / (a + n/2)).  Rensmeyer, Kramer, Niggemann, DOI 10.1039/d5dd00392j.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from bnn_driver.errors import BnnError

Array = np.ndarray
_ORDINARY = 1e-100
"""Scales above divide any accuracy without overflow."""


@dataclass(frozen=True)
class GammaCalibration:
    """What is known about λ after the pairs seen so far."""

    shape: float
    """a of the prior."""
    rate: float
    """b of the prior."""
    forgetting: float = 1.0
    """ρ in (0, 1]: n ← ρ n + 1, S ← ρ S + (e/σ)² per pair; 1 keeps every pair for ever."""
    n: float = 0.0
    """Pairs seen (after forgetting)."""
    total: float = 0.0
    """S, their sum of (e/σ)² (after forgetting)."""

    def __post_init__(self) -> None:
        if not (self.shape > 0 and self.rate > 0 and 0 < self.forgetting <= 1):
            raise BnnError(
                f"expected shape > 0, rate > 0 and 0 < forgetting <= 1, but got {self.shape}, {self.rate}, {self.forgetting}"
            )

    def observe(self, error: float | Array, sd: float | Array) -> GammaCalibration:
        """Knowledge after further pairs, in the order given.

        Args: error: () or (k,), label minus prediction, made before the label was trained on.   sd: its predictive sd, > 0.
        Returns: a new calibration.    Raises: BnnError for an error that is not finite or an sd that is not positive.
        """
        errors, sds = np.broadcast_arrays(np.asarray(error, float), np.asarray(sd, float))
        if not (np.isfinite(errors).all() and np.isfinite(sds).all() and (sds > 0).all()):
            raise BnnError(f"a calibration pair must be finite with a positive sd, but got error {error} and sd {sd}")
        n, total = self.n, self.total
        for z2 in ((errors / sds) ** 2).ravel():
            n = self.forgetting * n + 1.0
            total = self.forgetting * total + float(z2)
        return replace(self, n=n, total=total)

    @property
    def dof(self) -> float:
        """Degrees of freedom of the Student-t, 2a + n."""
        return 2.0 * self.shape + self.n

    @property
    def inflation(self) -> float:
        """Scale of the Student-t over the predicted sd, sqrt((b + S/2) / (a + n/2))."""
        return float(np.sqrt((self.rate + self.total / 2.0) / (self.shape + self.n / 2.0)))

    def scale(self, sd: float | Array) -> Array:
        """Scale s* of the Student-t.  Args: sd: (...) any unit.  Returns: (...) same unit."""
        return self.inflation * np.asarray(sd, float)

    def calibrated_sd(self, sd: float | Array) -> Array:
        """Standard deviation of the error, s* sqrt(ν/(ν-2)); infinite for ν <= 2.  Args and returns as `scale`."""
        return self.scale(sd) * (np.sqrt(self.dof / (self.dof - 2.0)) if self.dof > 2 else np.inf)

    def probability_exceeds(self, sd: float | Array, accuracy: float | Array) -> Array:
        """P(|e*| >= K) of the Student-t, precise also where it is tiny.

        Args: sd: (...) predictive sd.   accuracy: K, same unit, () or (...).   Returns: (...); 1 where the sd is not finite.
        """
        scale = self.scale(sd)
        if scale.size and _ORDINARY < scale.min() <= scale.max() < np.inf:  # nearly always, and in a fifth of the time
            return 2.0 * special.stdtr(self.dof, -(np.asarray(accuracy, float) / scale))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            t = np.asarray(accuracy, float) / scale
        known = np.isfinite(scale) & (scale >= 0) & ~np.isnan(t)
        return np.where(known, 2.0 * special.stdtr(self.dof, -np.where(known, t, 0.0)), 1.0)

    def quantile(self, sd: float | Array, confidence: float) -> Array:
        """The K with P(|e*| < K) = confidence.  Args: sd: (...).  Returns: (...) same unit."""
        return self.scale(sd) * special.stdtrit(self.dof, 0.5 * (1.0 + confidence))

    def largest_certain_sd(self, accuracy: float, confidence: float) -> float:
        """The predictive sd at which P(|e*| >= K) just reaches 1 - confidence: the threshold in force now (unit of K)."""
        return float(accuracy / self.quantile(1.0, confidence))


def exceedance_hypergeometric(calibration: GammaCalibration, sd: float | Array, accuracy: float | Array) -> Array:
    """P(|e*| >= K) in the published form.

    1 - 2K (b + S/2)^(-1/2) (2π σ*²)^(-1/2) Γ(d)/Γ(d-1/2) 2F1(1/2, d; 3/2; -z), z = K²/(2σ*²(b + S/2)), d = a + n/2 + 1/2.
    The series is summed after the Pfaff transformation 2F1(1/2, d; 3/2; -z) = (1+z)^(-1/2) 2F1(1/2, 3/2-d; 3/2; z/(1+z)),
    whose argument stays below 1.  Being one minus a number near 1, it cannot resolve probabilities below about 1e-13:
    `probability_exceeds` is the one that decides.

    Args: as `probability_exceeds`.   Returns: (...).
    """
    sd, accuracy = np.asarray(sd, float), np.asarray(accuracy, float)
    d = calibration.shape + calibration.n / 2.0 + 0.5
    rate = calibration.rate + calibration.total / 2.0
    z = accuracy**2 / (2.0 * sd**2 * rate)
    series = special.hyp2f1(0.5, 1.5 - d, 1.5, z / (1.0 + z)) / np.sqrt(1.0 + z)
    return 1.0 - 2.0 * np.sqrt(z / np.pi) * special.poch(d - 0.5, 0.5) * series


def clopper_pearson(exceeded: int, trials: int, confidence: float) -> tuple[float, float]:
    """Exact two-sided confidence interval of a probability.

    Args: exceeded: k events.   trials: n.   confidence: such as 0.95.   Returns: (low, high); (0, 1) without trials.
    Raises: BnnError when not 0 <= k <= n.
    """
    if not 0 <= exceeded <= trials:
        raise BnnError(f"expected 0 <= events <= trials, but got {exceeded} of {trials}")
    tail = (1.0 - confidence) / 2.0
    low = float(special.betaincinv(exceeded, trials - exceeded + 1, tail)) if exceeded > 0 else 0.0
    high = float(special.betaincinv(exceeded + 1, trials - exceeded, 1.0 - tail)) if exceeded < trials else 1.0
    return low, high


@dataclass(frozen=True)
class Coverage:
    """How often audited frames, served without asking, turned out worse than promised."""

    audits: int = 0
    exceeded: int = 0

    def observe(self, exceeded: bool) -> Coverage:
        """Coverage after one more audit."""
        return Coverage(self.audits + 1, self.exceeded + bool(exceeded))

    def interval(self, confidence: float) -> tuple[float, float]:
        """Clopper-Pearson interval of the probability that a served frame exceeds the accuracy."""
        return clopper_pearson(self.exceeded, self.audits, confidence)

    def log_evidence(self, promised: float) -> float:
        """Log of the evidence against "a served frame exceeds the accuracy with probability at most `promised`".

        Likelihood ratio of p uniform on (promised, 1) to p = promised: a non-negative supermartingale with mean at most 1 while the
        promise holds (Ville's inequality), so it may be looked at after every audit.
        """
        k, n = self.exceeded, self.audits
        above = special.betaincc(k + 1, n - k + 1, promised)
        if above <= 0:
            return -np.inf
        mixture = np.log(above) + special.betaln(k + 1, n - k + 1) - np.log1p(-promised)
        return float(mixture - k * np.log(promised) - (n - k) * np.log1p(-promised))

    def is_broken(self, promised: float, confidence: float) -> bool:
        """True when the audits exclude the promise; while it holds, this ever happens with probability at most 1 - confidence."""
        return self.log_evidence(promised) >= -np.log1p(-confidence)
