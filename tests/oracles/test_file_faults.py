"""FHI-aims and VASP as processes, run once per label or kept running: every fault of a stand-in is an error that says what happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from scripted_code import left, wait_until
from stand_ins.inputs import INCAR, aims_command, aims_folder, vasp_command, vasp_folder, water

from bnn_driver.errors import OracleCrashed, OracleError, OracleInconsistent, OracleTimeout, SCFNotConverged
from bnn_driver.executors import LocalExecutor
from bnn_driver.oracle import Oracle, label, load_oracle, read_failures
from bnn_driver.records import Frames
from oracles import aims_session, vasp_session

CELL = np.array([[[5.0, 0.1, 0.0], [0.0, 5.2, -0.3], [0.2, 0.0, 4.9]]])


@dataclass(frozen=True)
class Code:
    """One code and how it is run."""

    kind: str
    session: str
    """Value of the key."""
    output: str
    """The file that a failure quotes."""
    rung: dict[str, Any]
    rescue: str
    """What the stand-in needs to converge: the rung, in the words of the code."""
    files: frozenset[str]
    """In the folder of a failure."""

    @property
    def frame(self) -> Frames:
        numbers, positions = water()
        return Frames(numbers, positions[None] + 0.3, CELL if self.kind == "vasp" else None)

    def settings(self, folder: Path, *options: str, **changes: Any) -> dict[str, Any]:
        """Of the stand-in that computes any structure; the input goes to a folder."""
        aims = self.kind == "aims"
        command = (aims_command if aims else vasp_command)("compute", *options)
        inputs = aims_folder(folder) if aims else vasp_folder(folder, INCAR + "ISYM = 0\n")
        return {"command": command, "folder": str(inputs), "session": self.session} | changes


AIMS_FILES = frozenset({"control.in", "geometry.in", "aims.out", "stderr.txt"})
VASP_FILES = frozenset({"INCAR", "KPOINTS", "POTCAR", "POSCAR", "OUTCAR", "vasp.out", "stderr.txt"})
MIXING, ALGO = {"charge_mix_param": 0.02}, {"algo": "All"}
CODES = {
    "aims": Code("aims", "file", "aims.out", MIXING, "charge_mix_param 0.02", AIMS_FILES),
    "aims-socket": Code("aims", "socket", "aims.out", MIXING, "charge_mix_param 0.02", AIMS_FILES),
    "vasp": Code("vasp", "file", "OUTCAR", ALGO, "ALGO All", VASP_FILES | {"vasprun.xml"}),
    "vasp-interactive": Code("vasp", "interactive", "OUTCAR", ALGO, "ALGO All", VASP_FILES),
}
AIMS_STOPS, AIMS_SILENT = "says that its SCF did not converge", "without saying 'Self-consistency cycle converged.'"
VASP_STOPS = r"VASP says 'aborting loop EDIFF was not reached \(unconverged\)'"
VASP_SILENT, BROKEN = "does not say why the electronic loop ended", "broke down: 'Error EDDDAV'"
SEVERE, KILLED = r"\(exit status 174\)[\s\S]*stderr\.txt:\n\s+forrtl: severe", r"\(signal SIGKILL\)"
ORDER, MOVED, STARS = "computed H . ., but O H H was asked for", r"atom \d \([OH]\) is .* Å away", r"printed '.*\*+"
ELECTRONS, TOTEN = r"ran with 1\.0+ electrons, expected 8", r"OUTCAR says TOTEN = .*77\d* eV, but "
#: code, what goes wrong in the stand-in, which error it must be, and what the message must say
FAULTS: list[tuple[str, str, type[OracleError], str]] = [
    ("aims", "unconverged", SCFNotConverged, AIMS_STOPS),
    ("aims", "unconverged-farewell", SCFNotConverged, AIMS_STOPS),
    ("aims", "silent", SCFNotConverged, AIMS_SILENT),
    ("aims", "truncated", OracleCrashed, r"ends before 'Have a nice day\.' \(exit status 0\)"),
    ("aims", "exit", OracleCrashed, SEVERE),
    ("aims", "signal", OracleCrashed, KILLED),
    ("aims", "order", OracleInconsistent, ORDER),
    ("aims", "moved", OracleInconsistent, MOVED),
    ("aims", "nan", OracleInconsistent, "not finite"),
    ("aims", "stars", OracleInconsistent, STARS),
    ("aims", "twice", OracleInconsistent, "converged 2 structures"),
    ("aims-socket", "unconverged", SCFNotConverged, AIMS_STOPS),
    ("aims-socket", "silent", SCFNotConverged, AIMS_SILENT),
    ("aims-socket", "unwritten", OracleInconsistent, r"its log has not all of the frame[\s\S]*session = \"file\""),
    ("aims-socket", "exit", OracleCrashed, SEVERE),
    ("aims-socket", "signal", OracleCrashed, KILLED),
    ("aims-socket", "order", OracleInconsistent, ORDER),
    ("aims-socket", "moved", OracleInconsistent, MOVED),
    ("aims-socket", "nan", OracleInconsistent, "sent other forces than it printed"),
    ("aims-socket", "sent-nan", OracleInconsistent, "not finite"),
    ("aims-socket", "other-forces", OracleInconsistent, "sent other forces than it printed"),
    ("aims-socket", "stars", OracleInconsistent, STARS),
    ("aims-socket", "twice", OracleInconsistent, "converged 2 structures"),
    ("vasp", "unconverged", SCFNotConverged, VASP_STOPS),
    ("vasp", "all-steps", SCFNotConverged, r"used all of its 9 electronic steps \(NELM\)"),
    ("vasp", "broken-minimiser", SCFNotConverged, BROKEN),
    ("vasp", "no-reason", OracleInconsistent, VASP_SILENT),
    ("vasp", "truncated", OracleCrashed, r"OUTCAR of VASP ends before .* \(exit status 0\)"),
    ("vasp", "truncated-xml", OracleCrashed, r"vasprun\.xml of VASP is not complete"),
    ("vasp", "exit", OracleCrashed, SEVERE),
    ("vasp", "signal", OracleCrashed, KILLED),
    ("vasp", "order", OracleInconsistent, ORDER),
    ("vasp", "moved", OracleInconsistent, MOVED),
    ("vasp", "nan", OracleInconsistent, "not finite"),
    ("vasp", "stars", OracleInconsistent, STARS),
    ("vasp", "twice", OracleInconsistent, "has 2 calculations"),
    ("vasp", "other-energy", OracleInconsistent, TOTEN + r"vasprun\.xml e_fr_energy"),
    ("vasp", "electrons", OracleInconsistent, ELECTRONS),
    ("vasp-interactive", "unconverged", SCFNotConverged, VASP_STOPS),
    ("vasp-interactive", "all-steps", SCFNotConverged, r"used all of its 60 electronic steps \(NELM\)"),
    ("vasp-interactive", "broken-minimiser", SCFNotConverged, BROKEN),
    ("vasp-interactive", "no-reason", OracleInconsistent, VASP_SILENT),
    ("vasp-interactive", "unwritten", OracleInconsistent, r"OUTCAR has not all of the frame[\s\S]*session = \"file\""),
    ("vasp-interactive", "exit", OracleCrashed, SEVERE),
    ("vasp-interactive", "signal", OracleCrashed, KILLED),
    ("vasp-interactive", "order", OracleInconsistent, ORDER),
    ("vasp-interactive", "moved", OracleInconsistent, MOVED),
    ("vasp-interactive", "nan", OracleInconsistent, "other forces on standard output than in OUTCAR"),
    ("vasp-interactive", "other-forces", OracleInconsistent, "other forces on standard output than in OUTCAR"),
    ("vasp-interactive", "stars", OracleInconsistent, STARS),
    ("vasp-interactive", "twice", OracleInconsistent, "something else moves the atoms"),
    ("vasp-interactive", "other-energy", OracleInconsistent, TOTEN + "standard output F="),
    ("vasp-interactive", "electrons", OracleInconsistent, ELECTRONS),
    ("vasp-interactive", "lattice", OracleInconsistent, r"asks for a lattice too; set \[oracle.vasp\] session = \"file\""),
]


class Bench:
    """Oracles of the stand-ins, which run below a folder and are ended with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, list[Any]()

    def make(self, code: Code, *options: str, **changes: Any) -> Oracle:
        self.made.append(load_oracle(code.kind, code.settings(self.folder / "inputs", *options, **changes)))
        return self.made[-1]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    for module in (aims_session, vasp_session):
        monkeypatch.setattr(module, "LOG_SECONDS", 1.0)
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "worker")
    used = Bench(tmp_path)
    yield used
    for oracle in used.made:
        oracle.close()
    assert wait_until(lambda: not left(tmp_path), 15.0), "processes were left behind"


