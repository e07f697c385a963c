"""Real codes behind real i-PI clients: exact derivatives, cold and warm alike, and nothing of an SCF that did not converge.

Debian: apt-get install cp2k nwchem-openmpi abinit abinit-data quantum-espresso
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ase.test
import numpy as np
import pytest
from ase.io import read

from bnn_driver.errors import OracleConfigError, OracleCrashed, OracleInconsistent, SCFNotConverged
from bnn_driver.oracle import Oracle, fingerprint, label, load_oracle
from bnn_driver.records import Frames

INPUTS = Path(__file__).with_name("inputs")
WATER = Frames(np.array([8, 1, 1]), np.array([[[0.05, -0.02, 0.03], [0.98, 0.07, -0.04], [-0.31, 0.90, 0.11]]]))
CRYSTAL = replace(WATER, cell=np.array([[[4.6, 0.3, -0.2], [0.1, 4.4, 0.4], [-0.3, 0.2, 4.9]]]))


@dataclass(frozen=True)
class Code:
    """A code, its input, and how exact it is."""

    program: str
    folder: str
    spoil: tuple[str, str]
    """Text of the input and what replaces it, so that no SCF can converge."""
    warm_error: float
    """eV and eV/Å, between a cold and a warm start."""
    version: str
    """What finds the version in its log; any version is tested."""
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self, folder: Path | None = None, /, **changes: Any) -> Oracle:
        if shutil.which(self.program) is None:
            pytest.skip(f"the program {self.program} is not installed (see the head of this file)")
        limits = {"connect_timeout": "60 s", "frame_timeout": "2 min"}
        return load_oracle("socket", limits | {"folder": str(folder or INPUTS / self.folder)} | self.settings | changes)


CP2K = Code(
    "cp2k.psmp", "cp2k", ("MAX_SCF 50", "MAX_SCF 2"), 1e-6, r"cp2k.out: CP2K version ([\d.]+)",
    {"command": "cp2k.psmp -i cp2k.inp -o cp2k.out", "code": "CP2K",
     "converged": "cp2k.out: SCF run converged in", "failed": "cp2k.out: SCF run NOT converged", "templates": ["cp2k.inp"],
     "box": "12 A", "periodic": True, "stress": True},
)  # fmt: skip
NWCHEM = Code(
    "nwchem.openmpi", "nwchem", ("maxiter 50", "maxiter 2"), 1e-6, r"stdout.txt: \(NWChem\) (\S+)",
    {"command": "nwchem.openmpi nwchem.nw", "code": "NWChem",
     "converged": r"stdout.txt: Final RHF\s+results", "failed": "stdout.txt: Calculation failed to converge",
     "templates": ["nwchem.nw"], "box": "0 A"},
)  # fmt: skip
ABINIT = Code(
    "abinit", "abinit", ("nstep 40", "nstep 3"), 1e-4, r"run.abo: Version ([\d.]+)",
    {"command": "abinit run.abi --ipi {socket}:UNIX", "code": "ABINIT",
     "converged": "run.abo: At SCF step .* converged", "failed": "run.abo: was not enough SCF cycles to converge",
     "templates": ["run.abi"], "box": "6 A", "periodic": True, "stress": True},
)  # fmt: skip
ESPRESSO = Code(
    "pw.x", "espresso", ("electron_maxstep = 60", "electron_maxstep = 3"), 1e-3, r"stdout.txt: PWSCF v\.(\S+)",
    {"command": "pw.x --ipi {socket}:UNIX -in pw.in", "code": "Quantum ESPRESSO",
     "converged": "stdout.txt: convergence has been achieved", "failed": "stdout.txt: convergence NOT achieved",
     "templates": ["pw.in"], "box": "6 A", "periodic": True, "stress": True},
)  # fmt: skip
Use = Callable[..., Oracle]


@pytest.fixture(params=[CP2K, NWCHEM, ABINIT, ESPRESSO], ids=lambda code: code.folder)
def code(request: pytest.FixtureRequest) -> Code:
    return request.param


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Oracles that run below tmp_path with one thread, and are ended with the test."""
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    made: list[Any] = []

    def one(code: Code, folder: Path | None = None, /, **changes: Any) -> Oracle:
        made.append(code.make(folder, **changes))
        return made[-1]

    yield one
    for oracle in made:
        oracle.close()


