"""Decisions: asked when it cannot be promised, by any criterion; the same arguments decide the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bnn_driver.active.criteria import EnergyCriterion, ForceCriterion
from bnn_driver.active.policy import Policy
from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.errors import BnnError, ConfigError
from bnn_driver.records import Frames, Label, LabelledFrame, Prediction

NUMBERS = np.array([8, 1, 1])
SURE = GammaCalibration(500.0, 500.0)  # λ = 1 within 5 %: the Student-t is nearly a Gaussian
NEVER = np.ones(1)


def _prediction(energy_sd: list[float], force_sd: list[list[float]]) -> Prediction:
    """Two members whose spread per frame is `energy_sd` and, in every component, `force_sd` (B, 3 atoms)."""
    half = np.array([1.0, -1.0]) / np.sqrt(2.0)  # ddof 1: members at +-s/sqrt(2) have the sd s
    energy = half[:, None] * np.array(energy_sd)
    forces = half[:, None, None, None] * np.array(force_sd)[None, :, :, None] * np.ones(3)
    b = len(energy_sd)
    return Prediction(energy, forces, np.zeros((2, b, 3, 3)), np.full((2, b), 1e-6), np.full((2, b, 3), 1e-6), generation=4)


def _frames(b: int) -> Frames:
    return Frames(NUMBERS, np.random.default_rng(0).normal(size=(b, 3, 3)))


def _labelled(prediction: Prediction, label_energy: float, label_forces: np.ndarray, **context: object) -> LabelledFrame:
    label = Label(label_energy, label_forces, None, "test", "f", "id", "by hand")
    known = {
        "criterion": "energy",
        "generation": 4,
        "predicted_energy": prediction.mean_energy[0],
        "energy_predictive_sd": prediction.energy_predictive_sd[0],
        "predicted_forces": prediction.mean_forces[0],
        "force_predictive_sd": prediction.force_predictive_sd[0],
    }
    return LabelledFrame(_frames(1), label, known | context)


ENERGY = Policy((EnergyCriterion(1.0),), confidence=0.95, audit_probability=0.0)
BOTH = Policy((EnergyCriterion(1.0), ForceCriterion(1.0)), confidence=0.95, audit_probability=0.0)
TRUST = {"energy": SURE, "force": SURE}


def test_a_frame_is_asked_just_where_its_probability_passes_the_promise() -> None:
    limit = SURE.largest_certain_sd(1.0, 0.95)
    quiet = [[0.01] * 3] * 2
    decisions = ENERGY.judge(_prediction([limit * 0.999, limit * 1.001], quiet), _frames(2), TRUST, np.ones(2))
    assert [(d.ask, d.criterion) for d in decisions] == [(False, "none"), (True, "energy")]
    assert decisions[0].probability < 0.05 < decisions[1].probability
    assert decisions[1].energy_predictive_sd == pytest.approx(limit * 1.001, rel=1e-6)


def test_either_criterion_asks_and_the_force_one_names_its_atom() -> None:
    prediction = _prediction([0.1, 0.1, 2.0], [[0.1, 0.1, 0.1], [0.1, 0.1, 0.9], [0.1, 0.1, 0.1]])
    decisions = BOTH.judge(prediction, _frames(3), TRUST, np.ones(3))
    assert [(d.ask, d.criterion, d.atom) for d in decisions] == [
        (False, "none", None),
        (True, "force", 2),
        (True, "energy", None),
    ]


def test_groups_look_at_their_own_atoms_only() -> None:
    prediction = _prediction([0.1], [[0.1, 0.1, 0.9]])
    for criterion, ask in (
        (ForceCriterion(1.0, species=(8,)), False),
        (ForceCriterion(1.0, species=(1,)), True),
        (ForceCriterion(1.0, atoms=(0, 1)), False),
        (ForceCriterion(1.0, atoms=(0, 2), species=(1,)), True),
    ):
        (decision,) = Policy((criterion,), 0.95, 0.0).judge(prediction, _frames(1), TRUST, NEVER)
        assert decision.ask is ask
        assert decision.atom == (2 if ask else None)


def test_each_criterion_uses_its_own_calibration() -> None:
    prediction = _prediction([0.1], [[0.1] * 3])
    doubtful = GammaCalibration(500.0, 50_000.0)  # sds ten times too small
    for calibrations, fired in (({"energy": doubtful, "force": SURE}, "energy"), ({"energy": SURE, "force": doubtful}, "force")):
        (decision,) = BOTH.judge(prediction, _frames(1), calibrations, NEVER)
        assert decision.criterion == fired


def test_a_joint_criterion_sums_over_its_atoms() -> None:
    prediction = _prediction([0.1], [[0.27, 0.27, 0.27]])
    each, joint = (
        Policy((ForceCriterion(1.0, joint=j),), 0.95, 0.0).judge(prediction, _frames(1), TRUST, NEVER)[0] for j in (False, True)
    )
    assert joint.probability == pytest.approx(3 * each.probability, rel=1e-9)
    assert (each.ask, joint.ask) == (False, True)


def test_per_atom_accuracy_grows_with_the_atoms() -> None:
    prediction = _prediction([1.4], [[0.1] * 3])
    asks = [
        Policy((EnergyCriterion(1.0, per_atom=p),), 0.95, 0.0).judge(prediction, _frames(1), TRUST, NEVER)[0].ask
        for p in (False, True)
    ]
    assert asks == [True, False]


def test_as_long_as_nothing_is_learnt_every_frame_is_asked() -> None:
    one_member = replace(_prediction([0.1, 0.1], [[0.1] * 3] * 2), energy=np.zeros((1, 2)), energy_noise_sd=np.full((1, 2), 0.3))
    decisions = BOTH.judge(one_member, _frames(2), TRUST, np.zeros(2), first=True)
    assert [(d.ask, d.criterion, d.probability) for d in decisions] == [(True, "first", 1.0)] * 2
    assert decisions[0].energy_predictive_sd == pytest.approx(0.3)


def test_a_prediction_that_is_not_finite_is_asked() -> None:
    prediction = _prediction([0.1, 0.1], [[0.1] * 3] * 2)
    prediction.forces[0, 1, 2, 0] = np.nan
    decisions = ENERGY.judge(prediction, _frames(2), TRUST, np.ones(2))
    assert [d.ask for d in decisions] == [False, True]


@pytest.mark.parametrize("values", [(np.inf, 0.0), (np.inf, -np.inf), (np.nan, np.inf)])
def test_no_member_can_hide_behind_another(values: tuple[float, float]) -> None:
    """What is not finite in any member is not finite in the mean, which is what is looked at."""
    prediction = _prediction([0.1, 0.1], [[0.1] * 3] * 2)
    prediction.forces[:, 0, 1, 2] = values
    with np.errstate(invalid="ignore"):
        decisions = ENERGY.judge(prediction, _frames(2), TRUST, np.ones(2))
    assert [d.ask for d in decisions] == [True, False]


def test_the_energy_spread_is_the_law_of_total_variance() -> None:
    rng = np.random.default_rng(0)
    energy, noise = -4000.0 + rng.standard_normal((5, 3)), rng.random((5, 3))
    prediction = replace(_prediction([0.1] * 3, [[0.1] * 3] * 3), energy=energy, energy_noise_sd=noise)
    expected = np.sqrt(energy.var(axis=0, ddof=1) + (noise**2).mean(axis=0))
    np.testing.assert_allclose(prediction.energy_predictive_sd, expected, rtol=1e-13)


def test_audits_take_served_frames_only_and_only_below_their_probability() -> None:
    policy = replace(ENERGY, audit_probability=0.1)
    prediction = _prediction([0.1, 0.1, 5.0], [[0.1] * 3] * 3)
    decisions = policy.judge(prediction, _frames(3), TRUST, np.array([0.09, 0.11, 0.0]))
    assert [(d.ask, d.criterion) for d in decisions] == [(False, "audit"), (False, "none"), (True, "energy")]


def test_a_batch_decides_as_its_frames_do() -> None:
    sds, forces = [0.1, 0.6, 0.3], [[0.1, 0.2, 0.3], [0.1] * 3, [0.1, 0.1, 0.5]]
    together = BOTH.judge(_prediction(sds, forces), _frames(3), TRUST, np.ones(3))
    alone = [BOTH.judge(_prediction(sds[b : b + 1], forces[b : b + 1]), _frames(1), TRUST, NEVER)[0] for b in range(3)]
    assert together == alone


def test_turning_the_axes_changes_no_decision() -> None:
    rng = np.random.default_rng(1)
    prediction = _prediction([0.1], [[0.1] * 3])
    forces = rng.normal(scale=0.3, size=(6, 1, 3, 3))
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    noise = {"energy": np.zeros((6, 1)), "energy_noise_sd": np.full((6, 1), 0.1), "force_noise_sd": np.full((6, 1, 3), 0.1)}
    first, second = (
        BOTH.judge(replace(prediction, forces=f, **noise), _frames(1), TRUST, NEVER)[0].probability
        for f in (forces, forces @ rotation)
    )
    assert first == pytest.approx(second, rel=1e-12)


def test_pairs_are_the_errors_before_training_with_the_offset_on_the_label() -> None:
    prediction = _prediction([0.2], [[0.1, 0.2, 0.4]])
    label_forces = np.zeros((3, 3))
    label_forces[:, 0] = (0.3, 0.0, 0.8)
    pairs = BOTH.pairs(_labelled(prediction, -7.0, label_forces), offset=6.5)
    assert pairs["energy"] == pytest.approx((0.5, 0.2), rel=1e-6)
    error, sd = pairs["force"]
    ratios = np.array([0.3, 0.0, 0.8]) / (np.sqrt(3) * np.array([0.1, 0.2, 0.4]))
    assert (error / sd) ** 2 == pytest.approx(np.mean(ratios**2), rel=1e-6)
    assert sd == pytest.approx(np.sqrt(np.mean(3 * np.array([0.1, 0.2, 0.4]) ** 2)), rel=1e-6)


def test_a_label_counts_once_per_criterion_and_the_first_ones_not_at_all() -> None:
    labelled = _labelled(_prediction([0.2], [[0.1] * 3]), 0.0, np.zeros((3, 3)))
    assert {name: c.n for name, c in BOTH.observe(TRUST, labelled, 0.0).items()} == {"energy": 1.0, "force": 1.0}
    for context in ({"criterion": "first"}, {"generation": 0}):
        assert BOTH.observe(TRUST, replace(labelled, context=labelled.context | context), 0.0) == TRUST


def test_a_broken_promise_is_judged_on_the_energy_and_on_the_least_certain_atom() -> None:
    prediction = _prediction([0.2], [[0.1, 0.2, 0.4]])
    joint = Policy((*BOTH.criteria, ForceCriterion(1.0, "any", joint=True)), 0.95, 0.0)
    for atom, broken in ((0, False), (2, True)):
        forces = np.zeros((3, 3))
        forces[atom] = (0.8, 0.8, 0.0)  # length 1.13
        assert joint.exceeded(_labelled(prediction, 1.2, forces), 0.0) == {"energy": True, "force": broken, "any": True}


def test_what_cannot_be_judged_is_refused() -> None:
    prediction = _prediction([0.1], [[0.1] * 3])
    with pytest.raises(BnnError, match="'force' has no calibration"):
        BOTH.judge(prediction, _frames(1), {"energy": SURE}, NEVER)
    with pytest.raises(BnnError, match="at least 2 members"):
        BOTH.judge(replace(prediction, energy=prediction.energy[:1]), _frames(1), TRUST, NEVER)
    with pytest.raises(ConfigError, match="names atom 7"):
        ForceCriterion(1.0, atoms=(0, 7)).members(NUMBERS)
    with pytest.raises(ConfigError, match="selects no atom"):
        ForceCriterion(1.0, species=(6,)).members(NUMBERS)
    with pytest.raises(ConfigError, match="different names"):
        Policy((ForceCriterion(1.0), ForceCriterion(2.0)), 0.95, 0.0)


def test_audits_that_break_the_promise_widen_the_calibration_until_such_frames_are_asked() -> None:
    prior = {"energy": GammaCalibration(10.0, 10.0)}
    sd = 0.5 * prior["energy"].largest_certain_sd(1.0, 0.95)
    prediction, frames, quiet = _prediction([sd], [[0.01] * 3]), _frames(1), np.zeros((3, 3))
    assert not ENERGY.judge(prediction, frames, prior, np.ones(1))[0].ask
    after, beyond = dict(prior), 0
    for _ in range(10):  # every audited frame is wrong by six of its sds, beyond the accuracy
        audit = _labelled(prediction, prediction.mean_energy[0] - 6 * sd, quiet, criterion="audit")
        beyond += ENERGY.exceeded(audit, 0.0)["energy"]
        after = ENERGY.observe(after, audit, 0.0)
    assert beyond == 10
    decision = ENERGY.judge(prediction, frames, after, np.ones(1))[0]
    assert decision.ask
    # posterior Gamma(a + n/2, b + Σ(e/sd)²/2): λ is about 15/190, the sds count 3.6 times
    assert after["energy"].calibrated_sd(sd) == pytest.approx(sd * np.sqrt(190 / 15), rel=0.1)
