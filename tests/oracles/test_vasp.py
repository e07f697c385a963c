"""VASP as a process: a stand-in checks the input and answers in the words of the real code, rightly or with every fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.io import read
from stand_ins.inputs import INCAR, RECORDED, contents, potential_folder, vasp_command, vasp_folder, water

from bnn_driver.errors import (
    EnvironmentProblem,
    OracleConfigError,
    OracleCrashed,
    OracleError,
)
from bnn_driver.oracle import Oracle, fingerprint, label, load_oracle
from bnn_driver.records import Frames
from oracles.vasp_output import read_xml

CELL = np.array([[[5.0, 0.1, 0.0], [0.0, 5.2, -0.3], [0.2, 0.0, 4.9]]])


def frame(*order: int) -> Frames:
    """The recorded water of FHI-aims, in a sheared box, its atoms in any order."""
    numbers, positions = water(order or (0, 1, 2))
    return Frames(numbers, positions[None] + 0.3, CELL)


WATER = frame()
Make = Callable[..., Oracle]


@pytest.fixture
def vasp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Oracles whose stand-in computes any structure; the current directory is that of a worker."""
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "worker")

    def make(*options: str, answer: str = "compute", text: str = INCAR, elements: str = "O H", **settings: Any) -> Oracle:
        if "potcars" not in settings:
            settings["folder"] = str(vasp_folder(tmp_path / "inputs", text, elements))
        return load_oracle("vasp", {"command": vasp_command(answer, *options)} | settings)

    return make


def test_a_recorded_crystal_comes_back_to_the_last_digit(vasp: Make, tmp_path: Path) -> None:
    recorded = read_xml(RECORDED / "vasp" / "vasprun_dfpt.xml")
    crystal = Frames(recorded.numbers, recorded.positions[None], recorded.cell[None])
    oracle = vasp(answer="replay-xml", elements="Na Cl")
    before = contents(tmp_path / "inputs")
    result = label(oracle, crystal)
    assert result.energy == recorded.energy == -6.74587304
    np.testing.assert_array_equal(result.stress, recorded.stress)
    assert result.code == "vasp 6.3.2 27Jun22"
    assert result.evidence == "'aborting loop because EDIFF is reached' after 13 of 100 steps; version 6.3.2 27Jun22"
    assert contents(tmp_path / "inputs") == before
    assert [path.name for path in Path.cwd().iterdir()] == [f"vasp-version-{fingerprint(oracle)[:12]}.txt"]


def test_a_recorded_cluster_comes_back_with_its_forces(vasp: Make) -> None:
    theirs = read(RECORDED / "vasp" / "OUTCAR_example_1", format="vasp-out")
    table = (RECORDED / "vasp" / "OUTCAR_example_1").read_text().split("fractional coordinates (direct lattice)\n")[1]
    fractions = np.array([[float(x) for x in line.split()] for line in table.splitlines()[:18]])
    cluster = Frames(theirs.numbers, (fractions @ theirs.cell)[None], theirs.cell.array[None])
    result = label(vasp(answer="replay-outcar", elements="Ni", text="ISPIN = 2\nENCUT = 300\n"), cluster)
    assert result.energy == theirs.calc.results["free_energy"] == -68.22868532
    np.testing.assert_allclose(result.forces, theirs.get_forces(), atol=1e-12)
    np.testing.assert_allclose(result.stress, theirs.get_stress(voigt=False), rtol=1e-6)
    assert np.abs(result.forces).max() > 1


def test_the_stand_in_refuses_another_structure(vasp: Make) -> None:
    recorded = read_xml(RECORDED / "vasp" / "vasprun_dfpt.xml")
    moved = Frames(recorded.numbers, recorded.positions[None] + np.array([[[0, 0, 0], [0, 0, 1e-4]]]), recorded.cell[None])
    with pytest.raises(OracleCrashed, match=r"VASP wrote no OUTCAR \(exit status 1\)[\s\S]*stand-in: position"):
        label(vasp(answer="replay-xml", elements="Na Cl"), moved)


