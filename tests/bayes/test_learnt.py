"""An update may end early when its new labels are learnt, and then too it ends on samples of the posterior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from test_update import NOISE, PRIOR, PUBLISHED, SHORT, C, D, Line, N, _start

from bnn_driver.bayes import learnt
from bnn_driver.bayes.update import update_chains
from bnn_driver.errors import BnnError

EARLY = replace(PUBLISHED, settling=0.25)
NEWEST = [N - 1]


class KnownLine(Line):
    """The line fit with its residuals; `outlier` noise sds are added to the newest label."""

    def __init__(self, outlier: float = 0.0) -> None:
        super().__init__()
        self.y[-1] += outlier * NOISE

    def squared_residuals(self, theta: torch.Tensor, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        residual = (torch.einsum("bcd,md->mbc", self.x[rows], theta) - self.y[rows]) / NOISE
        return residual.square().sum((1, 2))[:, None], torch.tensor([C * len(rows)])


def test_an_update_that_ends_early_ends_on_samples_of_the_posterior() -> None:
    """200 chains as for the whole update: means within 4 Monte Carlo errors, sds within 4 errors plus 5 %.

    The error of an sd is 5 %, that of 2000 chains 1.6 %; with 2000 chains the sds are within 3 % of the closed form.
    """
    line, chains = KnownLine(), 200
    theta, report = update_chains(_start(chains), PRIOR, line, N, NEWEST, C, EARLY, range(chains))
    mean, covariance = line.posterior()
    sd = covariance.diagonal().sqrt()
    mean_error = (theta.mean(0) - mean) / sd * chains**0.5
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (theta - mean).T, upper=False)
    ratios = torch.stack([theta.std(0) / sd, white.square().mean(1).sqrt()])
    kinetic = sum(report.kinetic_temperature) / chains
    print("steps", report.steps, mean_error.numpy().round(2), ratios.numpy().round(3), f"T {kinetic:.3f}")
    assert report.steps == 680 + 500, "the first test is at 520, and five are needed"
    assert mean_error.abs().max() < 4.0
    assert (ratios - 1).abs().max() < 4 * (0.5 / chains) ** 0.5 + 0.05
    assert kinetic == pytest.approx(0.9, abs=0.1)
    assert not report.diverged


def test_a_label_that_cannot_be_met_takes_the_whole_update_and_nothing_changes() -> None:
    line = KnownLine(outlier=8.0)
    whole, plain = update_chains(_start(4), PRIOR, line, N, NEWEST, C, PUBLISHED, range(4))
    tested, report = update_chains(_start(4), PRIOR, line, N, NEWEST, C, EARLY, range(4))
    assert report == plain
    assert report.steps == PUBLISHED.steps
    assert torch.equal(tested, whole)


def test_without_new_labels_there_is_nothing_to_be_learnt() -> None:
    _, report = update_chains(_start(2), PRIOR, KnownLine(), N, [], C, EARLY, range(2))
    assert report.steps == EARLY.steps


def test_early_updates_repeat_and_chains_share_nothing_but_the_number_of_steps() -> None:
    """Rounding of sums over another number of chains is all that may differ."""
    line, seeds = KnownLine(), [10, 11, 12]
    together, report = update_chains(_start(3), PRIOR, line, N, NEWEST, C, EARLY, seeds)
    again, _ = update_chains(_start(3), PRIOR, line, N, NEWEST, C, EARLY, seeds)
    alone, single = update_chains(_start(1), PRIOR, line, N, NEWEST, C, EARLY, seeds[1:2])
    assert torch.equal(together, again)
    assert report.steps == single.steps < EARLY.steps
    assert torch.allclose(together[1:2], alone, rtol=0, atol=1e-12)


def test_until_the_labels_are_learnt_the_steps_are_those_of_a_whole_update() -> None:
    line = KnownLine()
    losses: list[list[torch.Tensor]] = [[], []]
    for settings, seen in zip((PUBLISHED, EARLY), losses, strict=True):
        update_chains(
            _start(2), PRIOR, line, N, NEWEST, C, settings, [1, 2], progress=lambda k, loss, seen=seen: seen.append(loss)
        )
    assert torch.equal(torch.stack(losses[0][:680]), torch.stack(losses[1][:680]))
    assert len(losses[1]) == 1180


@pytest.mark.parametrize("steps", [1, 4, 7, 60])
def test_short_updates_end_too(steps: int) -> None:
    settings = replace(EARLY, steps=steps, temperature=0.0)
    _, report = update_chains(_start(2), PRIOR, KnownLine(), N, NEWEST, C, settings, [1, 2])
    assert 1 <= report.steps <= steps


def test_a_likelihood_without_residuals_is_refused() -> None:
    with pytest.raises(BnnError, match="squared_residuals"):
        update_chains(_start(2), PRIOR, Line(), N, NEWEST, C, replace(SHORT, settling=0.25), [1, 2])


def test_residuals_at_samples_of_the_posterior_have_the_law_of_the_test() -> None:
    """20,000 draws of truth, labels and posterior sample of the line fit, in closed form: mean C and 1 % beyond the limit."""
    draws, generator = 20_000, torch.Generator().manual_seed(5)
    line = KnownLine()
    _, covariance = line.posterior()
    x = line.x.reshape(-1, D)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    truth = PRIOR.sd * normal(draws, D)
    y = truth @ x.T + NOISE * normal(draws, N * C)
    sample = y @ x @ covariance / NOISE**2 + normal(draws, D) @ torch.linalg.cholesky(covariance).T
    sums = ((sample @ x.T - y) / NOISE).square()[:, -C:].sum(1)
    beyond = float((sums > learnt.limits(torch.tensor([C]))).double().mean())
    assert float(sums.mean()) == pytest.approx(C, abs=4 * (2 * C / draws) ** 0.5)
    assert beyond == pytest.approx(0.01, abs=4 * (0.01 * 0.99 / draws) ** 0.5)


class Given:
    """Residuals that are read off a list for the new label 3, and are always the same for the old label 0."""

    def __init__(self, new: list[list[list[float]]], old: list[float]) -> None:
        self.new, self.old = new, old

    def squared_residuals(self, theta: torch.Tensor, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        sums = self.new.pop(0) if rows == [3] else [self.old] * len(theta)
        return torch.tensor(sums, dtype=torch.float64), torch.tensor([1, 27, 0])


GOOD, USUAL, HOT = [1.0, 27.0, 0.0], [0.9, 26.0, 0.0], [9.0, 26.0, 0.0]


@pytest.mark.parametrize(
    ("second_chain", "old", "says"),
    [
        ([6.6, 46.9, 0.0], USUAL, True),
        ([6.7, 27.0, 0.0], USUAL, False),
        ([1.0, 47.0, 0.0], USUAL, False),
        ([1.0, float("nan"), 0.0], USUAL, False),
        ([50.0, 27.0, 0.0], HOT, True),
        ([50.0, 47.0, 0.0], HOT, False),
    ],
    ids=["all within", "energy beyond", "forces beyond", "no number", "energies like the old ones", "only forces unlike the old"],
)
def test_every_chain_and_every_kind_must_be_within_its_limit(second_chain: list[float], old: list[float], says: bool) -> None:
    watch = learnt.Watch(Given([[GOOD, second_chain]] * learnt.WINDOW, old), [3], [0], begin=10.0, every=5)
    steps = range(10 + 5 * learnt.WINDOW - 4)
    answers = [watch.learnt(made, torch.zeros(2, 1)) for made in steps]
    assert answers == [False] * (len(steps) - 1) + [says]


def test_an_old_excursion_is_forgotten() -> None:
    new = [[[90.0, 27.0, 0.0]], *[[GOOD]] * learnt.WINDOW]
    watch = learnt.Watch(Given(new, USUAL), [3], [], begin=0.0, every=1)
    answers = [watch.learnt(steps, torch.zeros(1, 1)) for steps in range(learnt.WINDOW + 1)]
    assert answers == [False] * learnt.WINDOW + [True]


def test_old_labels_for_comparison_are_spread_over_all() -> None:
    assert learnt.compared(11, [10], 5) == [0, 2, 4, 6, 8]
    assert learnt.compared(12, [3, 11], 5) == [0, 2, 5, 7, 9]
    assert learnt.compared(4, [3], 5) == [0, 1, 2]
    assert learnt.compared(2, [0, 1], 5) == []
