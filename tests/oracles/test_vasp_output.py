"""What counts as a result of VASP, on the authentic files inside the ase package; ASE's own readers are the second opinion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase.io import read
from stand_ins.inputs import RECORDED

from bnn_driver.errors import OracleCrashed, OracleInconsistent
from oracles.vasp_output import END, REACHED, loop_end, read_result, read_xml

FILES = RECORDED / "vasp"
OUTCAR = (FILES / "OUTCAR_example_1").read_text()


@pytest.mark.parametrize("name", ["vasprun_dfpt.xml", "vasprun_pstress.xml"])
def test_numbers_are_read_as_ase_reads_them(name: str) -> None:
    result, theirs = read_xml(FILES / name), read(FILES / name, format="vasp-xml")
    np.testing.assert_array_equal(result.numbers, theirs.numbers)
    np.testing.assert_array_equal(result.cell, theirs.cell)
    np.testing.assert_allclose(result.positions, theirs.positions, atol=1e-12)
    np.testing.assert_array_equal(result.forces, theirs.get_forces())
    np.testing.assert_allclose(result.stress, theirs.get_stress(voigt=False), rtol=1e-9)
    pressure = float(result.parameters["PSTRESS"])
    # ASE takes the enthalpy apart; here a run with PSTRESS is refused
    assert result.energy == pytest.approx(
        theirs.calc.results["free_energy"] + pressure * 6.2415e-4 * theirs.get_volume(), abs=1e-7
    )


def test_the_free_energy_is_taken_and_not_the_one_without_smearing() -> None:
    result, theirs = read_xml(FILES / "vasprun_pstress.xml"), read(FILES / "vasprun_pstress.xml", format="vasp-xml")
    assert result.energy == -20.23985977
    assert abs(theirs.get_potential_energy() - theirs.calc.results["free_energy"]) == pytest.approx(2.4e-4, rel=0.02)


def test_the_number_of_steps_is_not_that_of_the_response_functions(tmp_path: Path) -> None:
    """VASP 5.4.4 prints a second NELM, which is 1, at the end of the parameters."""
    text = (FILES / "vasprun_dfpt.xml").read_text()
    block = '<separator name="response functions" ><i type="int" name="NELM">     1</i></separator></parameters>'
    (tmp_path / "vasprun.xml").write_text(text.replace("</parameters>", block, 1))
    assert read_xml(tmp_path / "vasprun.xml").parameters["NELM"] == "100"


def test_only_the_steps_of_the_ground_state_count() -> None:
    assert read_xml(FILES / "vasprun_pstress.xml").steps == 9
    # the linear response that follows has 67 more
    assert read_xml(FILES / "vasprun_dfpt.xml").steps == 13
    assert (FILES / "vasprun_dfpt.xml").read_text().count("<scstep>") == 80


@pytest.mark.parametrize(
    ("number", "subversion", "version"),
    [
        ("6.3.2  ", "27Jun22 (build Jul 04 2022 11:47:50) complex                          parallel ", "6.3.2 27Jun22"),
        ("5.4.1  ", "24Jun15 (build Jan 02 2020 16:21:29) gamma-only", "5.4.1 24Jun15"),
        ("5.4.4.18Apr17-6-g9f103f2a35  ", "(build Nov 17 2017 16:18:39) complex            parallel ", "5.4.4 18Apr17-6-g9f103f2a35"),
    ],
)  # fmt: skip
def test_the_version_is_read_in_every_style(tmp_path: Path, number: str, subversion: str, version: str) -> None:
    """The first one is the file's own, the others are put into it."""
    text = (FILES / "vasprun_dfpt.xml").read_text()
    own = ("6.3.2  ", "27Jun22 (build Jul 04 2022 11:47:50) complex                          parallel ")
    assert all(text.count(words) == 1 for words in own)
    (tmp_path / "vasprun.xml").write_text(text.replace(own[0], number).replace(own[1], subversion))
    assert read_xml(tmp_path / "vasprun.xml").version == version


@pytest.mark.parametrize(("name", "reached"), [("y_y", True), ("n_y", True), ("y_n", False)])
def test_the_codes_own_reason_is_found(name: str, reached: bool) -> None:
    assert (REACHED in loop_end((FILES / f"convergence_OUTCAR_{name}").read_text())) is reached


def test_a_recorded_outcar_has_all_its_evidence() -> None:
    assert loop_end(OUTCAR) == REACHED
    assert END in OUTCAR


def test_an_xml_file_cut_anywhere_is_no_result(tmp_path: Path) -> None:
    text = (FILES / "vasprun_pstress.xml").read_text()
    whole = text.rstrip()
    for end in range(0, len(whole), 997):
        (tmp_path / "vasprun.xml").write_text(whole[:end])
        with pytest.raises(OracleCrashed, match="not complete"):
            read_xml(tmp_path / "vasprun.xml")


def test_an_outcar_cut_at_any_line_is_no_result(tmp_path: Path) -> None:
    lines = OUTCAR.splitlines(keepends=True)
    end = next(n for n, line in enumerate(lines) if END in line)
    for cut in range(0, end, 37):
        (tmp_path / "OUTCAR").write_text("".join(lines[:cut]))
        with pytest.raises(OracleCrashed, match="wrote no OUTCAR" if cut == 0 else "OUTCAR of VASP ends before"):
            read_result(tmp_path)


def test_an_xml_file_without_one_of_its_numbers_is_no_result(tmp_path: Path) -> None:
    text = (FILES / "vasprun_pstress.xml").read_text()
    for name in ('varray name="forces"', 'i name="e_fr_energy">    -20.2398'):
        (tmp_path / "vasprun.xml").write_text(text.replace(name, name.replace("name=", "was=")))
        with pytest.raises(OracleInconsistent, match=r"vasprun\.xml has no"):
            read_xml(tmp_path / "vasprun.xml")
