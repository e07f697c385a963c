"""Rounds end for the reason that is given, and not before."""

from __future__ import annotations

import pytest

from bnn_driver.active.stopping import Explored, Plateau, Stop

PLATEAU = Plateau(rounds=3, fall=0.05, approach=2.0)
PUBLISHED_SELECTED = [136.5, 61.0, 41.0, 24.0]
PUBLISHED_REMAINING = [62.2, 33.0, 23.0, 12.5]


def test_the_published_disagreements_are_still_falling() -> None:
    assert not PLATEAU.reached(PUBLISHED_SELECTED, PUBLISHED_REMAINING)


def test_level_and_near_the_remaining_is_a_plateau() -> None:
    assert PLATEAU.reached([50, 24, 23, 24, 23], [12, 12, 12, 12, 12])
    assert not PLATEAU.reached([50, 24, 23, 24, 23], [12, 12, 12, 12, 11]), "not yet near enough"
    assert not PLATEAU.reached([50, 45, 40, 36, 30], [30, 30, 30, 30, 30]), "still falling"
    assert not PLATEAU.reached([23, 23, 23], [20, 20, 20]), "too few rounds to tell"


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_a_plateau_is_free_of_units(factor: float) -> None:
    assert PLATEAU.reached([factor * x for x in (50, 24, 23, 24, 23)], [factor * 12] * 5)


@pytest.mark.parametrize(
    ("stop", "says"),
    [
        (Stop(), ""),
        (Stop(target=0.05), "force error 0.04"),
        (Stop(target=0.03), ""),
        (Stop(labels=30), "budget of 30 labels"),
        (Stop(labels=31), ""),
        (Stop(rounds=5), "all 5 rounds"),
        (Stop(rounds=6), ""),
        (Stop(plateau=PLATEAU), "levelled off"),
    ],
)
def test_each_criterion_gives_its_own_reason(stop: Stop, says: str) -> None:
    reason = stop.reason(30, [0.2, 0.04], [50, 24, 23, 24, 23], [12] * 5)
    assert (says in reason) if says else not reason


def explored(**changes: float) -> Explored:
    return Explored(**({"approach": 1.5, "in_a_row": 1, "confidence": 0.9, "rounds": 3, "labels": 20} | changes))  # type: ignore[arg-type]


def test_it_is_explored_when_fresh_dynamics_is_as_certain_as_what_is_known() -> None:
    assert explored().reason(5, [3.0, 1.4], [None, 1.0], [True, True], 0, 1.0).startswith("converged")
    assert explored().reason(5, [3.0, 1.6], [None, 1.0], [True, True], 0, 1.0) == ""
    assert explored().reason(5, [3.0, 1.4], [None, None], [True, True], 0, 1.0) == "", "members without a spread know no level"
    assert explored().reason(5, [3.0, 1.4], [None, 1.0], [True, False], 0, 1.0) == "", "a walker was lost"
    assert explored(approach=0).reason(5, [0.1], [1.0], [True], 0, 1.0) == ""


def test_with_labels_alone_it_must_hold_in_rounds_in_a_row() -> None:
    two = explored(in_a_row=2)
    assert two.reason(5, [1.0], [1.0], [True], 0, 1.0) == ""
    assert two.reason(5, [9.0, 1.0], [1.0, 1.0], [True, True], 0, 1.0) == ""
    assert two.reason(5, [9.0, 1.0, 1.0], [1.0] * 3, [True] * 3, 0, 1.0).startswith("converged")


def test_it_is_explored_when_the_promise_holds_or_the_budget_is_spent() -> None:
    assert explored().reason(5, [3.0], [1.0], [True], 30, 0.09).startswith("the promise holds: by 30 audits")
    assert explored().reason(5, [3.0], [1.0], [True], 30, 0.11) == ""
    for lost in ([True, False], [False, True]):
        assert explored().reason(5, [3.0, 3.0], [1.0, 1.0], lost, 30, 0.09) == "", "a walker was lost, after the audits or before"
    assert explored().reason(20, [3.0], [1.0], [True], 0, 1.0) == "the budget of 20 labels is spent"
    assert explored().reason(5, [3.0] * 4, [1.0] * 4, [True] * 4, 0, 1.0) == "all 3 rounds are done"
    assert explored().reason(5, [3.0] * 3, [1.0] * 3, [True] * 3, 0, 1.0) == "", (
        "three rounds have labels, the fourth judges the weights"
    )
