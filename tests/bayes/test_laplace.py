"""The last layer's posterior is that of the Gaussian linear model, and its scale that of largest evidence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from bnn_driver.bayes import laplace
from bnn_driver.bayes.laplace import Sums
from bnn_driver.errors import BnnError

D, R = 5, 6
ENERGY_SD, FORCE_SD = 0.02, 0.05
FLAT = 30.0
"""eV; a prior of the constant that is as good as flat: variances differ by 1e-6 relative, differences of log evidences by less."""


def labels(count: int, true_sd: float = 0.3, noise: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives (N, 1 + R, D) and residuals (N, 1 + R) of a linear model, energies first and off by a constant."""
    rng = torch.Generator().manual_seed(seed)
    slopes = torch.randn(count, 1 + R, D, dtype=torch.float64, generator=rng)
    sds = noise * torch.tensor([ENERGY_SD] + [FORCE_SD] * R, dtype=torch.float64)
    drawn = sds * torch.randn(count, 1 + R, dtype=torch.float64, generator=rng)
    residual = slopes @ (true_sd * torch.randn(D, dtype=torch.float64, generator=rng)) + drawn
    residual[:, 0] += 7.0
    return slopes, residual


def sums_of(slopes: torch.Tensor, residual: torch.Tensor, weight: float = 1.0) -> Sums:
    sums = Sums.none(D)
    for j, r in zip(slopes, residual, strict=True):
        sums = sums.with_label(j[0], float(r[0]), ENERGY_SD, j[1:], r[1:], FORCE_SD, weight)
    return sums


def covariance(slopes: torch.Tensor, noise: float, prior_sd: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Design with the constant, prior and noise covariance, as matrices."""
    n = len(slopes)
    constant = (torch.arange(1 + R) == 0).double().expand(n, -1)[..., None]
    design = torch.cat([slopes, constant], dim=2).reshape(-1, D + 1).numpy()
    prior = np.diag(np.r_[np.full(D, prior_sd**2), FLAT**2])
    return design, prior, np.diag(np.tile(np.r_[ENERGY_SD, np.full(R, FORCE_SD)] ** 2, n)) * noise**2


@pytest.mark.parametrize("count", [1, 4])
def test_variances_are_those_of_the_posterior(count: int) -> None:
    slopes, residual = labels(count)
    fitted = sums_of(slopes, residual).posterior()
    design, prior, noise = covariance(slopes, fitted.noise, fitted.prior_sd)
    posterior = np.linalg.inv(np.linalg.inv(prior) + design.T @ np.linalg.inv(noise) @ design)
    new = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    there = np.c_[new.numpy(), np.ones(3)]
    exact = np.sqrt(np.einsum("bi,ij,bj->b", there, posterior, there))
    assert fitted.energy_sd(new).numpy() == pytest.approx(exact, rel=1e-5)


def test_prior_and_noise_have_the_largest_evidence() -> None:
    """The difference of log evidences against the dense Gaussian's, 1e-4 of it (the flat prior of the constant is a finite one there)."""
    slopes, residual = labels(6, noise=3.0)
    sums = sums_of(slopes, residual)
    fitted = sums.posterior()
    found, exact = {}, {}
    for s in (fitted.prior_sd, fitted.prior_sd * 10**0.5, fitted.prior_sd / 10):
        for k in (fitted.noise, fitted.noise * 10**0.5, fitted.noise / 10**0.5):
            design, prior, noise = covariance(slopes, k, s)
            exact[s, k] = stats.multivariate_normal.logpdf(residual.numpy().ravel(), cov=design @ prior @ design.T + noise)
            found[s, k] = evidence(sums, s, k)
    best = max(exact, key=exact.__getitem__)
    assert best == (fitted.prior_sd, fitted.noise)
    for key in exact:
        assert found[key] - found[best] == pytest.approx(exact[key] - exact[best], rel=1e-4)


def evidence(sums: Sums, s: float, k: float) -> float:
    centre = sums.energy_slopes / sums.energy_precision
    values, vectors = torch.linalg.eigh(sums.gram - sums.energy_precision * torch.outer(centre, centre))
    along = vectors.T @ (sums.moment - sums.energy_residual * centre)
    squares = sums.squares - sums.energy_residual**2 / sums.energy_precision
    return laplace._evidence(values, along, squares, sums.count - 1, s, k)


def test_the_noise_and_the_scale_of_the_weights_are_found() -> None:
    """30 labels of 7 numbers: within one step of the grid, half a decade."""
    for true_sd, noise in [(0.3, 1.0), (3.0, 10.0)]:
        fitted = sums_of(*labels(30, true_sd, noise)).posterior()
        assert abs(np.log10(fitted.noise / noise)) < 0.3
        assert abs(np.log10(fitted.prior_sd / true_sd)) <= 0.51


def test_a_part_of_the_components_with_weight_is_unbiased() -> None:
    slopes, residual = labels(1)
    whole = sums_of(slopes, residual)
    halves = [
        Sums.none(D).with_label(slopes[0, 0], 7.0, ENERGY_SD, slopes[0, rows], residual[0, rows], FORCE_SD, 2.0)
        for rows in (slice(1, 4), slice(4, 7))
    ]
    mean = 0.5 * (halves[0].gram + halves[1].gram)
    assert torch.allclose(mean, whole.gram, rtol=1e-12)
    assert halves[0].count == whole.count == 1 + R


def test_the_sd_grows_with_the_distance_and_labels_bring_it_down() -> None:
    slopes, residual = labels(8)
    one, many = sums_of(slopes[:1], residual[:1]).posterior(), sums_of(slopes, residual).posterior()
    at = slopes[:1, 0]
    assert float(one.energy_sd(at)[0]) == pytest.approx(one.constant_sd, rel=1e-6), "a labelled frame: only the constant is left"
    away = torch.stack([slopes[0, 0] + step * torch.ones(D, dtype=torch.float64) for step in (1.0, 3.0, 10.0)])
    assert (one.energy_sd(away).diff() > 0).all()
    assert (many.energy_sd(away) < one.energy_sd(away)).all()


def test_without_labels_there_is_no_posterior() -> None:
    with pytest.raises(BnnError, match="at least one label"):
        Sums.none(D).posterior()
