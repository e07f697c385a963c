"""FHI-aims and VASP kept running: one start for many frames, a new one where it has to be, and the labels of single runs."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.io import read
from scripted_code import left, wait_until
from stand_ins.inputs import INCAR, RECORDED, vasp_folder
from test_file_faults import CODES, Bench, Code, bench, work_folders  # noqa: F401

from bnn_driver.errors import OracleConfigError, OracleCrashed, SCFNotConverged
from bnn_driver.executors import LocalExecutor
from bnn_driver.oracle import fingerprint, label, load_oracle
from bnn_driver.records import Frames

CRYSTAL = np.array([[[5.0, 0.1, 0.0], [0.0, 5.2, -0.3], [0.2, 0.0, 4.9]]])
SINGLE = {"aims-socket": CODES["aims"], "vasp-interactive": CODES["vasp"]}


@pytest.fixture(params=SINGLE)
def code(request: pytest.FixtureRequest) -> Code:
    return CODES[request.param]


@pytest.fixture
def single(code: Code) -> Code:
    return CODES[code.kind]


def moved(frame: Frames, distance: float) -> Frames:
    positions = frame.positions.copy()
    positions[0, 1, 0] += distance
    return replace(frame, positions=positions)


def start_of(evidence: str) -> str:
    return evidence.rpartition("; ")[2]


def test_a_recorded_run_of_aims_comes_back_to_the_last_digit(bench: Bench) -> None:  # noqa: F811
    """Six authentic frames: their numbers and words are those of the log, in the hartree of FHI-aims."""
    log = RECORDED / "aims" / "socket.out"
    settings = CODES["aims-socket"].settings(bench.folder / "inputs")
    settings["command"][2] = "replay"
    bench.made.append(load_oracle("aims", settings))
    recorded = read(log, ":", format="aims-output")
    assert len(recorded) == 6
    for number, atoms in enumerate(recorded, 1):
        result = label(bench.made[-1], Frames(atoms.numbers, atoms.positions[None]))
        assert result.energy == atoms.get_potential_energy()
        np.testing.assert_array_equal(result.forces, atoms.get_forces())
        assert start_of(result.evidence) == ("cold start" if number == 1 else f"warm, frame {number} since its start")
    with pytest.raises(OracleCrashed, match=r"exit status 1\)[\s\S]*stand-in: position"):
        label(bench.made[-1], Frames(atoms.numbers, atoms.positions[None] + 0.1))


def test_a_session_gives_the_labels_of_single_runs(bench: Bench, code: Code, single: Code) -> None:  # noqa: F811
    oracle, other = bench.make(code), bench.make(single)
    assert fingerprint(oracle) == fingerprint(other)
    for number in range(3):
        frame = moved(code.frame, 0.1 * number)
        mine, theirs = label(oracle, frame), label(other, frame)
        # positions in bohr, and forces with seven decimals
        assert mine.energy == pytest.approx(theirs.energy, abs=3e-8)
        np.testing.assert_allclose(mine.forces, theirs.forces, rtol=0, atol=1e-7)
        assert (mine.frame_id, mine.code, mine.fingerprint) == (theirs.frame_id, theirs.code, theirs.fingerprint)
        assert start_of(mine.evidence) == ("cold start" if number == 0 else f"warm, frame {number + 1} since its start")
    assert len(work_folders()) == 1


def test_atoms_of_vasp_keep_their_order_from_frame_to_frame(bench: Bench) -> None:  # noqa: F811
    code = CODES["vasp-interactive"]
    order = np.array([1, 0, 2])
    shuffled = replace(code.frame, numbers=code.frame.numbers[order], positions=code.frame.positions[:, order])
    oracle, other = bench.make(code), bench.make(CODES["vasp"])
    for number in range(2):
        frame = moved(shuffled, 0.05 * number)
        np.testing.assert_allclose(label(oracle, frame).forces, label(other, frame).forces, rtol=0, atol=1e-7)


def test_charge_spin_and_stress_reach_a_running_aims(bench: Bench, tmp_path: Path) -> None:  # noqa: F811
    code = CODES["aims-socket"]
    wanted = ("charge 1", "spin collinear", "fixed_spin_moment 1", "compute_analytical_stress .true.", "k_grid 2 2 2")
    options = [word for wish in wanted for word in ("--require", wish)]
    ion = replace(code.frame, cell=CRYSTAL, charge=1, multiplicity=2)
    oracle, other = (bench.make(c, *options, stress=True) for c in (code, CODES["aims"]))
    control = tmp_path / "inputs" / "control.in"
    control.write_text("k_grid 2 2 2\n" + control.read_text())
    mine, theirs = label(oracle, ion), label(other, ion)
    np.testing.assert_allclose(mine.stress, theirs.stress, rtol=0, atol=1e-8)
    assert np.abs(mine.stress).max() > 1e-3


def test_another_kind_of_frame_needs_a_fresh_start(bench: Bench, code: Code) -> None:  # noqa: F811
    oracle, frame = bench.make(code), code.frame
    others = [
        replace(frame, charge=1, multiplicity=2),
        replace(frame, multiplicity=3),
        replace(frame, numbers=frame.numbers[[1, 0, 2]], positions=frame.positions[:, [1, 0, 2]]),
    ]
    if frame.cell is not None:
        others.append(replace(frame, cell=frame.cell * 1.001))
    for other in others:
        label(oracle, frame)
        assert start_of(label(oracle, other).evidence) == "cold start"
        assert start_of(label(oracle, moved(other, 0.01)).evidence) == "warm, frame 2 since its start"
    assert len(work_folders()) == 1


def test_the_code_is_replaced_after_so_many_labels(bench: Bench, code: Code) -> None:  # noqa: F811
    oracle = bench.make(code, restart_every=2)
    starts = [start_of(label(oracle, moved(code.frame, 0.01 * i)).evidence)[:4] for i in range(5)]
    assert starts == ["cold", "warm", "cold", "warm", "cold"]


def test_a_failure_in_a_later_frame_ends_the_session(bench: Bench, code: Code) -> None:  # noqa: F811
    oracle = bench.make(code, "--fault", "unconverged", "--from", "2")
    label(oracle, code.frame)
    with pytest.raises(SCFNotConverged, match="converge"):
        label(oracle, moved(code.frame, 0.1))
    assert not left(bench.folder)
    assert start_of(label(oracle, moved(code.frame, 0.1)).evidence) == "cold start"


def test_a_code_that_left_between_two_labels_is_started_again(
    bench: Bench,  # noqa: F811
    code: Code,
    caplog: pytest.LogCaptureFixture,
) -> None:
    oracle = bench.make(code, "--fault", "leave")
    label(oracle, code.frame)
    assert wait_until(lambda: not left(bench.folder))
    assert start_of(label(oracle, moved(code.frame, 0.1)).evidence) == "cold start"
    assert "ended between two labels" in caplog.text


def test_the_end_of_the_oracle_is_the_end_of_the_code(bench: Bench, code: Code) -> None:  # noqa: F811
    """It ends by itself, as it was told: with EXIT, or with STOPCAR and the end of its input."""
    oracle: Any = bench.make(code, keep_files="all")
    label(oracle, code.frame)
    oracle.close()
    assert not left(bench.folder)
    (folder,) = work_folders()
    if code.kind == "vasp":
        assert (folder / "STOPCAR").read_text() == "LABORT = .TRUE.\n"
    else:
        assert "Have a nice day." in (folder / "aims.out").read_text()


@pytest.mark.parametrize(("keep", "kept"), [("none", (0, 0)), ("failed", (0, 1)), ("all", (1, 2))])
def test_folders_are_kept_as_asked(bench: Bench, code: Code, keep: str, kept: tuple[int, int]) -> None:  # noqa: F811
    good: Any = bench.make(code, keep_files=keep)
    label(good, code.frame)
    good.close()
    assert len(work_folders()) == kept[0]
    with pytest.raises(SCFNotConverged):
        label(bench.make(code, "--fault", "unconverged", keep_files=keep), code.frame)
    assert len(work_folders()) == kept[1]


def test_a_log_that_comes_late_is_waited_for(bench: Bench) -> None:  # noqa: F811
    code = CODES["aims-socket"]
    assert label(bench.make(code, "--fault", "late"), code.frame).evidence


def test_aims_connects_over_tcp_too(bench: Bench) -> None:  # noqa: F811
    code = CODES["aims-socket"]
    oracle, other = bench.make(code, host="localhost"), bench.make(code)
    mine = label(oracle, code.frame)
    (folder,) = work_folders()
    assert "use_pimd_wrapper localhost " in (folder / "control.in").read_text()
    assert mine.energy == label(other, code.frame).energy


def test_a_running_code_dies_with_its_worker(tmp_path: Path, code: Code) -> None:
    executor = LocalExecutor(code.kind, code.settings(tmp_path / "inputs"), 1, 60.0, tmp_path / "work", 1, tmp_path / "spool")
    try:
        executor.submit(code.frame).result()
        (worker,) = [p for p in left(tmp_path) if "bnn_driver.oracle_worker" in p.cmdline()]
        assert len(left(tmp_path)) == 3  # the worker, the guard and the code
        os.kill(worker.pid, signal.SIGKILL)
        assert wait_until(lambda: not left(tmp_path), 15.0)
        assert start_of(executor.submit(moved(code.frame, 0.1)).result().evidence) == "cold start"
    finally:
        executor.shutdown(wait=False)
    assert wait_until(lambda: not left(tmp_path), 15.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"restart": True}, "restart has no meaning beside session"),
        ({"restart_every": 0}, "restart_every must be positive, got 0"),
        ({"session": "files"}, "session: Input should be 'file' or"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(tmp_path: Path, code: Code, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        load_oracle(code.kind, code.settings(tmp_path / "inputs") | settings)


def test_a_host_belongs_to_a_socket() -> None:
    with pytest.raises(OracleConfigError, match="host has no meaning"):
        load_oracle("aims", {"command": "aims.x", "folder": "x", "host": "node1"})


@pytest.mark.parametrize("line", ["", "ISYM = 2\n"])
def test_vasp_must_not_keep_the_symmetry_of_its_first_frame(tmp_path: Path, line: str) -> None:
    folder = str(vasp_folder(tmp_path / "inputs", INCAR + line))
    code = CODES["vasp-interactive"]
    oracle = load_oracle("vasp", code.settings(tmp_path / "other") | {"folder": folder})
    with pytest.raises(OracleConfigError, match="needs ISYM = 0 or -1"):
        oracle.check(code.frame)