@pytest.fixture(params=CODES.values(), ids=CODES.keys())
def code(request: pytest.FixtureRequest) -> Code:
    return request.param


def work_folders() -> list[Path]:
    return [path for path in Path.cwd().iterdir() if path.is_dir()]


@pytest.mark.parametrize(("name", "fault", "error", "said"), FAULTS, ids=[f"{name}-{fault}" for name, fault, *_ in FAULTS])
def test_every_fault_is_an_error_that_says_what_happened(
    bench: Bench, name: str, fault: str, error: type[OracleError], said: str
) -> None:
    with pytest.raises(error, match=said):
        label(bench.make(CODES[name], "--fault", fault), CODES[name].frame)


def test_a_failure_keeps_its_folder_and_quotes_the_end_of_the_output(bench: Bench, code: Code) -> None:
    with pytest.raises(SCFNotConverged) as caught:
        label(bench.make(code, "--fault", "unconverged"), code.frame)
    (folder,) = work_folders()
    assert f"the end of {folder}/{code.output}:" in str(caught.value)
    assert {path.name for path in folder.iterdir()} == code.files


@pytest.mark.parametrize("name", ["aims", "vasp"])
def test_a_complete_output_counts_whatever_the_launcher_returns(bench: Bench, name: str) -> None:
    assert label(bench.make(CODES[name], "--fault", "late"), CODES[name].frame).evidence.endswith("; exit status 3")


