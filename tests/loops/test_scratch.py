"""Which labels a model from scratch holds back: never those on which the zero of energy of an element hangs."""

from __future__ import annotations

import numpy as np
import pytest

from bnn_driver.loops.scratch import held_back

WATER, HYDROXYL, OXYGEN = [2, 1], [1, 1], [0, 2]


@pytest.mark.parametrize("others", [[HYDROXYL], [OXYGEN], [HYDROXYL, HYDROXYL]])
def test_the_only_label_of_a_composition_is_learnt(others: list[list[int]]) -> None:
    counts = np.array([WATER] * 10 + others)
    for seed in range(50):
        valid, train = held_back(counts, np.random.default_rng(seed).permutation(len(counts)), 3)
        assert len(valid) == 3
        assert sorted(valid + train) == list(range(len(counts)))
        assert np.linalg.matrix_rank(counts[train]) == 2


def test_labels_of_one_composition_are_held_back_by_lot() -> None:
    order = np.random.default_rng(1).permutation(20)
    assert held_back(np.array([WATER] * 20), order, 2) == (order[:2].tolist(), order[2:].tolist())


def test_where_none_can_be_spared_one_is_learnt_and_judged_by() -> None:
    assert held_back(np.array([WATER, HYDROXYL]), np.array([1, 0]), 1) == ([1], [1, 0])
