"""The prior's analytic gradient is the derivative of its density; groups of names get their own sd."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from bnn_driver.bayes.posterior import MinibatchPosterior
from bnn_driver.bayes.prior import GaussianPrior, dispersed, group_sds
from bnn_driver.errors import ConfigError

PRIOR = GaussianPrior(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor([0.5, 0.1, 2.0], dtype=torch.float64))
THETA = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_density_and_gradient_are_those_of_independent_gaussians() -> None:
    leaf = THETA.clone().requires_grad_(True)
    expected = Normal(PRIOR.centre, PRIOR.sd).log_prob(leaf).sum(-1)
    assert torch.allclose(PRIOR.log_density(THETA), expected, rtol=1e-13)
    assert torch.allclose(PRIOR.gradient(THETA), torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-13)


def test_groups_get_their_own_sd_and_the_longest_prefix_holds() -> None:
    sizes = {"noise.w0": 2, "noise.b0": 1, "readout.w": 2}
    assert group_sds(sizes, {"noise": 1.0, "noise.b": 3.0}, 0.5).tolist() == [1.0, 1.0, 3.0, 0.5, 0.5]


def test_a_group_that_fits_nothing_and_a_zero_sd_are_refused() -> None:
    with pytest.raises(ConfigError, match="no weight's name starts with 'nois_'"):
        group_sds({"noise.w0": 2}, {"nois_": 1.0}, 0.5)
    with pytest.raises(ConfigError, match="must be positive"):
        GaussianPrior(torch.zeros(2), torch.tensor([1.0, 0.0]))


def test_maxima_around_dispersed_centres_are_samples_of_the_posterior() -> None:
    """Linear model, labels with drawn noise, centres drawn from the prior: mean and covariance of the exact posterior.

    40 000 chains: errors of the sample mean and covariance below 5 of their standard errors.
    """
    members, noise = 40_000, 0.3
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, dtype=torch.float64, generator=rng)
    y = torch.tensor([0.4, -1.0], dtype=torch.float64)
    prior = dispersed(PRIOR, PRIOR.sd, range(members))
    precision = torch.diag(PRIOR.sd**-2) + x.T @ x / noise**2
    exact = torch.linalg.inv(precision)
    mean = exact @ (PRIOR.centre / PRIOR.sd**2 + x.T @ y / noise**2)
    drawn = y + noise * torch.randn(members, 2, dtype=torch.float64, generator=rng)
    # the zero of the gradient that the sampler is given, -prior.gradient - Σ x (y - x θ) / noise²
    at_zero = -prior.gradient(torch.zeros(members, 3, dtype=torch.float64)) - drawn @ x / noise**2
    found = -at_zero @ exact
    assert torch.allclose(prior.gradient(found) + (drawn - found @ x.T) @ x / noise**2, torch.zeros(()).double(), atol=1e-9)
    error = (found.mean(0) - mean) / (exact.diagonal() / members).sqrt()
    assert error.abs().max() < 5
    covariance = torch.cov(found.T)
    scale = (exact.diagonal()[:, None] * exact.diagonal() + exact**2).sqrt() / members**0.5
    assert ((covariance - exact) / scale).abs().max() < 5


def test_the_mean_of_two_dispersed_chains_is_already_the_maximum() -> None:
    """Linear model: to rounding, where independent centres leave sd²/2; the sample covariance over many pairs is the exact one.

    20 000 pairs: 5 standard errors of a covariance from pairs, sqrt((Σ_ii Σ_jj + Σ_ij²)/n).
    """
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y, noise, pairs = torch.tensor([0.4, -1.0], dtype=torch.float64), 0.3, 20_000
    inverse = torch.linalg.inv(torch.diag(PRIOR.sd**-2) + x.T @ x / noise**2)
    best = inverse @ (PRIOR.centre / PRIOR.sd**2 + x.T @ y / noise**2)
    covariance = torch.zeros(3, 3, dtype=torch.float64)
    for k in range(pairs):
        centres = dispersed(PRIOR, PRIOR.sd, (2 * k, 2 * k + 1)).centre
        found = (centres / PRIOR.sd**2 + y @ x / noise**2) @ inverse
        if k < 10:
            assert torch.allclose(found.mean(0), best, rtol=1e-12, atol=1e-14)
        covariance += torch.cov(found.T) / pairs
    expected = inverse @ torch.diag(PRIOR.sd**-2) @ inverse
    scale = ((expected.diagonal()[:, None] * expected.diagonal() + expected**2) / pairs).sqrt()
    assert ((covariance - expected) / scale).abs().max() < 5


def test_centres_depend_on_the_seeds_alone_and_density_and_gradient_on_the_row() -> None:
    few, many = (dispersed(PRIOR, torch.tensor([0.1, 0.0, 0.2]), seeds) for seeds in ([5, 6], [4, 5, 6, 7]))
    assert torch.allclose(few.centre[1] - few.centre[0], many.centre[2] - many.centre[1], rtol=1e-12)
    assert torch.allclose(many.centre.mean(0), PRIOR.centre, rtol=1e-15)
    assert not torch.equal(many.centre[0], many.centre[1])
    assert torch.equal(many.centre[:, 1], PRIOR.centre[1].expand(4)), "no dispersion, no move"
    for m in range(4):
        alone = GaussianPrior(many.centre[m], PRIOR.sd)
        assert many.log_density(THETA)[m] == alone.log_density(THETA)[m]
        assert torch.equal(many.gradient(THETA)[m], alone.gradient(THETA)[m])


def test_the_minibatch_gradient_is_that_of_the_whole_over_n() -> None:
    """Whole set in one batch: ∇U/N from autograd of -Σ log p - log prior; theta is not changed."""
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def forward(theta: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (weight * torch.cos(torch.einsum("mbd,md->mb", x[index], theta))).sum(-1)

    index, weight = torch.arange(5).expand(4, 5), torch.full((4, 5), 0.2, dtype=torch.float64)
    before = THETA.clone()
    gradient, loss = MinibatchPosterior(forward, PRIOR, 5).gradient(THETA, index, weight)
    leaf = THETA.clone().requires_grad_(True)
    whole = torch.cos(leaf @ x.T).sum(-1) - Normal(PRIOR.centre, PRIOR.sd).log_prob(leaf).sum(-1)
    assert torch.allclose(gradient, torch.autograd.grad(whole.sum(), leaf)[0] / 5, rtol=1e-12)
    assert torch.allclose(loss, torch.cos(THETA @ x.T).mean(-1), rtol=1e-12)
    assert torch.equal(THETA, before)
    assert not THETA.requires_grad
