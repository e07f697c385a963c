"""A user's INCAR and POTCAR: nothing of them is lost, what contradicts a label is refused, and only the theory makes the fingerprint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stand_ins.inputs import INCAR, KPOINTS, potcar

from bnn_driver.errors import OracleConfigError
from bnn_driver.records import Frames
from oracles.vasp_inputs import Incar, normal_kpoints, potentials_of, tags_of

WATER = Frames(np.array([8, 1, 1]), np.eye(3)[None] * 2.0, np.eye(3)[None] * 9.0)
VALENCE = 8.0


def incar(text: str) -> Incar:
    return Incar(text, "inputs/INCAR", True)


def test_an_incar_is_read_as_vasp_reads_it() -> None:
    text = "SYSTEM = a = b\nencut=520 ! eV\n  ISMEAR = 0; SIGMA = 0.05 # both\nMAGMOM = 2*1.0 \\\n  4*0.0\n"
    text += 'text without meaning\nW = "x\nALGO = N\n" \n'
    found = [(tag.number, tag.name, tag.value) for tag in tags_of(text)]
    assert found == [
        (1, "SYSTEM", "a = b"),
        (2, "ENCUT", "520"),
        (3, "ISMEAR", "0"),
        (3, "SIGMA", "0.05"),
        (4, "MAGMOM", "2*1.0 4*0.0"),
        (7, "W", '"x ALGO = N "'),
    ]


def test_every_line_stays_and_the_new_ones_come_last() -> None:
    text = incar(INCAR).completed({"NSW": "0", "ENCUT": "1"}, {})
    assert text == INCAR + "# added by bnn-driver\nNSW = 0\n"


def test_a_rung_replaces_the_tag_of_the_user_and_spares_its_neighbours() -> None:
    text = incar("ALGO = Fast ; ENCUT = 520\nNELM = 60\n").completed({}, {"algo": "All", "AMIX": 0.1, "LSUBROT": True})
    assert {tag.name: tag.value for tag in tags_of(text)} == {
        "ENCUT": "520", "NELM": "60", "ALGO": "All", "AMIX": "0.1", "LSUBROT": ".TRUE.",
    }  # fmt: skip
    assert "# ALGO = Fast ; ENCUT = 520" in text


@pytest.mark.parametrize(
    ("line", "effect"),
    [
        ("NSW = 100", "moves the atoms"),
        ("IBRION = 6", "vibrations"),
        ("PSTRESS = 10", "enthalpy"),
        ("ISTART = 1", "earlier run"),
        ("ICHARG = 11", "fixes a density"),
        ("ALGO = Exact", "ground state"),
        ("ALGO = None", "ground state"),
        ("IALGO = 90", "ground state"),
        ("ML_LMLFF = .TRUE.", "machine-learned"),
        ("IMAGES = 4", "chain of images"),
        ("LEPSILON = T", "something else"),
        ("PLUGINS/STRUCTURE = T", "plug-in"),
        ("ISIF = 0", "without stress"),
    ],
)
def test_what_is_no_single_point_is_refused_with_its_line(line: str, effect: str) -> None:
    with pytest.raises(OracleConfigError, match=rf"inputs/INCAR, line 2: {line} .*{effect}.*remove it"):
        incar(f"ENCUT = 520\n{line} ! why\n").check_single_point(stress=True)


def test_harmless_values_of_the_same_tags_pass() -> None:
    # VASP itself turns IBRION = 0 into -1 when NSW = 0: see vasprun_dfpt.xml, whose INCAR says 0 and whose parameters say -1
    text = "NSW = 0\nIBRION = 0\nISIF = 3\nPSTRESS = 0.0\nISTART = 0\nICHARG = 2\nALGO = fast\nML_LMLFF = F\nLEPSILON = .FALSE.\n"
    incar(text).check_single_point(stress=True)
    incar("ISIF = 0\n").check_single_point(stress=False)


def test_a_tag_that_is_given_twice_must_say_the_same() -> None:
    assert incar("LWAVE = False\nLWAVE = .FALSE.\nENCUT=520\nENCUT = 520.0\n").tags["ENCUT"].number == 3
    with pytest.raises(OracleConfigError, match=r"inputs/INCAR, line 3: ENCUT = 400: line 1 says 520; remove one"):
        _ = incar("ENCUT = 520\n\nENCUT = 400\n").tags


def test_charge_comes_with_the_frame() -> None:
    ion = replace(WATER, charge=-1)
    assert incar("ENCUT = 520\n").state_tags(WATER, VALENCE) == {}
    assert incar("ENCUT = 520\n").state_tags(ion, VALENCE) == {"NELECT": "9"}
    assert incar("NELECT = 9.0\n").state_tags(ion, VALENCE) == {}
    with pytest.raises(
        OracleConfigError, match=r"line 1: NELECT = 9 contradicts \[system\] charge = 0 .*8 electrons.*expected 8"
    ):
        incar("NELECT = 9\n").state_tags(WATER, VALENCE)


def test_multiplicity_comes_with_the_frame() -> None:
    triplet = replace(WATER, multiplicity=3)
    assert incar("ENCUT = 520\n").state_tags(triplet, VALENCE) == {"ISPIN": "2", "NUPDOWN": "2"}
    assert incar("ISPIN = 2\nNUPDOWN = 2\n").state_tags(triplet, VALENCE) == {}
    assert incar("ISPIN = 2\n").state_tags(WATER, VALENCE) == {}
    with pytest.raises(OracleConfigError, match=r"line 1: ISPIN = 1 contradicts .*multiplicity = 3"):
        incar("ISPIN = 1\n").state_tags(triplet, VALENCE)
    with pytest.raises(OracleConfigError, match=r"line 1: NUPDOWN = 1 contradicts .*multiplicity = 3: expected 2"):
        incar("NUPDOWN = 1\n").state_tags(triplet, VALENCE)
    with pytest.raises(OracleConfigError, match=r"line 1: NUPDOWN = 2 contradicts .*multiplicity = 1"):
        incar("NUPDOWN = 2\n").state_tags(WATER, VALENCE)
    with pytest.raises(OracleConfigError, match=r"8 electrons .* cannot have multiplicity 2"):
        incar("ENCUT = 520\n").state_tags(replace(WATER, multiplicity=2), VALENCE)


def test_only_the_theory_makes_the_fingerprint() -> None:
    plain = incar(INCAR).physics()
    for same in (
        "sigma=5e-2\nISMEAR = 0\nGGA = pe\nENCUT = 520.00\nEDIFF = 1.0d-6\n",
        INCAR + "NCORE = 16\nKPAR = 4\nLWAVE = F\nNSW = 0\nALGO = All\nAMIX = 0.1\n",
        INCAR + "NELECT = 8\nNUPDOWN = 0\n",
    ):
        assert incar(same).physics() == plain
    for other in (INCAR.replace("520", "400"), INCAR + "ISPIN = 2\n", INCAR + "LASPH = T\n", INCAR.replace("PE", "PS")):
        assert incar(other).physics() != plain
    assert normal_kpoints(KPOINTS) == normal_kpoints("other words\n0\n  gamma\n2  2 2\n0 0 0") == "0\ngamma\n2 2 2\n0 0 0"


def test_a_potcar_is_its_datasets() -> None:
    found = potentials_of(potcar("O") + potcar("H"), "POTCAR")
    assert [(p.symbol, p.title, p.valence) for p in found] == [
        ("O", "PAW_PBE O 08Apr2002", 6.0),
        ("H", "PAW_PBE H 08Apr2002", 1.0),
    ]
    assert [p.checksum for p in found] == [potentials_of(potcar(x), "")[0].checksum for x in "OH"]
    assert potentials_of(potcar("O").replace("1.200", "1.201"), "")[0].checksum != found[0].checksum
    named = potentials_of(potcar("O").replace("PAW_PBE O 08", "PAW_PBE Zr_sv_GW 08"), "")
    assert named[0].symbol == "Zr"
    for text, said in (
        ("", "is empty"),
        ("potpaw_PBE N\n", "dataset 1 has no TITEL"),
        (potcar("O").replace("ZVAL", "Z"), "no ZVAL"),
    ):
        with pytest.raises(OracleConfigError, match=f"POTCAR.*{said}"):
            potentials_of(text, "POTCAR")


def test_the_files_of_a_published_workflow_are_understood(shared_data: Path) -> None:
    folder = shared_data / "paper_inputs"
    crystal = Incar((folder / "CaZrS3Example" / "INCAR").read_text(), "INCAR", True)
    crystal.check_single_point(stress=True)
    assert crystal.tags["NELECT"].number_or_none == 1280
    assert "NELECT" not in crystal.physics()
    molecule = Incar((folder / "EthanolExample" / "INCAR").read_text(), "INCAR", True)
    molecule.check_single_point(stress=True)
    assert molecule.physics()["LHFCALC"] == "T"
    assert normal_kpoints((folder / "EthanolExample" / "KPOINTS").read_text()) == "0\nmonkhorst pack\n1 1 1\n0 0 0"
