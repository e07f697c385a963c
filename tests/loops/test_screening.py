"""Which frames of a screen are taken: by which column, and what is passed over for good."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
from small_pool import WATER, labelled

from bnn_driver.active.likeness import Gallery
from bnn_driver.loops.screening import Screen, choose
from bnn_driver.pool_config import Choosing
from bnn_driver.store.pool import Keys, Pool


def pool_of(folder: Path, stretches: list[float]) -> Pool:
    """Waters, one OH bond of each stretched by so much, Å."""
    frames = [labelled("OH2", WATER + np.array([[0, 0, 0], [x, 0, 0], [0, 0, 0]])) for x in stretches]
    ase.io.write(folder / "pool.extxyz", frames, format="extxyz")
    return Pool((folder / "pool.extxyz",), Keys("REF_energy", "REF_forces"))


def screen_of(scores: list[float]) -> Screen:
    """Frames with these force disagreements."""
    force = np.array(scores)
    return Screen(np.arange(len(force)), force, force, force, force, force)


def test_each_rank_has_its_own_column() -> None:
    columns = {"force": [1.0, 2.0], "atom": [3.0, 4.0], "energy": [5.0, 6.0], "predictive": [9.0, 12.0]}
    force, atom, energy, predictive = (np.array(values) for values in columns.values())
    found = Screen(np.arange(2), force, atom, energy, np.array([7.0, 8.0]), predictive)
    atoms = np.array([1, 3])
    for rank, values in columns.items():
        per = atoms if rank in ("energy", "predictive") else 1
        np.testing.assert_array_equal(found.ranking(rank, atoms), np.array(values) / per)


@pytest.mark.parametrize(("k", "passed"), [(1, []), (2, [2])])
def test_only_a_near_duplicate_of_what_is_taken_is_passed_over_for_good(tmp_path: Path, k: int, passed: list[int]) -> None:
    """The third frame is nearly the second one, which is on the shortlist and taken only when two are."""
    pool = pool_of(tmp_path, [0.0, 0.3, 0.301, 0.5])
    settings = Choosing(batch=k, diversity=False, shortlist=3 / k)
    choice = choose(None, pool, screen_of([5, 4, 3, 2]), settings, k, Gallery(0.01), lambda: np.zeros((0, 1)))  # type: ignore[arg-type]
    assert choice.rows.tolist() == [0, 1][:k]
    assert choice.near_duplicates.tolist() == passed
    assert 2 not in choice.reserve


def test_what_is_nearly_a_label_is_passed_over_for_good(tmp_path: Path) -> None:
    pool, taken = pool_of(tmp_path, [0.0, 0.3, 0.002]), Gallery(0.01)
    taken.add(pool.one(2).frames)
    choice = choose(None, pool, screen_of([5, 4]), Choosing(diversity=False), 1, taken, lambda: np.zeros((0, 1)))  # type: ignore[arg-type]
    assert choice.rows.tolist() == [1]
    assert choice.near_duplicates.tolist() == [0]
