"""A code that is run once per label leaves no process and no false trust behind, however it or its parent ends."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from bnn_driver.errors import EnvironmentProblem, OracleConfigError, OracleInconsistent
from bnn_driver.records import Frames
from oracles.one_shot import program, run, work_folder
from oracles.restart import Restart
from oracles.scrutiny import check_geometry, check_version, last_words

PAIR = Frames(np.array([8, 1]), np.array([[[0.1, 0.2, 0.3], [1.1, 0.2, 0.3]]]))
BOXED = Frames(PAIR.numbers, PAIR.positions, np.array([[[4.0, 0.3, 0.0], [0.0, 4.2, 0.1], [-0.2, 0.0, 4.4]]]))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_how_a_run_ended_is_told(tmp_path: Path) -> None:
    assert run("code", python("raise SystemExit(5)"), tmp_path, "out.txt") == "exit status 5"


def test_output_and_errors_go_to_files_and_input_is_empty(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd(), repr(sys.stdin.read())); sys.stderr.write('alas')"
    run("code", python(code), tmp_path, "out.txt")
    assert (tmp_path / "out.txt").read_text() == f"{tmp_path} ''\n"
    assert "the end of" in last_words(tmp_path, "out.txt")
    assert last_words(tmp_path, "out.txt").endswith("    alas")


def test_parsls_prefix_stands_for_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARSL_MPI_PREFIX", "env ranks='a b'")
    words = program("code", f"$PARSL_MPI_PREFIX {sys.executable} -c 'import os; print(os.environ[\"ranks\"])'")
    assert words[:3] == ["env", "ranks=a b", sys.executable]
    run("code", words, tmp_path, "out.txt")
    assert (tmp_path / "out.txt").read_text() == "a b\n"


def test_parsls_prefix_is_never_dropped_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARSL_MPI_PREFIX", raising=False)
    words = program("code", f"$PARSL_MPI_PREFIX {sys.executable}")  # the driver can check the program
    with pytest.raises(OracleConfigError, match=r"only \[executor.mpi\] gives a meaning"):
        run("code", words, tmp_path, "out.txt")
    with pytest.raises(EnvironmentProblem, match="no program here"):
        program("code", "$PARSL_MPI_PREFIX no-such-program")
    with pytest.raises(OracleConfigError, match="no program after"):
        program("code", "$PARSL_MPI_PREFIX")


def test_no_shell_sees_the_command(tmp_path: Path) -> None:
    words = program("code", f"{sys.executable} -c 'import sys; print(sys.argv[1:])' '$HOME' '*' ';' 'a b'")
    run("code", words, tmp_path, "out.txt")
    assert (tmp_path / "out.txt").read_text() == "['$HOME', '*', ';', 'a b']\n"


def test_a_file_that_is_no_program_is_an_environment_problem(tmp_path: Path) -> None:
    broken = tmp_path / "aims.x"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    with pytest.raises(EnvironmentProblem, match="cannot be run"):
        run("code", program("code", str(broken)), tmp_path, "out.txt")
    broken.chmod(0o644)
    with pytest.raises(EnvironmentProblem, match="no program here"):
        program("code", str(broken))
    with pytest.raises(OracleConfigError, match="split into words"):
        program("code", "aims.x 'unfinished")


def test_every_work_folder_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        with work_folder("aims-0123", "all") as folder:
            assert list(folder.iterdir()) == []
            (folder / "geometry.in").touch()
            names.append(folder.name)
    assert names == ["aims-0123", "aims-0123.2", "aims-0123.3"]


def test_printed_digits_explain_no_more_than_they_should() -> None:
    positions = PAIR.positions[0] + 0.9e-8
    check_geometry("code", PAIR, PAIR.numbers, positions, None, 1e-8, 1e-8)
    with pytest.raises(
        OracleInconsistent, match=r"atom 0 \(O\) is 1\.1e-08 Å away .* more than the printed digits explain \(1e-08 Å\)"
    ):
        check_geometry("code", PAIR, PAIR.numbers, PAIR.positions[0] + np.array([[1.1e-8, 0, 0], [0, 0, 0]]), None, 1e-8, 1e-8)
    with pytest.raises(OracleInconsistent, match=r"atom 1 \(H\) is nan"):
        check_geometry("code", PAIR, PAIR.numbers, PAIR.positions[0] + np.array([[0, 0, 0], [np.nan, 0, 0]]), None, 1e-8, 1e-8)


def test_atoms_may_be_printed_in_another_cell_of_the_same_lattice() -> None:
    cell = BOXED.cell[0]
    folded = BOXED.positions[0] + np.array([[1, 0, -1], [0, 2, 0]]) @ cell
    check_geometry("code", BOXED, BOXED.numbers, folded, cell, 1e-8, 1e-8)
    with pytest.raises(OracleInconsistent, match="another cell"):
        check_geometry("code", BOXED, BOXED.numbers, folded, cell.T, 1e-8, 1e-8)
    with pytest.raises(OracleInconsistent, match="computed a molecule"):
        check_geometry("code", BOXED, BOXED.numbers, folded, None, 1e-8, 1e-8)
    with pytest.raises(OracleInconsistent, match="computed H O, but O H was asked for"):
        check_geometry("code", BOXED, BOXED.numbers[::-1], folded, cell, 1e-8, 1e-8)


def test_a_version_may_say_more_than_the_user_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_version("vasp", "f" * 64, "6.4.2", "6.4.2 20Jul23")
    for seen in ("6.4.20 20Jul23", "6.4", ""):
        with pytest.raises(OracleInconsistent, match=r'version = "6\.4\.2"'):
            check_version("vasp", "f" * 64, "6.4.2", seen)
    assert list(tmp_path.iterdir()) == []


def test_the_first_version_is_remembered_for_each_level_of_theory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_version("vasp", "a" * 64, "", "6.3.0")
    check_version("vasp", "a" * 64, "", "6.3.0")
    check_version("vasp", "b" * 64, "", "6.4.2")
    with pytest.raises(OracleInconsistent, match=r'"6\.4\.2", but earlier labels came from "6\.3\.0"'):
        check_version("vasp", "a" * 64, "", "6.4.2")


def test_files_to_start_from_fit_the_same_atoms_and_settings_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    (work / "WAVECAR").write_text("psi")
    mine = Restart("vasp", "a" * 64, PAIR, ("WAVECAR",))
    assert mine.origin == ""
    mine.take(work, "label-1")
    assert mine.origin == "label-1"
    moved = Frames(PAIR.numbers, PAIR.positions + 1.0)
    assert Restart("vasp", "a" * 64, moved, ("WAVECAR",)).origin == "label-1"
    others = [Frames(PAIR.numbers[::-1], PAIR.positions), Frames(PAIR.numbers, PAIR.positions, charge=1), BOXED]
    assert {Restart("vasp", "a" * 64, other, ("WAVECAR",)).origin for other in others} == {""}
    assert Restart("vasp", "b" * 64, PAIR, ("WAVECAR",)).origin == ""
    target = tmp_path / "next"
    target.mkdir()
    mine.lend(target)
    assert (target / "WAVECAR").read_text() == "psi"
    mine.forget()
    assert mine.origin == ""