def test_the_ladder_is_climbed_by_runs_of_their_own(bench: Bench, code: Code) -> None:
    oracle = bench.make(code, "--converges-with", code.rescue, ladder=[code.rung], keep_files="all")
    result = label(oracle, code.frame)
    assert result.rung == 1
    assert result.fingerprint == label(bench.make(code), code.frame).fingerprint
    assert "start" not in result.evidence
    assert f"{code.kind}-{result.frame_id[:12]}-rung1" in {path.name for path in work_folders()}


def test_a_changed_binary_is_noticed(bench: Bench, code: Code) -> None:
    old, new = ("221103", "240507") if code.kind == "aims" else ("6.3.0", "6.4.2")
    label(bench.make(code), code.frame)
    label(bench.make(code), replace(code.frame, positions=code.frame.positions + 0.5))
    with pytest.raises(OracleInconsistent, match=f'version "{new} [^"]+", but earlier labels came from "{old} '):
        label(bench.make(code, "--version", new), code.frame)


@pytest.mark.parametrize("name", ["aims", "vasp"])
def test_densities_are_reused_only_when_asked_and_the_label_says_so(bench: Bench, name: str) -> None:
    code = CODES[name]
    warm = bench.make(code, restart=True)
    first, second = label(warm, code.frame), label(warm, replace(code.frame, positions=code.frame.positions + 0.1))
    assert "started from" not in first.evidence
    assert second.evidence.endswith(f"started from the density of label {first.frame_id}")
    assert first.fingerprint == label(bench.make(code), code.frame).fingerprint
    # other atoms, and a label without restart, start cold
    swapped = replace(code.frame, numbers=code.frame.numbers[[1, 0, 2]], positions=code.frame.positions[:, [1, 0, 2]])
    for oracle, frame in ((warm, swapped), (bench.make(code), code.frame)):
        assert "started from" not in label(oracle, frame).evidence


def test_a_hanging_run_is_killed_with_all_its_ranks(tmp_path: Path, code: Code) -> None:
    settings = code.settings(tmp_path / "inputs", "--fault", "hang")
    with LocalExecutor(code.kind, settings, 1, 4.0, tmp_path / "work", 1, tmp_path / "spool") as executor:
        with pytest.raises(OracleTimeout, match="killed after 8 s"):
            executor.submit(code.frame).result()
        files = list((tmp_path / "work").glob(f"worker-0/{code.kind}-*/pids"))
        assert files
        pids = [int(word) for file in files for word in file.read_text().split()]
        assert wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 10.0)
    (failure,) = read_failures(tmp_path / "spool").values()
    assert failure["class"] == "OracleTimeout"
