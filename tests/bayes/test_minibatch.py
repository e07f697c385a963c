"""Priority sampling estimates the mean over all labels without bias, and brings the newest label once per minibatch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from bnn_driver.bayes import minibatch
from bnn_driver.bayes.minibatch import own_weights
from bnn_driver.errors import BnnError


def _generators(m: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(m)]


def _seed(member: int, label: int) -> int:
    return int(np.random.SeedSequence([member, label]).generate_state(1, np.uint64)[0] >> 1)


def _weights_given(n: int, b: int, newest: list[int]) -> torch.Tensor:
    """The weight that draw_chains hands out with each label (N,)."""
    index, weight = minibatch.draw_chains(n, b, newest, _generators(400))
    given = torch.full((n,), torch.nan, dtype=torch.float64)
    given[index.flatten()] = weight.flatten()
    assert torch.equal(given[index], weight), "one label came with two different weights"
    return given


@pytest.mark.parametrize(("n", "b", "newest"), [(4, 2, [3]), (6, 3, [5]), (5, 3, [3, 4]), (7, 2, [0, 6]), (5, 4, [1, 2, 3, 4])])
def test_the_estimate_is_unbiased_over_all_minibatches(n: int, b: int, newest: list[int]) -> None:
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, weight = minibatch.probabilities(n, b, newest), _weights_given(n, b, newest)
    expectation = sum(
        float(torch.prod(q[list(batch)]) * torch.sum(weight[list(batch)] * x[list(batch)]))
        for batch in itertools.product(range(n), repeat=b)
    )
    assert expectation == pytest.approx(float(x.mean()), abs=1e-14)  # rounding of at most 7^2 ... 5^4 terms


@pytest.mark.parametrize(("n", "newest"), [(9, [8]), (12, [2, 11])])
def test_labels_are_drawn_as_often_as_the_weights_assume(n: int, newest: list[int]) -> None:
    chains, b = 20_000, 5
    index, _ = minibatch.draw_chains(n, b, newest, _generators(chains))
    count = torch.bincount(index.flatten(), minlength=n).double()
    expected = minibatch.probabilities(n, b, newest) * chains * b
    chi2 = float(((count - expected) ** 2 / expected).sum())
    assert chi2 < 35.0  # 99.9 % quantile of chi-square with 11 degrees of freedom is 31.3; seeds are fixed


@pytest.mark.parametrize("n", [6, 7, 10, 50, 333])
def test_the_newest_label_comes_once_per_minibatch_and_hardly_more(n: int) -> None:
    b = 5
    expected = b * float(minibatch.probabilities(n, b, [n - 1])[-1])
    repeats = minibatch.repeats(n, b, 1)
    assert expected >= 1.0 - 1e-12
    assert b * (repeats - 1) / (n - 1 + repeats - 1) < 1.0  # one repeat fewer would be too few


def test_many_new_labels_take_half_of_the_minibatch() -> None:
    q = minibatch.probabilities(100, 6, list(range(80, 100)))
    assert 0.5 <= float(q[80:].sum()) < 0.6


def test_few_labels_are_taken_whole() -> None:
    index, weight = minibatch.draw_chains(3, 5, [2], _generators(2))
    assert index.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(weight, torch.full((2, 3), 1 / 3, dtype=torch.float64))


def test_merging_duplicates_changes_no_estimate() -> None:
    x = torch.arange(8, dtype=torch.float64) ** 2
    index, weight = minibatch.draw_chains(8, 6, [7], [torch.Generator().manual_seed(3)])
    merged, merged_weight = minibatch.draw(8, 6, [7], torch.Generator().manual_seed(3))
    assert len(merged) < 6
    assert float((merged_weight * x[merged]).sum()) == pytest.approx(float((weight[0] * x[index[0]]).sum()), rel=1e-14)


def test_a_chain_draws_the_same_whoever_is_beside_it() -> None:
    alone, _ = minibatch.draw_chains(40, 5, [39], [torch.Generator().manual_seed(1)])
    together, _ = minibatch.draw_chains(40, 5, [39], _generators(4))
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(together[0], together[1])


def test_a_newest_label_that_does_not_exist_is_named() -> None:
    with pytest.raises(BnnError, match="newest label 5 is not one of the 5"):
        minibatch.probabilities(5, 3, [5])


def test_own_weights_have_mean_one_and_stay_as_labels_come() -> None:
    seeds = [[_seed(m, i) for i in range(400)] for m in range(8)]
    assert own_weights("equal", seeds) is None
    for kind in ("bootstrap", "folds"):
        all_of_them, first = own_weights(kind, seeds), own_weights(kind, [row[:7] for row in seeds])
        assert torch.equal(all_of_them[:, :7], first)
        assert (all_of_them >= 0).all()
    drawn = own_weights("bootstrap", seeds)
    assert stats.kstest(drawn.numpy().ravel(), "expon").pvalue > 0.001
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.2, "each chain has its own"


@pytest.mark.parametrize(("members", "out"), [(2, 1), (4, 1), (6, 2), (8, 2)])
def test_folds_leave_each_label_out_of_one_or_two_chains(members: int, out: int) -> None:
    seeds = [[_seed(m, i) for i in range(300)] for m in range(members)]
    weights = own_weights("folds", seeds)
    assert ((weights == 0).sum(0) == out).all()
    assert torch.allclose(weights.sum(0), torch.full((300,), float(members), dtype=torch.float64))
    assert (weights == 0).any(1).all(), "every chain leaves some out"
