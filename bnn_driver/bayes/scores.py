"""How well predicted standard deviations tell errors: their scale, their order, and proper scores of both together.

Of n cases with errors e (signed or absolute: every score is even in e) and predicted sds σ > 0 of the same unit.  The law of an
error is Gaussian with sd σ, or Student-t with scale σ, as `calibration` predicts it, where degrees of freedom are given.
Negative log-likelihood and CRPS are proper: on average the true law scores lowest.  The order of |e| can follow σ only as far as
chance lets it, even where all σ are exact, and that far differs between test sets: compare an AUROC with the attainable one.

CRPS of a Gaussian: Gneiting, Raftery 2007, DOI 10.1198/016214506000001437; of a Student-t: Jordan, Krüger, Lerch 2019,
DOI 10.18637/jss.v090.i12.  AUROC: Hanley, McNeil 1982, DOI 10.1148/radiology.143.1.7063747.  Errors over sds in bins:
Levi, Gispan, Giladi, Fetaya 2022, DOI 10.3390/s22155540.  Reference values from errors that follow the predicted sds:
Rasmussen, Duan, Kulik, Jensen 2023, DOI 10.1186/s13321-023-00790-0 (simulated there, in closed form here).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from bnn_driver.errors import BnnError

Array = np.ndarray


@dataclass(frozen=True)
class Scores:
    """What the sds of one set of cases are worth."""

    rmse: float
    """Root mean square error, unit of the errors."""
    scale: float
    """`rms_ratio`: 1 when calibrated, above 1 when over-confident."""
    rank: float
    """`rank_correlation` of |e| and sd."""
    auroc: float
    """Chance that a case beyond the accuracy has the larger sd."""
    attainable: float
    """`attainable_auroc` at the measured scale."""
    nll: float
    """Mean negative log-likelihood, log of the unit of the errors."""
    crps: float
    """Mean continuous ranked probability score, unit of the errors."""
    covered_68: float
    """Share of errors within the central 68 % interval."""
    covered_95: float
    """Share of errors within the central 95 % interval."""


def scores(error: Array, sd: Array, accuracy: float, dof: float = np.inf) -> Scores:
    """All scores of one set of cases.

    The attainable AUROC is that of errors N(0, (scale · sd)²) with the measured scale: a common factor changes no order.

    Args: error: (n,) any unit.   sd: (n,) same unit, > 0; the scale of a Student-t where dof is finite.
        accuracy: same unit, > 0.   dof: degrees of freedom, > 1.
    Returns: one number for each score.    Raises: BnnError for arguments that are not so, and for n = 0.
    """
    scale = rms_ratio(error, sd)
    covered = coverage(error, sd, np.array([0.68, 0.95]), dof)
    return Scores(
        rmse=_rms(np.asarray(error, float)),
        scale=scale,
        rank=rank_correlation(error, sd),
        auroc=auroc(error, sd, accuracy),
        attainable=attainable_auroc(sd, accuracy, scale) if scale > 0 else float("nan"),
        nll=negative_log_likelihood(error, sd, dof),
        crps=crps(error, sd, dof),
        covered_68=float(covered[0]),
        covered_95=float(covered[1]),
    )


def rms_ratio(error: Array, sd: Array) -> float:
    """Factor by which errors exceed their sds, sqrt(mean((e/σ)²)).

    Args: error: (n,) any unit.   sd: (n,) same unit, > 0.   Returns: no unit.   Raises: BnnError for other arrays and n = 0.
    """
    return _rms(_ratio(error, sd))


def rank_correlation(error: Array, sd: Array) -> float:
    """Spearman's rank correlation of |e| and σ, equal values sharing their mean rank.

    Args: error: (n,) any unit.   sd: (n,) same unit, > 0.   Returns: -1 to 1; nan where either is constant or n < 3.
    Raises: BnnError for other arrays.
    """
    error, sd = _checked(error, sd)
    if error.size < 3:
        return float("nan")
    mean = (error.size + 1) / 2
    a, b = stats.rankdata(np.abs(error)) - mean, stats.rankdata(sd) - mean
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else float("nan")


def auroc(error: Array, sd: Array, accuracy: float) -> float:
    """Chance that a case with |e| >= accuracy has a larger sd than one below; equal sds count half.

    Args: error: (n,) any unit.   sd: (n,) same unit, > 0.   accuracy: same unit, > 0.
    Returns: 0 to 1, 1/2 without any relation; nan where all errors or none reach the accuracy.   Raises: BnnError for others.
    """
    error, sd = _checked(error, sd)
    _positive("accuracy", accuracy)
    beyond = np.abs(error) >= accuracy
    k = int(beyond.sum())
    if k in (0, beyond.size):
        return float("nan")
    wins = stats.rankdata(sd)[beyond].sum() - k * (k + 1) / 2
    return float(wins / (k * (beyond.size - k)))


def attainable_auroc(sd: Array, accuracy: float, scale: float = 1.0) -> float:
    """AUROC to expect of errors that really are N(0, (scale · σ)²), as a ratio of expectations.

    With p = P(|e| >= accuracy), pairs won over pairs in the mean,

        Σ_{i≠j} p_i (1-p_j) ([σ_i > σ_j] + [σ_i = σ_j]/2) / Σ_{i≠j} p_i (1-p_j)

    over ordered pairs of different cases: none is beyond and within at once.  The expectation of the ratio itself differs by
    little where many cases are expected on both sides.

    Args: sd: (n,) any unit, > 0.   accuracy: same unit, > 0.   scale: of the errors over the sds, > 0.
    Returns: 1/2 to 1; nan where no pair is to be expected (n < 2, or p of all cases 0 or 1 to rounding).
    Raises: BnnError for other arguments.
    """
    sd = _checked_sd(sd)
    _positive("accuracy", accuracy)
    _positive("scale", scale)
    z = accuracy / (scale * sd)
    beyond, within = 2.0 * special.ndtr(-z), special.erf(z / np.sqrt(2.0))
    _, level = np.unique(sd, return_inverse=True)
    at = np.bincount(level, weights=within)
    below = np.cumsum(at) - at
    pairs = float(beyond @ (within.sum() - within))
    wins = float(beyond @ (below[level] + (at[level] - within) / 2.0))
    return wins / pairs if pairs > 0 else float("nan")


def negative_log_likelihood(error: Array, sd: Array, dof: float = np.inf) -> float:
    """Mean negative log-likelihood of the errors under a Gaussian, or a Student-t with scale σ.

    Args: error: (n,) any unit.   sd: (n,) same unit, > 0.   dof: degrees of freedom, > 0; infinite for a Gaussian.
    Returns: in nats; another unit of the errors adds the log of the factor.   Raises: BnnError for other arguments and n = 0.
    """
    z = _ratio(error, sd)
    _dof_above(0, dof)
    return float(np.mean(np.log(sd) - _log_density(z, dof)))


def crps(error: Array, sd: Array, dof: float = np.inf) -> float:
    """Mean continuous ranked probability score, ∫ (F(x) - [x >= e])² dx, of a Gaussian, or a Student-t with scale σ.

    With z = e/σ, distribution function F and density f of the law at scale 1, it is σ times

        Gaussian:   z (2F(z) - 1) + 2 f(z) - 1/sqrt(π)
        Student-t:  z (2F(z) - 1) + 2 f(z) (ν + z²)/(ν - 1) - 2 sqrt(ν)/(ν - 1) B(1/2, ν - 1/2)/B(1/2, ν/2)²

    Args: error: (n,) any unit.   sd: (n,) same unit, > 0.   dof: ν > 1; infinite for a Gaussian.
    Returns: unit of the errors; the mean |e| where sds are far smaller.
    Raises: BnnError for other arguments and n = 0.
    """
    z = _ratio(error, sd)
    _dof_above(1, dof)
    density = 2.0 * np.exp(_log_density(z, dof))
    if np.isfinite(dof):
        density = density * (dof + z**2) / (dof - 1.0)
        # B(1/2, x) = sqrt(π) / poch(x, 1/2), which keeps its digits for large x
        betas = special.poch(dof / 2.0, 0.5) ** 2 / (np.sqrt(np.pi) * special.poch(dof - 0.5, 0.5))
        spread = 2.0 * np.sqrt(dof) / (dof - 1.0) * betas
    else:
        spread = 1.0 / np.sqrt(np.pi)
    return float(np.mean(sd * (z * (2.0 * _distribution(z, dof) - 1.0) + density - spread)))


def coverage(error: Array, sd: Array, levels: float | Array, dof: float = np.inf) -> Array:
    """Share of errors within the central interval of each nominal level, of a Gaussian, or a Student-t with scale σ.

    Args: error: (n,) any unit.   sd: (n,) same unit, > 0.   levels: (...) 0 to 1.   dof: degrees of freedom, > 0.
    Returns: (...) 0 to 1, the level itself when calibrated.   Raises: BnnError for other arguments and n = 0.
    """
    z = np.sort(np.abs(_ratio(error, sd)))
    _dof_above(0, dof)
    levels = np.asarray(levels, float)
    if not ((levels >= 0) & (levels <= 1)).all():
        raise BnnError(f"expected levels between 0 and 1, but got {levels}")
    upper = 0.5 * (1.0 + levels)
    limit = special.stdtrit(dof, upper) if np.isfinite(dof) else special.ndtri(upper)
    return np.asarray(np.searchsorted(z, limit, side="right") / z.size)


def reliability(error: Array, sd: Array, bins: int) -> Array:
    """Root mean square sd and error of cases sorted by sd into equally filled bins; equal columns when calibrated.

    Args: error: (n,) any unit.   sd: (n,) same unit, > 0.   bins: 1 to n; their numbers of cases differ by one at most.
    Returns: (bins, 2) rms sd, rms error, same unit.   Raises: BnnError for other arguments.
    """
    error, sd = _checked(error, sd)
    if not 1 <= bins <= sd.size:
        raise BnnError(f"expected between 1 bin and as many as cases ({sd.size}), but got {bins}")
    parts = np.array_split(np.argsort(sd, kind="stable"), bins)
    return np.array([(_rms(sd[part]), _rms(error[part])) for part in parts])


def _checked_sd(sd: Array) -> Array:
    """(n,) float64, finite and positive."""
    sd = np.asarray(sd, float)
    if sd.ndim != 1:
        raise BnnError(f"expected sds of shape (n,), but got {sd.shape}")
    wrong = np.flatnonzero(~(np.isfinite(sd) & (sd > 0)))
    if wrong.size:
        raise BnnError(
            f"expected finite, positive sds, but got {sd[wrong[0]]} for case {wrong[0]} ({wrong.size} of {sd.size} wrong)"
        )
    return sd


def _checked(error: Array, sd: Array) -> tuple[Array, Array]:
    """(n,), (n,) float64, finite, the sds positive."""
    error, sd = np.asarray(error, float), _checked_sd(sd)
    if error.shape != sd.shape:
        raise BnnError(f"expected one sd per error, but got errors of shape {error.shape} and sds of shape {sd.shape}")
    wrong = np.flatnonzero(~np.isfinite(error))
    if wrong.size:
        raise BnnError(f"expected finite errors, but got {error[wrong[0]]} for case {wrong[0]} ({wrong.size} of {sd.size} wrong)")
    return error, sd


def _ratio(error: Array, sd: Array) -> Array:
    """(n,) errors over sds, of at least one case."""
    error, sd = _checked(error, sd)
    if not error.size:
        raise BnnError("expected at least one case, but got none")
    return error / sd


def _positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value > 0):
        raise BnnError(f"expected {name} to be finite and positive, but got {value}")


def _dof_above(least: int, dof: float) -> None:
    if not dof > least:
        raise BnnError(f"expected a Student-t with more than {least} degrees of freedom (infinite: a Gaussian), but got {dof}")


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _log_density(z: Array, dof: float) -> Array:
    """(n,) log f(z) of the standard Gaussian or Student-t."""
    if not np.isfinite(dof):
        return -0.5 * (z**2 + np.log(2.0 * np.pi))
    return np.log(special.poch(dof / 2.0, 0.5)) - 0.5 * np.log(np.pi * dof) - 0.5 * (dof + 1.0) * np.log1p(z**2 / dof)


def _distribution(z: Array, dof: float) -> Array:
    """(n,) F(z) of the standard Gaussian or Student-t."""
    return special.stdtr(dof, z) if np.isfinite(dof) else special.ndtr(z)
