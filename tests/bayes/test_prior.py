"""The prior's analytic gradient is the derivative of its density; groups of names get their own sd."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from bnn_driver.bayes.posterior import MinibatchPosterior
from bnn_driver.bayes.prior import GaussianPrior, group_sds
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
