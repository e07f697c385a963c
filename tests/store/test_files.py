from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bnn_driver.errors import BnnError, EnvironmentProblem
from bnn_driver.store.files import folder_lock, plain, read_json, remove_leftovers, temporary_beside, write_atomic


def test_a_write_killed_before_any_system_call_leaves_the_old_or_the_new_file(tmp_path: Path, killed_at: Callable) -> None:
    path = tmp_path / "x.json"
    seen = set()
    for k in range(20):
        write_atomic(path, b"old")
        if not killed_at(lambda: write_atomic(path, b"new"), k):
            break
        seen.add(path.read_bytes())
    assert k >= 3, "file, rename and folder are each synced"
    assert seen == {b"old", b"new"}
    assert path.read_bytes() == b"new"


def test_a_refused_write_leaves_the_old_file_and_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match=r"x could not be written \(3 bytes\).*No space left.*old or the new"):
        write_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == b"old"


def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "x", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_json_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"a\.json is missing"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"x": 1')
    with pytest.raises(EnvironmentProblem, match=r"a\.json cannot be read as JSON"):
        read_json(tmp_path / "a.json")


def test_numpy_values_become_plain_ones() -> None:
    value = {1: np.float32(0.5), "a": (np.int64(2), np.bool_(True)), "p": Path("/x"), "n": None, "z": np.eye(2, dtype=int)}
    assert plain(value) == {"1": 0.5, "a": [2, True], "p": "/x", "n": None, "z": [[1, 0], [0, 1]]}
    with pytest.raises(BnnError, match="got <object"):
        plain({"x": object()})


def test_leftovers_go_unless_a_writer_is_at_work(tmp_path: Path) -> None:
    leftover = temporary_beside(tmp_path / "000001.extxyz")
    leftover.write_text("half")
    with folder_lock(tmp_path, wait=True):
        remove_leftovers(tmp_path)
        assert leftover.exists()
    remove_leftovers(tmp_path)
    assert not leftover.exists()
