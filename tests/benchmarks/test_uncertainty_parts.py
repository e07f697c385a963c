"""The parts of the uncertainty benchmarks that can be wrong without anybody noticing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent))
pytest.importorskip("tblite.ase")
from calibrations import ByRegime, Conformal, PowerLaw
from laplace import fit, sds
from replay import exact_tail, facts, judged, windows
from trajectories import torsion

from bnn_driver.bayes.calibration import GammaCalibration

PRIOR = GammaCalibration(2.0, 5.0)


def test_laplace_is_the_posterior_of_a_linear_model() -> None:
    """Covariance of the weights and of the constant under a flat prior, the whole precision inverted: 1e-8 relative."""
    rng = np.random.default_rng(0)
    slopes, new = rng.normal(size=(4, 7, 5)), rng.normal(size=(3, 7, 5))
    residual = (slopes @ rng.normal(0, 0.3, 5)) + rng.normal(0, 0.05, (4, 7))
    fitted = fit(slopes, residual, 0.02, 0.05)

    def design(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.broadcast_to((np.arange(7) == 0)[None, :, None], (*x.shape[:2], 1))], axis=2).reshape(-1, 6)

    noise = np.tile(np.r_[0.02, np.full(6, 0.05)], 4) * fitted.noise
    weighted = design(slopes) / noise[:, None]
    covariance = np.linalg.inv(weighted.T @ weighted + np.diag(np.r_[np.full(5, fitted.prior_sd**-2), 0.0]))
    variance = np.einsum("ni,ij,nj->n", design(new), covariance, design(new)).reshape(3, 7)
    energy, force = sds(fitted, new)
    assert energy**2 == pytest.approx(variance[:, 0], rel=1e-8)
    assert force.reshape(3, 6) ** 2 == pytest.approx(variance[:, 1:], rel=1e-8)


def test_windows_reach_as_far_on_either_side() -> None:
    state = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0])
    assert np.flatnonzero(windows(state, 2)).tolist() == [2, 3, 4, 5, 7, 8, 9]
    assert not windows(np.zeros(9, int), 3).any()


def test_the_exact_tail_is_the_binomial_one_and_a_sum_of_runs() -> None:
    assert exact_tail(7, [0.2] * 20) == pytest.approx(stats.binom.sf(6, 20, 0.2), rel=1e-12)
    two = sum(stats.binom.pmf(k, 6, 0.1) * stats.binom.sf(2 - k, 9, 0.4) for k in range(7))
    assert exact_tail(3, [0.1] * 6 + [0.4] * 9) == pytest.approx(two, rel=1e-12)


def test_torsions_of_known_shapes() -> None:
    a, b, c = np.array([[1.0, 0, 0]]), np.zeros((1, 3)), np.array([[0, 0, 1.0]])
    for angle in (60.0, 180.0, -60.0):
        d = c + np.array([[np.cos(np.radians(angle)), np.sin(np.radians(angle)), 0]])
        found = torsion(a, b, c, d)[0]
        assert abs(found) == pytest.approx(abs(angle))
    first = torsion(a, b, c, c + np.array([[0.5, 0.5, 0]]))[0]
    mirrored = torsion(a, b, c, c + np.array([[0.5, -0.5, 0]]))[0]
    assert first == pytest.approx(-mirrored)


def test_facts_count_what_was_served() -> None:
    kinds = ["first", "energy", "none", "none", "audit", "energy"]
    errors = [0.0, 2.0, 0.4, 1.0, -3.0, 0.2]
    records = [
        {"criterion": k, "error": e, "error_F": 1.0, "labels": i, "inflation": 1.5}
        for i, (k, e) in enumerate(zip(kinds, errors, strict=True))
    ]
    found = facts(records, 1.0)
    assert (found["labels"], found["audits"], found["served"], found["beyond"], found["asked_beyond"]) == (4, 1, 3, 2, 1)


def test_a_calibration_is_judged_on_the_pairs_of_the_frames_really_asked() -> None:
    kinds, sds, errors = ["first", "energy", "none", "none"], [0.1, 0.5, 0.01, 0.3], [0.0, 0.5, 0.02, 1.5]
    records = [{"criterion": k, "sd": s, "error": e} for k, s, e in zip(kinds, sds, errors, strict=True)]
    asked, served, beyond = judged(records, GammaCalibration(50.0, 5.0), 1.0)
    assert (asked, served, beyond) == (0, 3, 1), "sds are believed to be three times too large"
    assert judged(records, GammaCalibration(50.0, 500.0), 1.0) == (2, 1, 0)


def test_a_power_law_of_one_is_the_products_calibration() -> None:
    law = PowerLaw.around(PRIOR, 0.1)
    alone = PowerLaw(0.1, (1.0,), (PRIOR,), (0.0,))
    plain = PRIOR
    for error, sd in [(0.3, 0.1), (-0.2, 0.2), (0.05, 0.4)]:
        law, alone, plain = law.observe(error, sd), alone.observe(error, sd), plain.observe(error, sd)
    sds = np.array([0.02, 0.1, 0.7])
    assert alone.probability_exceeds(sds, 0.5) == pytest.approx(plain.probability_exceeds(sds, 0.5), rel=1e-12)
    spread = law.probability_exceeds(sds, 0.5)
    assert spread[0] > plain.probability_exceeds(sds, 0.5)[0], "errors of one size for all sds: the smallest is trusted less"


def test_a_power_law_learns_that_the_sd_says_nothing() -> None:
    rng = np.random.default_rng(1)
    law = PowerLaw.around(PRIOR, 0.1)
    for sd in rng.uniform(0.02, 0.5, 60):
        law = law.observe(float(rng.normal(0, 0.2)), float(sd))
    assert int(np.argmax(law.log_weights)) == 0


def test_conformal_bounds_are_order_statistics() -> None:
    law = Conformal(PRIOR)
    for k in range(1, 40):
        law = law.observe(0.1 * k, 1.0)
    assert law.probability_exceeds(np.array([1.0]), 0.1 * 38 + 0.05) == pytest.approx(1 - 38 / 40)
    few = Conformal(PRIOR).observe(0.3, 1.0)
    assert few.probability_exceeds(np.array([1.0]), 2.0) == pytest.approx(PRIOR.observe(0.3, 1.0).probability_exceeds(1.0, 2.0))


def test_a_regime_has_its_own_factor_and_the_common_one_where_nothing_is_known() -> None:
    law = ByRegime(PRIOR, 0.4)
    for _ in range(30):
        law = law.observe(0.02, 0.05).observe(2.0, 0.5)
    small, large = law.probability_exceeds(np.array([0.05, 0.5]), 1.0)
    assert small < 1e-6
    assert large > 0.5
    assert law.probability_exceeds(np.array([0.2]), 1.0)[0] == pytest.approx(
        GammaCalibration(3.0, 3.0 * law.common.inflation**2).probability_exceeds(0.2, 1.0)
    )