def test_forces_come_back_in_the_order_of_the_frame(vasp: Make) -> None:
    numbers = np.array([1, 8, 1, 1, 8, 1])
    positions = np.array([[0.9, 0.1, 0.0], [0.0, 0.0, 0.1], [3.2, 2.9, 2.5], [-0.2, 0.9, 0.2], [2.4, 2.5, 2.6], [2.3, 3.4, 2.7]])
    mixed = Frames(numbers, positions[None], CELL)
    sorted_order = np.array([1, 4, 0, 2, 3, 5])
    by_element = Frames(numbers[sorted_order], positions[None, sorted_order], CELL)
    result, plain = label(vasp(), mixed), label(vasp(), by_element)
    assert result.energy == plain.energy
    np.testing.assert_array_equal(result.forces[sorted_order], plain.forces)
    assert len({tuple(row) for row in result.forces}) == 6


def test_the_order_of_the_potcar_is_that_of_poscar(vasp: Make) -> None:
    result, other = label(vasp(elements="O H"), frame(1, 0, 2)), label(vasp(elements="H O"), frame(1, 0, 2))
    assert result.energy == other.energy
    np.testing.assert_allclose(result.forces, other.forces, atol=1e-12)
    # the order of the datasets is no theory
    assert result.fingerprint == other.fingerprint


def test_charge_spin_and_the_tags_of_a_label_reach_the_code(vasp: Make) -> None:
    ion = replace(WATER, charge=1, multiplicity=2)
    wanted = ("NELECT 7", "ISPIN 2", "NUPDOWN 1", "NSW 0", "IBRION -1", "ISIF 2", "LWAVE .FALSE.", "ENCUT 520")
    required = [word for wish in wanted for word in ("--require", wish)]
    assert abs(label(vasp(*required), ion).energy - label(vasp(), WATER).energy) > 1e-3


def test_settings_in_the_config_are_written_by_ase(vasp: Make, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "incar": {"encut": 520, "ediff": 1e-06, "lasph": True, "LREAL": "Auto", "ldauu": [4.0, 0.0]},
        "xc": "pbe", "kpts": [2, 2, 1], "pp_path": str(potential_folder(tmp_path / "potpaw_PBE.64")),
        "potcars": {"O": "O", "H": "H"},
    }  # fmt: skip
    wanted = ("ENCUT 520", "EDIFF 1e-06", "LASPH .TRUE.", "LREAL Auto", "GGA PE", "LDAUU 4.0 0.0")
    required = [word for wish in wanted for word in ("--require", wish)]
    assert label(vasp(*required, **settings), WATER).energy == label(vasp(), WATER).energy
    others = [{"xc": "pbesol"}, {"kpts": [2, 2, 2]}, {"gamma": False}, {"incar": {"encut": 500}}]
    assert len({fingerprint(vasp(**(settings | other))) for other in [{}, *others]}) == 5


def test_the_same_files_give_the_same_fingerprint_by_either_way(vasp: Make, tmp_path: Path) -> None:
    pp_path = str(potential_folder(tmp_path / "pp"))
    incar = {"encut": 520, "ediff": 1e-6, "gga": "PE", "ismear": 0, "sigma": 0.05}
    by_config = vasp(incar=incar, kpts=[2, 2, 2], pp_path=pp_path, potcars={"H": "H", "O": "O"})
    assert fingerprint(by_config) == fingerprint(vasp())


def test_the_ladder_is_climbed_to_the_first_rung_that_converges(vasp: Make) -> None:
    ladder = [{"AMIX": 0.1}, {"algo": "All", "nelm": 120}]
    result = label(vasp("--converges-with", "ALGO All", text=INCAR + "ALGO = Fast\n", ladder=ladder), WATER)
    assert result.rung == 2
    assert result.fingerprint == label(vasp(), WATER).fingerprint
    assert "of 120 steps" in result.evidence


@pytest.mark.parametrize("rung", [{"ENCUT": 300}, {"ISMEAR": 1}, {"ALGO": "All", "EDIFF": 1e-3}, {"algo": "Exact"}, {}])
def test_a_rung_that_changes_the_theory_is_refused(vasp: Make, rung: dict[str, Any]) -> None:
    with pytest.raises(OracleConfigError, match="ladder"):
        vasp(ladder=[rung])


