"""Where a walker goes on, and the zero of energy of labels of several compositions."""

from __future__ import annotations

import numpy as np

from bnn_driver.loops.dynamics import last_good
from bnn_driver.loops.known import Constants, fixes


def test_a_walker_goes_on_from_its_last_frame_or_from_before_it_was_lost() -> None:
    steps, calm = np.array([0, 0, 5, 5, 10, 10, 15, 15]), np.full(8, 0.1)
    assert last_good(steps, calm, stopped=False) == 15
    assert last_good(steps, calm, stopped=True) == 10, "its last kept frame was lost already"
    wild = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1])
    assert last_good(steps, wild, stopped=True) == 5, "one bead of step 10 was far from what is known"
    partial = np.array([0, 0, 5, 5, 9, 10])
    assert last_good(partial, np.full(6, 0.1), stopped=True) == 5, "one bead of step 9 is missing"
    assert last_good(steps[:2], calm[:2], stopped=True) is None
    assert last_good(steps[:0], calm[:0], stopped=True) is None
    assert last_good(steps, np.zeros(8), stopped=True) == 10, "members without a spread"


def test_constants_of_new_atoms_leave_those_of_known_ones_as_they_are() -> None:
    known, row = np.array([[5, 2], [5, 2], [5, 2]]), np.array([9, 4])
    first = Constants.fitted((1, 8), known, np.array([-100.0, -101.0, -99.0]))
    assert np.isclose(first.of(np.array([1] * 5 + [8] * 2)), -100.0)
    assert not fixes(known, row)
    both = Constants.fitted((1, 8), np.vstack([known, row, row]), np.array([-100.0, -100.0, -100.0, -210.0, -212.0]))
    assert np.isclose(both.of(np.array([1] * 5 + [8] * 2)), -100.0)
    assert np.isclose(both.of(np.array([1] * 9 + [8] * 4)), -211.0)
    assert fixes(np.array([[5, 2], [3, 1]]), row)
    assert not fixes(np.zeros((0, 2), dtype=int), row)