def moved(frame: Frames, atom: int, axis: int, distance: float) -> Frames:
    positions = frame.positions.copy()
    positions[0, atom, axis] += distance
    return replace(frame, positions=positions)


def slope(oracle: Oracle, make: Callable[[float], Frames], step: float) -> float:
    return (label(oracle, make(step)).energy - label(oracle, make(-step)).energy) / (2 * step)


@pytest.mark.dft
def test_forces_of_a_molecule_are_slopes(code: Code, use: Use) -> None:
    oracle = use(code)
    forces = label(oracle, WATER).forces
    for atom, axis in ((0, 1), (1, 0)):
        numerical = -slope(oracle, lambda h, a=atom, x=axis: moved(WATER, a, x, h), 0.002)
        assert forces[atom, axis] == pytest.approx(numerical, abs=6e-4)  # 3e-4 was measured: the truncation of the difference


@pytest.mark.dft
def test_a_warm_start_gives_the_label_of_a_cold_one(code: Code, use: Use, record_property: Callable[[str, object], None]) -> None:
    oracle, start = use(code), time.monotonic()
    cold = label(oracle, WATER)
    first = time.monotonic() - start
    label(oracle, moved(WATER, 1, 0, 0.1))
    start = time.monotonic()
    warm = label(oracle, WATER)
    record_property("seconds", f"{code.folder}: cold {first:.2f}, warm {time.monotonic() - start:.2f}")
    assert "cold start" in cold.evidence
    assert "warm, frame 3" in warm.evidence
    assert warm.energy == pytest.approx(cold.energy, abs=code.warm_error)
    np.testing.assert_allclose(warm.forces, cold.forces, atol=code.warm_error)


@pytest.mark.dft
def test_an_scf_that_does_not_converge_is_no_label(code: Code, use: Use, tmp_path: Path) -> None:
    """CP2K and ABINIT send its forces all the same, NWChem prints "Final RHF results" and then dies."""
    shutil.copytree(INPUTS / code.folder, tmp_path / "spoilt")
    for file in (tmp_path / "spoilt").iterdir():
        file.write_text(file.read_text().replace(*code.spoil))
    oracle = use(code, tmp_path / "spoilt")
    assert fingerprint(oracle) != fingerprint(use(code))
    with pytest.raises(SCFNotConverged):
        label(oracle, WATER)


@pytest.mark.dft
def test_the_version_in_its_log_is_compared(code: Code, use: Use) -> None:
    with pytest.raises(
        OracleConfigError, match=r"code = 'no code', but its log says '\d+\.\d.*give name and version as they are"
    ):
        label(use(code, code="no code", version=code.version), WATER)


@pytest.mark.dft
@pytest.mark.parametrize("code", [CP2K, ABINIT], ids=lambda code: code.folder)
def test_without_the_mark_of_failure_the_missing_mark_of_success_is_enough(code: Code, use: Use, tmp_path: Path) -> None:
    shutil.copytree(INPUTS / code.folder, tmp_path / "spoilt")
    for file in (tmp_path / "spoilt").iterdir():
        file.write_text(file.read_text().replace(*code.spoil))
    with pytest.raises(OracleInconsistent, match="0 of 1 lines"):
        label(use(code, tmp_path / "spoilt", failed="", evidence_timeout="2 s"), WATER)


@pytest.mark.dft
def test_stress_and_forces_in_a_triclinic_cell_are_slopes(use: Use) -> None:
    oracle = use(CP2K)
    result = label(oracle, CRYSTAL)
    volume = abs(np.linalg.det(CRYSTAL.cell[0]))
    assert result.forces[1, 0] == pytest.approx(-slope(oracle, lambda h: moved(CRYSTAL, 1, 0, h), 0.002), abs=6e-4)
    for i, j in ((0, 0), (1, 2)):

        def strained(h: float, i: int = i, j: int = j) -> Frames:
            deformation = np.eye(3)
            deformation[i, j] += h
            return replace(CRYSTAL, positions=CRYSTAL.positions @ deformation.T, cell=CRYSTAL.cell @ deformation.T)

        assert result.stress[i, j] == pytest.approx(slope(oracle, strained, 0.002) / volume, abs=2e-5)


