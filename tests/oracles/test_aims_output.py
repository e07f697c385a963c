"""What counts as a result of FHI-aims, on the authentic outputs inside the ase package; ASE's own reader is the second opinion."""

from __future__ import annotations

import numpy as np
import pytest
from ase.io.aims import read_aims_output
from stand_ins.inputs import RECORDED

from bnn_driver.errors import OracleCrashed, OracleError, OracleInconsistent, SCFNotConverged
from bnn_driver.units import HARTREE
from oracles.aims_output import CONVERGED, FAREWELL, read_result

FILES = RECORDED / "aims"
SINGLE = (FILES / "singlepoint.out").read_text()


def first_structure(name: str) -> str:
    """Synthetic: the first structure of a longer authentic run, with a farewell."""
    text = (FILES / name).read_text()
    forces = text.index("Total atomic forces", text.index(CONVERGED))
    return text[: text.index("\n\n", forces)] + f"\n\n          {FAREWELL}\n"


def test_a_single_point_is_read_as_ase_reads_it() -> None:
    result, theirs = read_result(SINGLE), read_aims_output(FILES / "singlepoint.out")
    assert result.energy == theirs.get_potential_energy() == -2063.02072675943
    np.testing.assert_array_equal(result.forces, theirs.get_forces())
    np.testing.assert_array_equal(result.positions, theirs.positions)
    assert result.species == theirs.get_chemical_symbols()
    assert (result.cell, result.stress) == (None, None)
    assert result.cycles == 11


@pytest.mark.parametrize("name", ["relax.out", "md.out", "socket.out"])
def test_the_first_of_many_structures_is_read_as_ase_reads_it(name: str) -> None:
    result, theirs = read_result(first_structure(name)), read_aims_output(FILES / name, index=0)
    assert result.energy == theirs.get_potential_energy()
    np.testing.assert_array_equal(result.forces, theirs.get_forces())
    np.testing.assert_array_equal(result.positions, theirs.positions)
    assert (result.stress is not None) == (name == "relax.out")
    if result.stress is not None:
        np.testing.assert_array_equal(result.stress, theirs.get_stress(voigt=False))
        np.testing.assert_array_equal(result.cell, theirs.cell)
        # a silicon lattice stretched to 5.81 Å (at rest 5.4) pulls: ASE's sign
        assert result.stress[0, 0] == 0.07748922


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("md.out", OracleInconsistent, "converged 5 structures"),
        ("relax.out", OracleInconsistent, "converged 8 structures"),
        ("socket.out", OracleInconsistent, "converged 6 structures"),
        ("DFPT_dielectric.out", OracleInconsistent, "no forces"),
        ("issue_3345_spin_md_light.out", OracleInconsistent, "no forces"),
        # recorded in excerpts that leave out the end of the SCF
        ("numerical_stress.out", SCFNotConverged, "without saying"),
        ("polarization.out", SCFNotConverged, "without saying"),
        ("preamble_fail.out", OracleCrashed, "before the first SCF loop"),
    ],
)
def test_what_is_no_single_point_is_no_result(name: str, error: type[OracleError], said: str) -> None:
    with pytest.raises(error, match=said):
        read_result((FILES / name).read_text())


def test_an_output_cut_at_any_line_is_no_result() -> None:
    lines = SINGLE.splitlines(keepends=True)
    farewell = next(n for n, line in enumerate(lines) if FAREWELL in line)
    for end in range(farewell):
        with pytest.raises(OracleCrashed):
            read_result("".join(lines[:end]))


def test_an_output_that_lacks_any_line_of_its_numbers_is_no_result() -> None:
    lines = SINGLE.splitlines(keepends=True)
    converged = next(n for n, line in enumerate(lines) if line.strip() == CONVERGED)
    compact = next(n for n in range(converged, len(lines)) if "Electronic free energy" in lines[n])
    forces = next(n for n in range(converged, len(lines)) if "Total atomic forces" in lines[n])
    for missing in (converged, compact, forces, forces + 1, forces + 3):
        with pytest.raises((OracleInconsistent, SCFNotConverged)):
            read_result("".join(lines[:missing] + lines[missing + 1 :]))


def test_a_mixer_that_starts_again_is_not_a_failure() -> None:
    assert "not yet converged - restarting mixer" in SINGLE
    assert read_result(SINGLE).energy < -2063


@pytest.mark.parametrize(
    "words",
    ["  *** scf_solver: SCF cycle not converged.", "  * WARNING! SELF-CONSISTENCY CYCLE DID NOT CONVERGE"],
    ids=["abort", "warning"],
)
def test_a_single_word_of_failure_is_enough(words: str) -> None:
    """Synthetic: the code's words for an unconverged SCF anywhere in an output that otherwise looks complete."""
    spoilt = SINGLE.replace("  Removing unitary", f"{words}\n  Removing unitary")
    with pytest.raises(SCFNotConverged, match="did not converge in 11 iterations"):
        read_result(spoilt)


def test_the_hartree_of_the_code_is_not_ours() -> None:
    """The constant that sets file labels apart from socket labels: 5.6e-8, which is 53 meV at -947 keV."""
    line = next(x for x in reversed(SINGLE.splitlines()) if "Electronic free energy" in x and "Ha" in x)
    words = line.split(":")[1].split()
    ratio = float(words[2]) / float(words[0])
    assert ratio == pytest.approx(27.2113845, rel=1e-9)
    assert 1 - ratio / HARTREE == pytest.approx(5.6e-8, rel=0.01)
    said = (FILES / "md.out").read_text().split("value of 1 Hartree used in FHI-aims is :")[1].split()[0]
    assert float(said) == 27.2113845
