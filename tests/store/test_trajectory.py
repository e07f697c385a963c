"""Frames kept along a simulation: none is lost, none stands there twice, and they come back bit by bit."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest

from bnn_driver.errors import EnvironmentProblem
from bnn_driver.records import Frames
from bnn_driver.store.trajectory import TrajectoryFile, read_trajectories

NUMBERS = np.array([8, 1, 1])


def some(count: int, cell: bool = False) -> Frames:
    rng = np.random.default_rng(5)
    cells = np.eye(3)[None] * 9 + rng.normal(size=(count, 3, 3)) if cell else None
    return Frames(NUMBERS, rng.normal(size=(count, 3, 3)), cells, charge=1, multiplicity=2)


def written(path: Path, frames: Frames) -> None:
    kept = TrajectoryFile(path)
    for i in range(len(frames)):
        kept.append(frames[i], 5 * i, 0, 0.1 * i)
    kept.close()


@pytest.mark.parametrize("cell", [False, True])
def test_what_is_kept_comes_back_bit_by_bit(tmp_path: Path, cell: bool) -> None:
    frames = some(4, cell)
    written(tmp_path / "a.extxyz", frames[:3])
    written(tmp_path / "b.extxyz", frames[3:])
    files = {"hot": tmp_path / "a.extxyz", "cold": tmp_path / "b.extxyz", "absent": tmp_path / "c.extxyz"}
    found = read_trajectories(files, frames[:1])
    np.testing.assert_array_equal(found.frames.positions, frames.positions)
    assert found.frames.periodic == cell
    if cell:
        np.testing.assert_array_equal(found.frames.cell, frames.cell)
    assert found.walker == ("hot", "hot", "hot", "cold")
    assert found.of("cold").tolist() == [3]
    assert found.step.tolist() == [0, 5, 10, 0]
    assert found.disagreement.tolist() == [0.0, 0.1, 0.2, 0.0]
    assert (found.frames.charge, found.frames.multiplicity) == (1, 2)
    assert found.atoms().tolist() == [[2, 1]] * 4
    together = np.concatenate([batch.frames.positions for batch in found.batches([2, 0, 3], atoms=6)])
    np.testing.assert_array_equal(together, frames.positions[[2, 0, 3]])
    assert len(ase.io.read(tmp_path / "a.extxyz", ":")) == 3, "any program reads it"


def test_a_torn_last_frame_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    path, frames = tmp_path / "a.extxyz", some(3)
    written(path, frames)
    content = path.read_bytes()
    second = len(b"\n".join(content.split(b"\n")[:10])) + 1
    for size in range(second, len(content), 7):
        path.write_bytes(content[:size])
        kept = TrajectoryFile(path)
        assert len(kept) == 2
        kept.append(frames[2], 10, 0, 0.2)
        kept.close()
        assert path.read_bytes() == content


def test_a_step_that_comes_again_after_a_restart_is_not_kept_twice(tmp_path: Path) -> None:
    path, frames = tmp_path / "a.extxyz", some(3)
    written(path, frames)
    content = path.read_bytes()
    written(path, some(3))
    assert path.read_bytes() == content


def test_frames_of_other_atoms_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.extxyz", some(1))
    other = Frames(np.array([1, 8, 1]), np.zeros((1, 3, 3)))
    with pytest.raises(EnvironmentProblem, match="other atoms"):
        read_trajectories({"a": tmp_path / "a.extxyz"}, other)
