"""Scores against closed forms, numerical integrals, all pairs, and draws from the law they assume."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
from scipy import integrate, stats

from bnn_driver.bayes.scores import (
    attainable_auroc,
    auroc,
    coverage,
    crps,
    negative_log_likelihood,
    rank_correlation,
    reliability,
    rms_ratio,
    scores,
)
from bnn_driver.errors import BnnError

DOFS = [1.3, 2.0, 3.0, 17.0, 2000.0, np.inf]


def _law(dof: float, sd: float = 1.0) -> stats.distributions.rv_frozen:
    return stats.norm(scale=sd) if np.isinf(dof) else stats.t(dof, scale=sd)


def _cases(n: int, seed: int = 0, dof: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Errors with exactly the sds (or scales) given."""
    rng = np.random.default_rng([7, seed])
    sd = np.exp(0.6 * rng.standard_normal(n))
    return sd * (rng.standard_normal(n) if np.isinf(dof) else rng.standard_t(dof, n)), sd


def _rounded(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The same with many equal values of both."""
    error, sd = _cases(n, seed)
    return np.round(error, 1), np.ceil(4 * sd) / 4


def test_scale_is_the_factor_by_which_sds_are_too_small() -> None:
    assert rms_ratio(np.array([0.6, -1.0]), np.array([0.3, 0.5])) == pytest.approx(2.0, rel=1e-14)
    error, sd = _cases(20_000)
    assert rms_ratio(3.0 * error, sd) == pytest.approx(3.0, rel=4 / np.sqrt(2 * 20_000))


@pytest.mark.parametrize("seed", range(3))
def test_rank_correlation_is_that_of_scipy(seed: int) -> None:
    for error, sd in (_cases(50, seed), _rounded(50, seed)):
        assert rank_correlation(error, sd) == pytest.approx(stats.spearmanr(np.abs(error), sd).statistic, abs=1e-13)


def test_rank_correlation_sees_order_alone_and_has_none_where_nothing_varies() -> None:
    sd = np.array([0.1, 0.2, 0.5, 3.0])
    assert rank_correlation(np.array([-1.0, 2.0, -3.0, 4.0]), sd) == pytest.approx(1.0, abs=1e-14)
    assert rank_correlation(np.array([4.0, -3.0, 2.0, 1.0]), sd) == pytest.approx(-1.0, abs=1e-14)
    assert np.isnan(rank_correlation(np.array([1.0, -1.0, 1.0, -1.0]), sd))
    assert np.isnan(rank_correlation(sd, np.full(4, 0.1)))
    assert np.isnan(rank_correlation(sd[:2], sd[:2]))
    assert np.isnan(rank_correlation(np.array([]), np.array([])))


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_pairs_in_order(seed: int) -> None:
    for error, sd in (_cases(40, seed), _rounded(40, seed)):
        beyond = np.abs(error) >= 0.8
        pairs = [float(a > b) + 0.5 * float(a == b) for a, b in product(sd[beyond], sd[~beyond])]
        assert auroc(error, sd, 0.8) == pytest.approx(np.mean(pairs), abs=1e-13)


def test_auroc_of_few_cases() -> None:
    """An error that equals the accuracy is beyond it; equal sds count half; one class has no order."""
    error = np.array([0.1, -0.5, 0.2, 2.0])
    assert auroc(error, np.array([1.0, 2.0, 1.5, 3.0]), 0.5) == 1.0
    assert auroc(error, np.array([3.0, 1.0, 2.0, 1.0]), 0.5) == 0.0
    assert auroc(error, np.ones(4), 0.5) == 0.5
    assert np.isnan(auroc(error, np.ones(4), 0.05))
    assert np.isnan(auroc(error, np.ones(4), 3.0))


def _attainable_over_pairs(sd: np.ndarray, accuracy: float, scale: float) -> float:
    p = 2.0 * stats.norm.sf(accuracy, scale=scale * sd)
    wins = pairs = 0.0
    for i, j in product(range(len(sd)), repeat=2):
        if i != j:
            wins += p[i] * (1 - p[j]) * (float(sd[i] > sd[j]) + 0.5 * float(sd[i] == sd[j]))
            pairs += p[i] * (1 - p[j])
    return wins / pairs


@pytest.mark.parametrize("n", [2, 3, 40])
@pytest.mark.parametrize(("accuracy", "scale"), [(0.8, 1.0), (0.8, 2.5), (4.0, 0.7)])
def test_attainable_auroc_is_the_sum_over_pairs(n: int, accuracy: float, scale: float) -> None:
    for sd in (_cases(n)[1], _rounded(n)[1]):
        assert attainable_auroc(sd, accuracy, scale) == pytest.approx(_attainable_over_pairs(sd, accuracy, scale), rel=1e-12)


@pytest.mark.parametrize("accuracy", [0.5, 1.0, 3.0])
def test_attainable_auroc_is_what_exact_sds_attain(accuracy: float) -> None:
    """Ratio of means over 2000 draws of the errors of 60 cases, some with equal sds, within 4 standard errors."""
    sd, scale, draws = _rounded(60)[1], 1.4, 2000
    beyond = np.abs(scale * sd * np.random.default_rng(3).standard_normal((draws, len(sd)))) >= accuracy
    order = (sd[:, None] > sd) + 0.5 * (sd[:, None] == sd)
    wins = np.einsum("di,ij,dj->d", beyond, order, ~beyond, optimize=True)
    pairs = beyond.sum(1) * (~beyond).sum(1)
    ratio = wins.mean() / pairs.mean()
    error = np.std(wins - ratio * pairs) / pairs.mean() / np.sqrt(draws)
    print(f"accuracy {accuracy}: attainable {attainable_auroc(sd, accuracy, scale):.4f}, drawn {ratio:.4f} ± {error:.4f}")
    assert error < 0.005
    assert attainable_auroc(sd, accuracy, scale) == pytest.approx(ratio, abs=4 * error)


def test_attainable_auroc_at_its_limits() -> None:
    assert attainable_auroc(np.full(5, 0.3), 0.5) == pytest.approx(0.5, abs=1e-14)
    assert attainable_auroc(np.array([1e-3, 1e-3, 1e3]), 1.0) == pytest.approx(1.0, abs=1e-3)
    assert np.isnan(attainable_auroc(np.array([0.3]), 0.5))
    assert np.isnan(attainable_auroc(np.array([1e-3, 2e-3]), 1.0)), "no error is ever beyond"


def test_many_cases_take_no_pairs() -> None:
    """50,000 cases have 2.5e9 pairs, but sorting them takes milliseconds.  Exact sds attain what is attainable.

    The variance of an AUROC A of k cases beyond, fewer than within, is A (1 - A) / k at most.
    """
    error, sd = _cases(50_000)
    start = time.process_time()
    attainable, attained = attainable_auroc(sd, 1.5), auroc(error, sd, 1.5)
    assert time.process_time() - start < 5.0
    beyond = (np.abs(error) >= 1.5).sum()
    assert attained == pytest.approx(attainable, abs=4 * np.sqrt(attainable * (1 - attainable) / beyond))


@pytest.mark.parametrize("dof", [0.5, *DOFS])
def test_negative_log_likelihood_is_that_of_scipy(dof: float) -> None:
    error, sd = _cases(30)
    exact = -np.mean([_law(dof, s).logpdf(e) for e, s in zip(5 * error, sd, strict=True)])
    assert negative_log_likelihood(5 * error, sd, dof) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("dof", DOFS)
@pytest.mark.parametrize(("error", "sd"), [(0.0, 1.0), (0.7, 1.0), (-3.0, 1.0), (0.02, 0.3), (-40.0, 5.0)])
def test_crps_is_the_integral(error: float, sd: float, dof: float) -> None:
    """∫ (F(x) - [x >= e])² dx below the error and above it, in units of the sd."""
    law = _law(dof, sd)
    below, _ = integrate.quad(lambda x: law.cdf(x * sd) ** 2, -np.inf, error / sd, limit=500, epsabs=1e-11)
    above, _ = integrate.quad(lambda x: (law.cdf(x * sd) - 1) ** 2, error / sd, np.inf, limit=500, epsabs=1e-11)
    assert crps(np.array([error]), np.array([sd]), dof) == pytest.approx(sd * (below + above), rel=1e-7)


def test_crps_of_published_cases() -> None:
    """Gaussian at its centre: (sqrt(2) - 1)/sqrt(π).  Student-t: the value that scoringRules tests itself with."""
    assert crps(np.zeros(2), np.array([1.0, 3.0])) == pytest.approx(2 * (np.sqrt(2) - 1) / np.sqrt(np.pi), rel=1e-14)
    assert crps(np.array([-3.0]), np.array([1.0]), 5.0) == pytest.approx(2.33875895, abs=5e-9)


@pytest.mark.parametrize("score", [negative_log_likelihood, crps])
def test_many_degrees_of_freedom_are_a_gaussian(score: Callable) -> None:
    error, sd = _cases(30)
    for dof in (1e6, 1e9, 1e15):
        assert score(error, sd, dof) == pytest.approx(score(error, sd), rel=10 / dof + 1e-13)


@pytest.mark.parametrize("dof", [3.0, np.inf])
@pytest.mark.parametrize("score", [negative_log_likelihood, crps])
def test_proper_scores_are_lowest_for_the_true_scale(score: Callable, dof: float) -> None:
    error, sd = _cases(20_000, dof=dof)
    values = [score(error, factor * sd, dof) for factor in (0.7, 1.0, 1.4)]
    assert values[1] == min(values)


@pytest.mark.parametrize("dof", [1.0, 4.0, np.inf])
def test_coverage_of_draws_from_the_law_is_nominal(dof: float) -> None:
    n, levels = 40_000, np.array([[0.1, 0.5, 0.68], [0.9, 0.95, 0.999]])
    error, sd = _cases(n, dof=dof)
    covered = coverage(error, sd, levels, dof)
    assert covered.shape == levels.shape
    assert (np.abs(covered - levels) < 4 * np.sqrt(levels * (1 - levels) / n)).all()
    if dof == 4.0:
        assert coverage(error, sd, 0.95) < 0.91, "a Gaussian of the same scale is too narrow"


def test_coverage_of_few_cases() -> None:
    error, sd = np.array([0.0, -1.0, 2.0, 30.0]), np.array([1.0, 1.0, 1.0, 10.0])
    assert coverage(error, sd, np.array([0.0, 0.5, 0.68269, 0.95, 0.997, 1.0])).tolist() == [0.25, 0.25, 0.5, 0.5, 0.75, 1.0]
    assert coverage(error, sd, 0.68).shape == ()


def test_reliability_of_exact_sds_is_the_diagonal() -> None:
    """Errors of each bin within 4 standard errors of its sds; half the sds: twice the slope."""
    error, sd = _cases(20_000)
    table = reliability(error, sd, 10)
    assert table.shape == (10, 2)
    assert (np.diff(table[:, 0]) > 0).all()
    assert np.abs(table[:, 1] / table[:, 0] - 1).max() < 4 * 1.3 / np.sqrt(2 * 2000)  # 1.3: sds vary in the outer bins
    assert reliability(error, sd / 2, 10) == pytest.approx(table * [0.5, 1.0], rel=1e-12)


def test_reliability_bins_are_filled_equally_and_keep_every_case() -> None:
    error, sd = _cases(11)
    whole = reliability(error, sd, 1)
    assert whole == pytest.approx(np.sqrt([[np.mean(sd**2), np.mean(error**2)]]), rel=1e-14)
    parts = np.split(np.argsort(sd), [4, 8])  # 4, 4 and 3 cases
    squares = np.array([[np.mean(x[part] ** 2) for x in (sd, error)] for part in parts])
    assert reliability(error, sd, 3) == pytest.approx(np.sqrt(squares), rel=1e-14)
    assert reliability(error, sd, 11) == pytest.approx(np.stack([sd, np.abs(error)], 1)[np.argsort(sd)], rel=1e-14)


@pytest.mark.parametrize("dof", [3.0, np.inf])
def test_all_scores_are_those_of_the_single_functions(dof: float) -> None:
    error, sd = _rounded(200)
    scale = rms_ratio(error, sd)
    assert asdict(scores(error, sd, 0.8, dof)) == {
        "rmse": pytest.approx(np.sqrt(np.mean(error**2))),
        "scale": scale,
        "rank": rank_correlation(error, sd),
        "auroc": auroc(error, sd, 0.8),
        "attainable": attainable_auroc(sd, 0.8, scale),
        "nll": negative_log_likelihood(error, sd, dof),
        "crps": crps(error, sd, dof),
        "covered_68": coverage(error, sd, 0.68, dof),
        "covered_95": coverage(error, sd, 0.95, dof),
    }


def test_signs_of_errors_do_not_matter_nor_do_lists() -> None:
    error, sd = _cases(50)
    assert scores(np.abs(error), sd, 0.8, 5.0) == scores(error, sd, 0.8, 5.0) == scores(error.tolist(), sd.tolist(), 0.8, 5.0)


def test_scores_in_another_unit_follow_it() -> None:
    error, sd = _cases(50)
    one, other = scores(error, sd, 0.8), scores(1000 * error, 1000 * sd, 800.0)
    unitless = ("scale", "rank", "auroc", "attainable", "covered_68", "covered_95")
    assert [getattr(other, k) for k in unitless] == pytest.approx([getattr(one, k) for k in unitless], rel=1e-12)
    assert (other.rmse, other.crps) == pytest.approx((1000 * one.rmse, 1000 * one.crps), rel=1e-12)
    assert other.nll == pytest.approx(one.nll + np.log(1000), rel=1e-12)


def test_errors_that_are_all_zero_have_scores_too() -> None:
    zero = scores(np.zeros(4), np.array([1.0, 2.0, 3.0, 4.0]), 0.5)
    assert (zero.rmse, zero.scale, zero.covered_95) == (0.0, 0.0, 1.0)
    assert np.isnan([zero.rank, zero.auroc, zero.attainable]).all()


TWO = np.array([0.1, 0.2])
CALLS = {
    "rms_ratio": rms_ratio,
    "rank_correlation": rank_correlation,
    "auroc": lambda e, s: auroc(e, s, 1.0),
    "attainable_auroc": lambda e, s: attainable_auroc(s, 1.0),
    "negative_log_likelihood": negative_log_likelihood,
    "crps": crps,
    "coverage": lambda e, s: coverage(e, s, 0.5),
    "reliability": lambda e, s: reliability(e, s, 1),
    "scores": lambda e, s: scores(e, s, 1.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_cases_are_refused_by_every_score(name: str) -> None:
    call = CALLS[name]
    for sd, value in ((0.0, "0.0"), (-1.0, "-1.0"), (np.nan, "nan"), (np.inf, "inf")):
        with pytest.raises(BnnError, match=rf"positive sds, but got {value} for case 1 \(1 of 2"):
            call(TWO, np.array([1.0, sd]))
    with pytest.raises(BnnError, match=r"shape \(n,\), but got \(1, 2\)"):
        call(TWO[None], TWO[None])
    if name != "attainable_auroc":
        with pytest.raises(BnnError, match=r"shape \(2,\) and sds of shape \(1,\)"):
            call(TWO, TWO[:1])
        with pytest.raises(BnnError, match="finite errors, but got nan for case 0"):
            call(np.array([np.nan, 1.0]), TWO)


@pytest.mark.parametrize("name", ["rms_ratio", "negative_log_likelihood", "crps", "coverage", "reliability", "scores"])
def test_no_cases_have_no_mean(name: str) -> None:
    with pytest.raises(BnnError, match=r"at least one case|as cases \(0\)"):
        CALLS[name](np.array([]), np.array([]))


def test_other_bad_arguments_are_refused() -> None:
    for accuracy in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(BnnError, match="accuracy"):
            auroc(TWO, TWO, accuracy)
        with pytest.raises(BnnError, match="accuracy"):
            attainable_auroc(TWO, accuracy)
    with pytest.raises(BnnError, match="scale"):
        attainable_auroc(TWO, 1.0, 0.0)
    for dof in (0.0, -1.0, np.nan):
        with pytest.raises(BnnError, match="more than 0 degrees"):
            negative_log_likelihood(TWO, TWO, dof)
        with pytest.raises(BnnError, match="more than 0 degrees"):
            coverage(TWO, TWO, 0.5, dof)
    with pytest.raises(BnnError, match="more than 1 degrees"):
        crps(TWO, TWO, 1.0)
    for level in (-0.1, 1.1, np.nan):
        with pytest.raises(BnnError, match="levels between 0 and 1"):
            coverage(TWO, TWO, np.array([0.5, level]))
    for bins in (0, 3):
        with pytest.raises(BnnError, match=rf"cases \(2\), but got {bins}"):
            reliability(TWO, TWO, bins)
