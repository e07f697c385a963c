"""Near-duplicates: what leaves a structure the same is not seen, what changes it is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bnn_driver.active.likeness import Gallery, shape
from bnn_driver.records import Frames

RNG = np.random.default_rng(5)
NUMBERS = np.array([8, 1, 1, 8, 1, 1, 1])
PLACES = RNG.uniform(0, 4, size=(7, 3))
CELL = np.array([[6.0, 0.2, 0.0], [0.0, 7.0, 0.5], [0.3, 0.0, 8.0]])


def frame(numbers: np.ndarray = NUMBERS, places: np.ndarray = PLACES, cell: np.ndarray | None = None, charge: int = 0) -> Frames:
    return Frames(numbers, places[None], None if cell is None else cell[None], charge)


def test_position_orientation_handedness_and_order_are_not_seen() -> None:
    turn = Rotation.random(random_state=3).as_matrix()
    order = RNG.permutation(7)
    for matrix in (turn, -turn):
        moved = frame(NUMBERS[order], (PLACES @ matrix.T + [3.0, -8.0, 1.0])[order])
        np.testing.assert_allclose(shape(moved), shape(frame()), atol=1e-12)


def test_a_crystal_is_the_same_after_a_shift_a_rotation_and_a_change_of_image() -> None:
    turn = Rotation.random(random_state=4).as_matrix()
    images = RNG.integers(-2, 3, size=(7, 3)) @ CELL
    moved = frame(places=(PLACES + images + 0.7) @ turn.T, cell=CELL @ turn.T)
    np.testing.assert_allclose(shape(moved), shape(frame(cell=CELL)), atol=1e-9)


def test_a_crystal_of_another_cell_is_another_frame() -> None:
    near = shape(frame(cell=CELL)) - shape(frame(cell=1.02 * CELL))
    assert np.abs(near).max() > 0.1


def test_atoms_moved_by_less_than_a_half_of_the_tolerance_are_nearly_the_same() -> None:
    """No distance changes by more than twice the largest displacement."""
    gallery = Gallery(0.05)
    gallery.add(frame())
    for _ in range(50):
        step = RNG.normal(size=(7, 3))
        step *= 0.025 / np.linalg.norm(step, axis=1, keepdims=True)
        assert gallery.has(frame(places=PLACES + step))


def test_nearest_images_in_a_skewed_cell_are_the_nearest() -> None:
    """A primitive cell of a face-centred crystal, where rounding fractional coordinates finds other images; brute force finds the nearest."""
    primitive = 2 * np.array([[0.0, 1.8, 1.8], [1.8, 0.0, 1.8], [1.8, 1.8, 0.0]])
    lattice = np.array([[i, j, k] for i in range(2) for j in range(2) for k in range(2)]) / 2 @ primitive
    numbers = np.full(8, 29)
    near = np.array([[i, j, k] for i in range(-2, 3) for j in range(-2, 3) for k in range(-2, 3)]) @ primitive
    for _ in range(20):
        places = lattice + RNG.normal(0, 0.05, lattice.shape)
        first, second = np.triu_indices(8, k=1)
        apart = np.linalg.norm((places[second] - places[first])[:, None] + near, axis=-1).min(axis=1)
        np.testing.assert_allclose(shape(frame(numbers, places, primitive))[:28], np.sort(apart), atol=1e-9)
        step = RNG.normal(size=places.shape)
        gallery = Gallery(0.02)
        gallery.add(frame(numbers, places, primitive))
        assert gallery.has(frame(numbers, places + 0.0099 * step / np.linalg.norm(step, axis=1, keepdims=True), primitive))


def test_one_atom_moved_far_is_another_frame() -> None:
    gallery = Gallery(0.05)
    gallery.add(frame())
    for atom in range(7):
        places = PLACES.copy()
        places[atom] += [0.4, 0.0, 0.0]
        assert not gallery.has(frame(places=places))


def test_two_atoms_of_different_elements_exchanged_are_another_frame() -> None:
    gallery = Gallery(0.05)
    gallery.add(frame())
    assert gallery.has(frame(places=PLACES[[3, 1, 2, 0, 4, 5, 6]])), "two oxygens"
    assert not gallery.has(frame(places=PLACES[[1, 0, 2, 3, 4, 5, 6]])), "an oxygen and a hydrogen"


@pytest.mark.parametrize(
    "other",
    [frame(NUMBERS[:6], PLACES[:6]), frame(charge=1), frame(np.array([8, 1, 1, 8, 1, 1, 6]))],
    ids=["fewer atoms", "another charge", "another element"],
)
def test_frames_of_other_atoms_are_never_alike(other: Frames) -> None:
    gallery = Gallery(100.0)
    gallery.add(frame())
    assert not gallery.has(other)
    assert gallery.has(frame())


def test_a_single_atom_has_a_shape() -> None:
    gallery = Gallery(0.0)
    gallery.add(frame(np.array([1]), np.zeros((1, 3))))
    assert gallery.has(frame(np.array([1]), np.ones((1, 3))))
