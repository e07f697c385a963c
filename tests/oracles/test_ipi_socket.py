"""A code behind a socket gives no label without its own word for it, and never outlives the process that asked."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from scripted_code import CUBE, WATER, Make, expected, left, moved, scripted, wait_until

from bnn_driver.errors import (
    GeometryRejected,
    OracleConfigError,
    OracleCrashed,
    OracleInconsistent,
    OracleTimeout,
    SCFNotConverged,
)
from bnn_driver.executors import LocalExecutor
from bnn_driver.oracle import label
from bnn_driver.records import Frames


def test_labels_come_from_one_running_code_and_say_so(make: Make, tmp_path: Path) -> None:
    oracle = make()
    for number, frame in enumerate((WATER, moved(0.1), moved(-0.1))):
        result = label(oracle, frame)
        energy, forces = expected(frame)
        assert result.energy == pytest.approx(energy, rel=1e-12)
        np.testing.assert_allclose(result.forces, forces, atol=1e-12)
        assert result.code == "Spring 1.0"
        said = "cold start" if number == 0 else f"warm, frame {number + 1} since its start"
        assert result.evidence == f"log: SCF converged in 7 steps ({said})"
    assert len(list(tmp_path.glob("socket-session-*"))) == 1


def test_the_templates_are_filled_in_and_other_braces_stay(make: Make, tmp_path: Path) -> None:
    label(make(box="9 A", templates=["atoms", "vectors"]), WATER)
    lines = next(tmp_path.glob("socket-session-*/atoms")).read_text().splitlines()
    assert lines[:2] == ["charge 0, multiplicity 1, periodic false", "3 2 1 8 2 1 1"]
    shifted = WATER.positions[0] - WATER.positions[0].mean(axis=0) + 4.5
    assert [line.split()[0] for line in lines[2:5]] == ["O", "H", "H"]
    np.testing.assert_allclose([[float(x) for x in line.split()[1:]] for line in lines[2:5]], shifted, atol=1e-11)
    assert lines[5] == "{not a placeholder} ${HOME}"
    np.testing.assert_allclose(np.loadtxt(next(tmp_path.glob("socket-session-*/vectors"))), 9 * np.eye(3)[[0, 1, 2, 1]])


def test_a_molecule_is_computed_in_the_middle_of_the_box(make: Make, tmp_path: Path) -> None:
    oracle = make(box="9 A")
    far = replace(WATER, positions=WATER.positions + 50.0)
    assert label(oracle, far).energy == pytest.approx(expected(WATER)[0], rel=1e-9)
    folder = next(tmp_path.glob("socket-session-*"))
    np.testing.assert_allclose(np.loadtxt(folder / "positions").mean(axis=0), 4.5, atol=1e-9)
    np.testing.assert_allclose(np.loadtxt(folder / "cell"), 9 * np.eye(3), atol=1e-9)
    with pytest.raises(GeometryRejected, match="wall of a box of 9 Å"):
        label(oracle, moved(6.0))


@pytest.mark.parametrize(
    ("behaviour", "error", "words"),
    [
        (
            "silent",
            OracleInconsistent,
            "0 of 1 lines of log match 'SCF converged in': without them nothing says that it converged",
        ),
        ("failed", SCFNotConverged, "the log of the code says: 'SCF NOT CONVERGED'"),
        ("double", OracleInconsistent, "2 lines of log match .* expected 1"),
        ("crash", OracleCrashed, r"(?s)exit status 3.*stderr.txt:\n +segmentation fault"),
        ("failcrash", SCFNotConverged, "left, and its log says 'SCF NOT CONVERGED'"),
        ("cut", OracleInconsistent, "became shorter"),
    ],
)
def test_without_evidence_there_is_no_label_and_the_code_is_started_anew(
    make: Make, tmp_path: Path, behaviour: str, error: type[Exception], words: str
) -> None:
    oracle = make(f"ok,{behaviour},ok")
    label(oracle, WATER)
    with pytest.raises(error, match=words) as caught:
        label(oracle, moved(0.1))
    assert str(tmp_path / "socket-session-") in str(caught.value)
    assert not left(tmp_path)
    assert "cold start" in label(oracle, moved(0.2)).evidence
    assert len(list(tmp_path.glob("socket-session-*"))) == 2  # the failed one is kept to be looked at


def test_a_line_that_comes_late_is_waited_for(make: Make) -> None:
    assert "converged in 9 steps" in label(make("late", evidence_timeout="1 min"), WATER).evidence


def test_a_straggling_line_of_one_frame_is_no_evidence_for_the_next(make: Make, tmp_path: Path) -> None:
    oracle = make("straggler,silent")
    label(oracle, WATER)
    log = next(tmp_path.glob("socket-session-*/log"))
    assert wait_until(lambda: log.read_text().count("SCF converged in") == 2)
    with pytest.raises(OracleInconsistent, match="2 lines"):
        label(oracle, moved(0.1))


def test_codes_that_write_several_lines_per_frame_are_counted(make: Make) -> None:
    oracle = make("double", lines_per_frame=2)
    assert "converged in 8 steps" in label(oracle, WATER).evidence
    assert "warm" in label(oracle, moved(0.1)).evidence


def test_a_code_that_hangs_is_killed_at_its_limit(make: Make, tmp_path: Path) -> None:
    oracle = make("ok,hang", frame_timeout="3 s")
    label(oracle, WATER)
    start = time.monotonic()
    with pytest.raises(OracleTimeout, match=r"did not finish within 3 s"):
        label(oracle, moved(0.1))
    assert time.monotonic() - start < 15.0
    assert not left(tmp_path)


def test_a_code_that_never_connects_is_killed_at_its_limit(make: Make, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(OracleTimeout, match=r"did not connect within 0\.5 s"):
        label(make("absent", connect_timeout="0.5 s"), WATER)
    assert time.monotonic() - start < 15.0
    assert not left(tmp_path)


def test_a_code_that_ends_at_once_says_why(make: Make) -> None:
    with pytest.raises(OracleCrashed, match=r"(?s)exit status 2.*stderr.txt:\n.*can't open file"):
        label(make(command=f"{sys.executable} missing.py {{socket}}"), WATER)


def test_a_code_that_left_between_two_labels_is_started_again(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    oracle = make("leave")
    label(oracle, WATER)
    assert wait_until(lambda: not left(tmp_path))
    assert "cold start" in label(oracle, moved(0.1)).evidence
    assert "ended between two labels" in caplog.text


@pytest.mark.parametrize(
    "other",
    [
        replace(WATER, charge=1),
        replace(WATER, multiplicity=3),
        replace(WATER, numbers=np.array([1, 8, 1])),
        Frames(np.array([8, 1]), WATER.positions[:, :2]),
        replace(WATER, cell=CUBE),
    ],
    ids=["charge", "multiplicity", "order", "composition", "cell"],
)
def test_another_kind_of_frame_needs_a_fresh_start(make: Make, other: Frames) -> None:
    oracle = make(periodic=True)
    label(oracle, WATER)
    assert "cold start" in label(oracle, other).evidence
    assert "warm" in label(oracle, replace(other, positions=1.01 * other.positions)).evidence


def test_a_cell_that_changed_much_needs_a_fresh_start(make: Make) -> None:
    oracle = make(periodic=True)
    starts = [label(oracle, replace(WATER, cell=CUBE * scale)).evidence.split("(")[1] for scale in (1.0, 1.03, 1.04, 1.0)]
    assert starts == ["cold start)", "warm, frame 2 since its start)", "cold start)", "cold start)"]


def test_the_code_is_replaced_after_so_many_labels(make: Make, tmp_path: Path) -> None:
    oracle = make(restart_every=2)
    warm = ["warm" in label(oracle, moved(0.01 * i)).evidence for i in range(5)]
    assert warm == [False, True, False, True, False]
    assert len(list(tmp_path.glob("socket-session-*"))) == 1


def test_only_the_last_failures_are_kept(make: Make, tmp_path: Path) -> None:
    oracle = make("failed")
    folders = []
    for i in range(5):
        with pytest.raises(SCFNotConverged) as caught:
            label(oracle, moved(0.01 * i))
        folders.append(Path(re.search(r"the end of (\S+)/log:", str(caught.value))[1]))
    assert set(tmp_path.glob("socket-session-*")) == set(folders[-3:])


def test_folders_of_a_killed_driver_are_cleared_away_and_nothing_else(make: Make, tmp_path: Path) -> None:
    names = [f"socket-session-{2**22 + 1}-{i}" for i in range(5)]  # beyond the largest process id of Linux
    kept = ["socket-session-mine", f"socket-session-{os.getpid()}-x", "other"]
    for i, name in enumerate([*names, *kept]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (i, i))
    oracle = make()
    label(oracle, WATER)
    oracle.close()  # type: ignore[attr-defined]
    assert {p.name for p in tmp_path.iterdir()} == {*names[2:], *kept}


def test_tcp_works_as_unix_sockets_do(make: Make) -> None:
    oracle = make(command=f"{sys.executable} spring.py inet:{{host}}:{{port}} ok", transport="inet")
    assert label(oracle, WATER).energy == pytest.approx(expected(WATER)[0], rel=1e-12)


def test_a_net_force_is_taken_off_only_where_it_was_allowed_and_is_small(make: Make) -> None:
    with pytest.raises(OracleInconsistent, match="add up to"):
        label(make("push"), WATER)
    balanced = label(make("push", net_force="0.1 eV/A"), WATER)
    np.testing.assert_allclose(balanced.forces, expected(WATER)[1], atol=1e-12)
    with pytest.raises(OracleInconsistent, match=r"more than net_force = 0\.02"):
        label(make("push", net_force="0.02 eV/A"), WATER)


def test_the_stress_is_the_virial_over_the_volume(make: Make) -> None:
    frame = replace(WATER, cell=CUBE)
    result = label(make(periodic=True, stress=True), frame)
    virial = np.einsum("ai,aj->ij", expected(frame)[1], frame.positions[0])
    np.testing.assert_allclose(result.stress, -virial / 512.0, atol=1e-13)


def test_a_virial_of_zeros_is_no_stress(make: Make) -> None:
    atom = Frames(np.array([8]), np.zeros((1, 1, 3)), CUBE)
    with pytest.raises(OracleInconsistent, match="virial of zeros"):
        label(make(periodic=True, stress=True), atom)


def test_another_version_is_noticed(make: Make) -> None:
    assert label(make(version=r"log: Spring (\S+)"), WATER).code == "Spring 1.0"
    with pytest.raises(OracleConfigError, match=r"code = 'Spring 2', but its log says '1\.0'"):
        label(make(code="Spring 2", version=r"log: Spring (\S+)"), WATER)
    with pytest.raises(OracleConfigError, match="no line of log matches"):
        label(make(version=r"log: Autumn (\S+)"), WATER)


@pytest.mark.parametrize("how", ["worker killed", "executor shut down", "driver killed"])
def test_nothing_is_left_of_a_code_when_its_worker_is_killed(tmp_path: Path, how: str) -> None:
    """The code has a child in a session of its own, which ignores SIGTERM."""
    prefix = f"/tmp/bnn_{uuid.uuid4().hex[:8]}_"
    if how == "driver killed":
        driver = os.fork()
        if driver == 0:
            try:
                _executor(tmp_path, prefix).submit(WATER).result(200)
                time.sleep(1000)
            finally:
                os._exit(1)
        assert wait_until(lambda: bool(list(tmp_path.glob("spool/done/*.json"))), 200.0)
        os.kill(driver, signal.SIGKILL)
        os.waitpid(driver, 0)
    else:
        executor = _executor(tmp_path, prefix)
        executor.submit(WATER).result(200)
        workers = [p for p in left(tmp_path) if "bnn_driver.oracle_worker" in p.cmdline()]
        assert len(workers) == 1
        assert len(left(tmp_path)) == 4  # the worker, the guard, the code and its child
        if how == "worker killed":
            workers[0].kill()
        else:
            executor.shutdown(wait=False)
    child = int(next(tmp_path.glob("work/*/socket-session-*/child")).read_text())
    assert wait_until(lambda: not left(tmp_path))
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert not list(Path("/tmp").glob(Path(prefix).name + "*"))
    if how == "worker killed":
        assert executor.submit(moved(0.1)).result(200).evidence.endswith("(cold start)")
        executor.shutdown(wait=False)
        assert wait_until(lambda: not left(tmp_path))


def _executor(folder: Path, prefix: str) -> LocalExecutor:
    return LocalExecutor("socket", scripted("zombie", socket_prefix=prefix), 1, 200.0, folder / "work", 1, folder / "spool")
