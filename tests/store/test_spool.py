from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from awkward import assert_same, make_label

from bnn_driver.errors import BnnError, EnvironmentProblem, OracleInconsistent
from bnn_driver.store import spool


@pytest.mark.parametrize("periodic", [False, True])
def test_a_finished_label_is_taken_bit_by_bit_and_as_often_as_wanted(tmp_path: Path, periodic: bool) -> None:
    label = make_label(1, periodic=periodic).label
    assert spool.take(tmp_path, label.frame_id) is None
    spool.begin(tmp_path, label.frame_id)
    assert spool.running(tmp_path)[label.frame_id]["pid"] == os.getpid()
    spool.finish(tmp_path, label.frame_id, label)
    assert spool.running(tmp_path) == {}
    for _ in range(2):
        assert_same(spool.take(tmp_path, label.frame_id), label)
    assert spool.done(tmp_path) == (label.frame_id,)


def test_failures_are_counted_by_frame_and_class(tmp_path: Path) -> None:
    spool.begin(tmp_path, "a")
    assert spool.fail(tmp_path, "a", "SCFNotConverged", "rung 3") == 1
    assert spool.fail(tmp_path, "a", "OracleTimeout", "1 h") == 2
    assert spool.fail(tmp_path, "b", "OracleCrashed", "status -9") == 1
    found = spool.failures(tmp_path)
    assert {name: [attempt["kind"] for attempt in attempts] for name, attempts in found.items()} == {
        "a": ["SCFNotConverged", "OracleTimeout"],
        "b": ["OracleCrashed"],
    }
    assert spool.running(tmp_path) == {}


def test_a_worker_killed_before_any_system_call_leaves_no_half_label(tmp_path: Path, killed_at: Callable) -> None:
    label = make_label(1).label
    states = set()
    for k in range(20):
        folder = tmp_path / str(k)
        if not killed_at(lambda folder=folder: spool.finish(folder, label.frame_id, label), k):
            break
        taken = spool.take(folder, label.frame_id)
        states.add(taken is None)
        if taken is not None:
            assert_same(taken, label)
    assert states == {True, False}


def test_labels_of_another_frame_and_unfit_names_are_refused(tmp_path: Path) -> None:
    label = make_label(1).label
    with pytest.raises(BnnError, match="belongs to frame"):
        spool.finish(tmp_path, "other", label)
    with pytest.raises(BnnError, match="is no frame id"):
        spool.take(tmp_path, "../../etc/passwd")
    with pytest.raises(OracleInconsistent, match="not finite"):
        spool.finish(tmp_path, label.frame_id, replace(label, forces=np.full((5, 3), np.nan)))
    assert spool.done(tmp_path) == ()


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    label = make_label(1).label
    spool.finish(tmp_path, label.frame_id, label)
    (tmp_path / "done" / f"{label.frame_id}.json").write_text('{"energy": 1}')
    with pytest.raises(EnvironmentProblem, match="is not a label"):
        spool.take(tmp_path, label.frame_id)


def test_the_spool_is_light_to_import() -> None:
    code = "import sys, bnn_driver.store.spool; print(sorted({'torch', 'ase', 'scipy', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
