"""An update of the chains samples a known posterior, and says so when it did not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bnn_driver.bayes.prior import GaussianPrior
from bnn_driver.bayes.sghmc import SghmcSettings
from bnn_driver.bayes.update import UpdateSettings, update_chains
from bnn_driver.errors import BnnError

N, C, D, NOISE = 24, 3, 4, 0.2
PUBLISHED = UpdateSettings(
    steps=2000,
    batch_size=5,
    step_size=1e-2,
    sampler=SghmcSettings(friction=0.1, beta=0.999, eps=1e-4),
    temperature=1.0,
    noiseless_fraction=0.2,
    ramp_fraction=0.05,
    loss_margin=1.0,
    temperature_range=(0.2, 5.0),
)
SHORT = replace(PUBLISHED, steps=60)
PRIOR = GaussianPrior(torch.zeros(D, dtype=torch.float64), torch.full((D,), 0.5, dtype=torch.float64))


class Line:
    """Linear regression with Gaussian noise: its posterior is a known Gaussian."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(N, C, D, dtype=torch.float64, generator=generator)
        self.x = x * torch.tensor([1.0, 0.5, 0.3, 0.1])
        truth = 0.5 * torch.randn(D, dtype=torch.float64, generator=generator)
        self.y = self.x @ truth + NOISE * torch.randn(N, C, dtype=torch.float64, generator=generator)

    def __call__(self, theta: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        residual = (torch.einsum("mbcd,md->mbc", self.x[index], theta) - self.y[index]) / NOISE
        return (weight * 0.5 * (residual**2).sum(-1)).sum(-1)

    def posterior(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (D,) and covariance (D, D)."""
        x = self.x.reshape(-1, D)
        covariance = torch.linalg.inv(x.T @ x / NOISE**2 + torch.diag(1 / PRIOR.sd**2))
        return covariance @ (x.T @ self.y.reshape(-1)) / NOISE**2, covariance


def _start(m: int) -> torch.Tensor:
    return torch.zeros(m, D, dtype=torch.float64)


def test_the_published_update_ends_on_samples_of_the_posterior() -> None:
    """200 chains from the prior's centre, AMSGrad mass, minibatches of 5, cosine to 0.

    Means within 4 Monte Carlo errors; standard deviations within 4 errors plus 5 % for what the moving mass and the gradient
    noise leave (2000 chains: below 1 %, Monte Carlo error 1.6 %); kinetic temperature 0.95, for the momenta lag behind the falling step.
    """
    line, chains = Line(), 200
    theta, report = update_chains(_start(chains), PRIOR, line, N, [N - 1], C, PUBLISHED, range(chains))
    mean, covariance = line.posterior()
    sd = covariance.diagonal().sqrt()
    mean_error = (theta.mean(0) - mean) / sd * chains**0.5
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (theta - mean).T, upper=False)
    sd_ratio, white_ratio = theta.std(0) / sd, white.square().mean(1).sqrt()
    kinetic = sum(report.kinetic_temperature) / chains
    print(
        "mean errors",
        mean_error.numpy().round(2),
        "sd",
        sd_ratio.numpy().round(3),
        white_ratio.numpy().round(3),
        f"T {kinetic:.3f}",
    )
    error = (0.5 / chains) ** 0.5
    assert mean_error.abs().max() < 4.0
    assert (sd_ratio - 1).abs().max() < 4 * error + 0.05
    assert (white_ratio - 1).abs().max() < 4 * error + 0.05
    assert kinetic == pytest.approx(0.95, abs=0.05)
    assert not report.diverged


def test_without_temperature_it_finds_the_mode() -> None:
    line = Line()
    settings = replace(PUBLISHED, temperature=0.0, batch_size=N, step_size=0.03)
    theta, report = update_chains(_start(2), PRIOR, line, N, [N - 1], C, settings, [0, 1])
    mean, covariance = line.posterior()
    assert ((theta - mean) / covariance.diagonal().sqrt()).abs().max() < 0.05
    assert report.reason == ""


def test_a_chain_depends_on_its_own_seed_alone() -> None:
    """Rounding of sums over another number of chains is all that may differ."""
    line, start = Line(), torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together, _ = update_chains(start, PRIOR, line, N, [N - 1], C, SHORT, [10, 11, 12, 13])
    alone, _ = update_chains(start[2:3], PRIOR, line, N, [N - 1], C, SHORT, [12])
    again, _ = update_chains(start, PRIOR, line, N, [N - 1], C, SHORT, [10, 11, 12, 13])
    assert torch.allclose(together[2:3], alone, rtol=0, atol=1e-12)
    assert torch.equal(together, again)


def test_chains_from_one_start_separate_and_the_start_is_kept() -> None:
    start = _start(3)
    theta, report = update_chains(start, PRIOR, Line(), N, [N - 1], C, SHORT, [1, 2, 3])
    assert torch.count_nonzero(start) == 0
    assert torch.pdist(theta).min() > 0
    change = (theta / PRIOR.sd).abs().amax(1)
    assert list(report.max_change) == pytest.approx(change.tolist())
    assert report.steps == SHORT.steps


def test_progress_sees_every_step_and_its_losses() -> None:
    seen: list[tuple[int, int]] = []
    update_chains(_start(2), PRIOR, Line(), N, [], C, SHORT, [1, 2], progress=lambda k, loss: seen.append((k, len(loss))))
    assert seen == [(k, 2) for k in range(SHORT.steps)]


def test_weights_that_are_not_finite_end_the_update_early() -> None:
    calls = []

    def forward(theta: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return theta.sum(-1) * (torch.nan if len(calls) > 60 else 1.0)

    _, report = update_chains(_start(2), PRIOR, forward, N, [], C, PUBLISHED, [1, 2])
    assert (report.diverged, report.finite, report.steps) == (True, False, 100)
    assert "not finite" in report.reason


def test_a_loss_that_rises_names_its_chain() -> None:
    def forward(theta: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        climbing = torch.tensor([0.0, 1.0], dtype=torch.float64) * 1e3 * forward.calls
        forward.calls += 1
        return theta.sum(-1) * 0 + climbing

    forward.calls = 0
    _, report = update_chains(_start(2), PRIOR, forward, N, [], C, SHORT, [1, 2])
    assert report.finite
    assert report.diverged
    assert "loss of chain 1" in report.reason


def test_a_kinetic_temperature_out_of_range_is_divergence() -> None:
    settings = replace(SHORT, temperature_range=(1e3, 1e4))
    _, report = update_chains(_start(2), PRIOR, Line(), N, [], C, settings, [1, 2])
    assert "kinetic temperature of chain 0" in report.reason


def test_seeds_and_chains_must_match() -> None:
    with pytest.raises(BnnError, match="one seed per chain"):
        update_chains(_start(3), PRIOR, Line(), N, [], C, SHORT, [1, 2])
