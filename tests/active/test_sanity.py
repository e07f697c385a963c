"""The sanity window stops at what no model should see, and names it."""

from __future__ import annotations

import numpy as np
import pytest

from bnn_driver.active.sanity import check_disagreement, check_sanity, check_whole
from bnn_driver.errors import GuardStop
from bnn_driver.records import Frames

NUMBERS = np.array([8, 1, 1])
WATER = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
TRICLINIC = np.array([[4.0, 0.0, 0.0], [1.5, 4.2, 0.0], [-1.0, 0.7, 3.9]])


def test_a_sane_frame_passes_with_and_without_cell() -> None:
    check_sanity(Frames(NUMBERS, WATER[None]), 0.5)
    check_sanity(Frames(NUMBERS, WATER[None], TRICLINIC[None]), 0.5)


def test_atoms_too_close_are_named_with_their_frame() -> None:
    close = WATER.copy()
    close[2] = close[1] + (0.0, 0.3, 0.0)
    with pytest.raises(GuardStop, match=r"atoms 1 \(Z = 1\) and 2 \(Z = 1\) of frame 1 are 0\.300 Å apart"):
        check_sanity(Frames(NUMBERS, np.stack([WATER, close])), 0.5)


@pytest.mark.parametrize("shift", [(1, 0, 0), (-3, 2, 0), (1, -1, 1), (0, 0, -2)])
def test_images_across_any_face_of_a_triclinic_cell_are_found(shift: tuple[int, int, int]) -> None:
    close = WATER.copy()
    close[2] = close[0] + (0.2, -0.2, 0.1) + np.array(shift) @ TRICLINIC
    with pytest.raises(GuardStop, match=r"atoms 0 .* and 2 .* 0\.300 Å"):
        check_sanity(Frames(NUMBERS, close[None], TRICLINIC[None]), 0.5)


def test_the_periodic_distance_equals_the_minimum_over_many_images() -> None:
    rng = np.random.default_rng(0)
    shifts = np.array(np.meshgrid(*[[-2, -1, 0, 1, 2]] * 3)).reshape(3, -1).T @ TRICLINIC
    for _ in range(20):
        positions = rng.uniform(-6, 6, size=(3, 3))
        pairs = [positions[j] - positions[i] for i, j in ((0, 1), (0, 2), (1, 2))]
        wrapped = [d - np.floor(d @ np.linalg.inv(TRICLINIC)) @ TRICLINIC for d in pairs]
        nearest = min(np.linalg.norm(d + shifts, axis=1).min() for d in wrapped)
        frames = Frames(NUMBERS, positions[None], TRICLINIC[None])
        if nearest < 1.6:  # below half the smallest height of 3.5 Å
            check_sanity(frames, nearest * 0.999)
            with pytest.raises(GuardStop, match="apart"):
                check_sanity(frames, nearest * 1.001)


def test_positions_cells_and_forces_outside_the_window_stop_the_run() -> None:
    broken = WATER.copy()
    broken[1, 2] = np.nan
    with pytest.raises(GuardStop, match="atom 1 of frame 0"):
        check_sanity(Frames(NUMBERS, broken[None]), 0.5)
    flat = TRICLINIC * np.array([[1.0], [1.0], [0.1]])
    with pytest.raises(GuardStop, match=r"only 0\.39"):
        check_sanity(Frames(NUMBERS, WATER[None], flat[None]), 0.5)
    forces = np.zeros((2, 3, 3))
    forces[1, 2] = (30.0, 40.0, 0.0)
    frames = Frames(NUMBERS, np.stack([WATER, WATER]))
    check_sanity(frames, 0.5, 60.0, forces)
    with pytest.raises(GuardStop, match="atom 2 of frame 1 is 50 eV/Å"):
        check_sanity(frames, 0.5, 40.0, forces)
    forces[0, 1, 0] = np.nan
    with pytest.raises(GuardStop, match="atom 1 of frame 0 is nan"):
        check_sanity(frames, 0.5, 60.0, forces)


def test_a_part_that_has_left_the_others_is_named() -> None:
    """However many atoms lie between, and from whichever side."""
    chain = np.array([[0.0, 0.0, 2.0 * i] for i in range(6)])
    numbers = np.ones(6, dtype=int)
    check_whole(Frames(numbers, chain[None]), 2.5)
    check_whole(Frames(numbers, chain[None][:, ::-1]), 2.5)
    apart = np.stack([chain, chain])
    apart[1, 4:, 2] += 1.0
    with pytest.raises(
        GuardStop, match=r"2 atoms of frame 1, such as 4, are 3\.00 Å away from the others, more than the limit of 2\.5 Å"
    ):
        check_whole(Frames(numbers, apart), 2.5)
    check_whole(Frames(numbers, apart, np.eye(3)[None].repeat(2, axis=0) * 30), 2.5)


def test_members_that_disagree_too_much_are_named() -> None:
    check_disagreement(np.array([[0.1, 0.4]]), 0.5)
    with pytest.raises(GuardStop, match=r"disagree by 0\.7 eV/Å on the force on atom 1 of frame 0"):
        check_disagreement(np.array([[0.1, 0.7]]), 0.5)
    with pytest.raises(GuardStop, match="nan"):
        check_disagreement(np.array([[0.1, np.nan]]), 0.5)