@pytest.mark.dft
def test_the_charge_reaches_the_code(use: Use) -> None:
    hydroxide = Frames(np.array([8, 1]), WATER.positions[:, :2], charge=-1)
    oracle = use(NWCHEM)
    label(oracle, WATER)
    # HF/STO-3G of OH- at its bond length here; the neutral radical has one electron less and is refused by `rhf`
    assert label(oracle, hydroxide).energy == pytest.approx(-2012.6, abs=5.0)
    with pytest.raises((OracleCrashed, SCFNotConverged)):
        label(oracle, replace(hydroxide, charge=0))


AIMS = Path(ase.test.__file__).parent / "testdata" / "aims" / "socket.out"


@pytest.fixture
def aims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Oracle]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inputs").mkdir()
    shutil.copy(INPUTS / "aims_replay.py", tmp_path / "inputs")
    oracle: Any = load_oracle(
        "socket",
        {
            "command": f"{sys.executable} aims_replay.py unix:{{path}} {AIMS}",
            "folder": str(tmp_path / "inputs"),
            "code": "FHI-aims 200112.2",
            "converged": r"stdout.txt: Self-consistency cycle converged\.",
            "species": "OH2",
            "box": "0 A",
            "net_force": "1e-2 eV/A",
        },
    )
    yield oracle
    oracle.close()


def test_a_recorded_run_of_aims_is_labelled_frame_by_frame(aims: Oracle) -> None:
    """The log and the results are authentic (six frames, from ASE's test data); the messages are sent by a replay."""
    recorded = read(AIMS, ":", format="aims-output")
    assert len(recorded) == 6
    for atoms in recorded:
        result = label(aims, Frames(atoms.numbers, atoms.positions[None]))
        assert result.energy == pytest.approx(atoms.get_potential_energy(), rel=1e-12)
        np.testing.assert_allclose(result.forces, atoms.get_forces() - atoms.get_forces().mean(axis=0), atol=1e-9)
    assert result.evidence == "stdout.txt: Self-consistency cycle converged. (warm, frame 6 since its start)"


def test_the_replay_of_aims_refuses_another_structure(aims: Oracle) -> None:
    atoms = read(AIMS, "1", format="aims-output")
    with pytest.raises(OracleCrashed, match=r"(?s)exit status 1.*these positions came"):
        label(aims, Frames(atoms.numbers, atoms.positions[None] + np.array([[[0.0, 0, 0], [0.01, 0, 0], [0, 0, 0]]])))


@pytest.mark.parametrize("changes", [{}, {"charge": 1, "multiplicity": 2}])
def test_tight_binding_behind_a_socket_is_the_one_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]
) -> None:
    pytest.importorskip("tblite")
    monkeypatch.chdir(tmp_path)
    oracle: Any = tblite()
    try:
        frame = replace(WATER, **changes)
        ours, theirs = label(load_oracle("tblite", {}), frame), label(oracle, frame)
        # both stop at tblite's accuracy 0.1; bohr and hartree differ in the tenth digit
        assert theirs.energy == pytest.approx(ours.energy, abs=1e-5)
        np.testing.assert_allclose(theirs.forces, ours.forces, atol=1e-5)
    finally:
        oracle.close()


def tblite(**changes: Any) -> Oracle:
    """GFN2-xTB behind ASE's SocketClient."""
    return load_oracle(
        "socket",
        {
            "command": f"{sys.executable} client.py {{socket}}",
            "folder": str(INPUTS / "tblite"),
            "code": "socket tblite",
            "converged": "stdout.txt: charges converged",
            "templates": ["settings.json", "start.xyz"],
            "environment": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            "box": "0 A",
            "periodic": True,
            "stress": True,
        }
        | changes,
    )