def test_a_restart_sets_its_tags_itself(vasp: Make) -> None:
    with pytest.raises(OracleConfigError, match=r"line 7: LWAVE = F: remove it, restart = true sets it"):
        vasp(restart=True, text=INCAR + "\nLWAVE = F\n").check(WATER)


def test_a_prescribed_version_is_the_code_of_the_label(vasp: Make) -> None:
    assert label(vasp("--version", "6.4.2", version="6.4.2"), WATER).code == "vasp 6.4.2"


def test_a_kernel_and_a_spacing_are_part_of_the_input(vasp: Make, tmp_path: Path) -> None:
    plain = fingerprint(vasp())
    (tmp_path / "inputs" / "vdw_kernel.bindat").write_bytes(b"\x00\xff kernel")
    oracle = vasp(keep_files="all")
    assert fingerprint(oracle) != plain
    label(oracle, WATER)
    (work,) = (path for path in Path.cwd().iterdir() if path.is_dir())
    assert (work / "vdw_kernel.bindat").read_bytes() == b"\x00\xff kernel"
    spaced = vasp(text=INCAR + "KSPACING = 0.3\n")
    (tmp_path / "inputs" / "KPOINTS").unlink()
    label(spaced, WATER)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give either folder"),
        ({"folder": "x", "incar": {"encut": 1}, "kpts": [1, 1, 1]}, "not both"),
        ({"folder": "x", "xc": "pbe"}, "xc has no meaning beside folder"),
        ({"incar": {"encut": 520}}, "give kpts"),
        ({"incar": {"kspacing": 0.3}, "kpts": [1, 1, 1]}, "and not both"),
        ({"incar": {"encut": 520}, "kpts": [1, 1, 1]}, "needs pp_path and potcars"),
        ({"incar": {"encut": 520}, "kpts": [2, 2], "pp_path": "x", "potcars": {"O": "O"}}, "three positive divisions"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(OracleConfigError, match=said):
        load_oracle("vasp", {"command": "vasp_std"} | settings)


def test_what_is_missing_is_said_before_any_work(vasp: Make, tmp_path: Path) -> None:
    own = potential_folder(tmp_path / "pp")
    given: dict[str, Any] = {"incar": {"encut": 520}, "kpts": [1, 1, 1], "pp_path": str(own), "potcars": {"O": "O", "H": "H"}}
    cases: list[tuple[dict[str, Any], Frames, type[OracleError | EnvironmentProblem], str]] = [
        ({"command": "no-such-vasp"}, WATER, EnvironmentProblem, "'no-such-vasp', which is no program here"),
        ({}, replace(WATER, cell=None), OracleConfigError, "put the molecule into a box"),
        ({}, replace(WATER, cell=CELL[:, [1, 0, 2]]), OracleConfigError, "right-handed"),
        ({"elements": "O"}, WATER, OracleConfigError, "POTCAR has O, but the frame has H O"),
        ({"elements": "O H C"}, WATER, OracleConfigError, "POTCAR has O H C, but the frame has H O"),
        ({"elements": "O H O"}, WATER, OracleConfigError, "POTCAR has O H O, but the frame has H O; give each element once"),
        (given | {"potcars": {"O": "O_s", "H": "H"}}, WATER, OracleConfigError, "O_s/POTCAR cannot be read"),
        (given | {"potcars": {"O": "C", "H": "H"}}, WATER, OracleConfigError, "is for C, but potcars names it for O"),
        (given | {"xc": "pbf"}, WATER, OracleConfigError, "xc = 'pbf' is unknown to ASE"),
    ]
    for settings, structure, error, said in cases:
        with pytest.raises(error, match=said):
            vasp(**settings).check(structure)
    for name in ("INCAR", "KPOINTS", "POTCAR"):
        vasp_folder(tmp_path / "inputs")
        (tmp_path / "inputs" / name).unlink()
        with pytest.raises(OracleConfigError, match=f"inputs/{name} cannot be read"):
            load_oracle("vasp", {"command": vasp_command("compute"), "folder": str(tmp_path / "inputs")}).check(WATER)
    assert list(Path.cwd().iterdir()) == []
