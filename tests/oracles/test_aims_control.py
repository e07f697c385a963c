"""A user's control.in: nothing of it is lost, what contradicts a label is refused, and only the theory makes the fingerprint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stand_ins.inputs import species, water

from bnn_driver.errors import OracleConfigError
from bnn_driver.records import Frames
from oracles.aims_control import SCF_KEYWORDS, Control, lines_of
from oracles.scrutiny import check_rungs

WATER = Frames(*(lambda n, x: (n, x[None]))(*water()))
CRYSTAL = replace(WATER, cell=np.eye(3)[None] * 5.0)
ZUNDEL = Frames(np.array([8, 8, 1, 1, 1, 1, 1]), np.arange(21.0).reshape(1, 7, 3), charge=1)


def control(general: str, elements: str = "H O") -> Control:
    return Control(general + "".join(species(symbol) for symbol in elements.split()), "inputs/control.in", True)


def test_every_line_stays_and_the_new_ones_come_before_the_species() -> None:
    mine = control("xc pbe # Perdew\n\n# a remark\nspin none\n")
    text = mine.completed({"compute_forces": ".true.", "charge": "1"}, {})
    old, new = mine.text.split("\n"), text.split("\n")
    added = ["# added by bnn-driver", "compute_forces .true.", "charge 1"]
    assert [line for line in new if line not in added] == old
    assert new.index("charge 1") < next(n for n, line in enumerate(new) if "species " in line and "#" not in line)


def test_what_is_there_already_is_not_said_twice() -> None:
    mine = control("xc pbe\ncompute_forces .true.\n")
    assert mine.completed({"compute_forces": ".true."}, {}) == mine.text


def test_a_rung_replaces_the_line_of_the_user() -> None:
    text = control("xc pbe\ncharge_mix_param 0.4  # bold\n").completed({}, {"charge_mix_param": 0.02, "adjust_scf": "never 1"})
    said = {line.keyword: line.value for line in lines_of(text)}
    assert (said["charge_mix_param"], said["adjust_scf"]) == ("0.02", "never 1")
    assert "# charge_mix_param 0.4  # bold" in text


def test_no_byte_of_another_encoding_or_system_is_lost() -> None:
    raw = "xc pbe\r\n# Ångström, año\r\n".encode("latin-1") + species("H").encode()
    mine = Control(raw.decode("latin-1"), "x", True)
    assert mine.completed({}, {}).encode("latin-1") == raw
    assert mine.find("xc").value == "pbe"


@pytest.mark.parametrize(
    ("line", "effect"),
    [
        ("relax_geometry bfgs 1e-2", "moves the atoms"),
        ("relax_unit_cell full", "changes the cell"),
        ("MD_run 5 NVE", "moves the atoms"),
        ("use_pimd_wrapper localhost 31415", "waits for i-PI"),
        ("postprocess_anyway .true.", "unconverged run end as if"),
        ("compute_forces .false.", "without forces"),
        ("compute_numerical_stress .true.", "strained cells"),
        ("total_energy_method rpa", "forces do not belong"),
        ("elsi_restart read", "earlier run"),
        ("dry_run", "computes nothing"),
        ("dry_run .true.", "computes nothing"),
        ("external_pressure 0.01", "pressure"),
    ],
)
def test_what_is_no_single_point_is_refused_with_its_line(line: str, effect: str) -> None:
    with pytest.raises(OracleConfigError, match=rf"inputs/control\.in, line 3: {line} .*{effect}.*remove it"):
        control(f"xc pbe\n# {line}\n{line}  # why\n").check_single_point(stress=False)


def test_harmless_values_of_the_same_keywords_pass() -> None:
    control("relax_geometry none\npostprocess_anyway .false.\ncompute_forces .true.\n").check_single_point(stress=False)


def test_stress_that_is_wanted_must_not_be_switched_off() -> None:
    mine = control("xc pbe\ncompute_analytical_stress .false.\n")
    mine.check_single_point(stress=False)
    with pytest.raises(OracleConfigError, match=r"line 2: compute_analytical_stress .*stress = false"):
        mine.check_single_point(stress=True)


def test_charge_comes_with_the_frame() -> None:
    assert control("xc pbe\n").state_keywords(ZUNDEL) == {"charge": "1"}
    assert control("xc pbe\ncharge 1.\n").state_keywords(ZUNDEL) == {}
    assert control("xc pbe\n").state_keywords(WATER) == {}
    for frame in (WATER, replace(ZUNDEL, charge=-1)):
        with pytest.raises(OracleConfigError, match=r"line 2: charge 1 contradicts \[system\] charge = (0|-1)"):
            control("xc pbe\ncharge 1\n").state_keywords(frame)


def test_multiplicity_comes_with_the_frame() -> None:
    triplet = replace(WATER, multiplicity=3)
    added = {"spin": "collinear", "fixed_spin_moment": "2", "default_initial_moment": "0.6667"}
    assert control("xc pbe\n").state_keywords(triplet) == added
    assert control("spin collinear\nfixed_spin_moment 2\ndefault_initial_moment hund\n").state_keywords(triplet) == {}
    with pytest.raises(OracleConfigError, match=r"line 1: spin none contradicts .*multiplicity = 3"):
        control("spin none\n").state_keywords(triplet)
    with pytest.raises(OracleConfigError, match=r"line 1: fixed_spin_moment 1 contradicts .*multiplicity = 3"):
        control("fixed_spin_moment 1\n").state_keywords(triplet)
    with pytest.raises(OracleConfigError, match=r"line 1: multiplicity 2 contradicts .*multiplicity = 1"):
        control("multiplicity 2\n").state_keywords(WATER)


def test_a_free_moment_of_the_user_stays_free_but_needs_a_start() -> None:
    assert control("spin collinear\ndefault_initial_moment 1.0\n").state_keywords(CRYSTAL) == {}
    with pytest.raises(OracleConfigError, match=r"line 1: spin collinear needs initial moments.*default_initial_moment"):
        control("spin collinear\n").state_keywords(CRYSTAL)
    # as in the recorded run of a hydrogen atom
    assert control("spin collinear\n").state_keywords(Frames(np.array([2]), np.zeros((1, 1, 3)))) == {}


def test_cell_and_k_points_belong_together() -> None:
    control("k_grid 2 2 2\n").check_boundary(CRYSTAL)
    control("xc pbe\n").check_boundary(WATER)
    with pytest.raises(OracleConfigError, match="has no k_grid"):
        control("xc pbe\n").check_boundary(CRYSTAL)
    with pytest.raises(OracleConfigError, match="line 1: k_grid 1 1 1: the frame is a molecule"):
        control("k_grid 1 1 1\n").check_boundary(WATER)


def test_each_element_has_one_species_which_may_have_another_name() -> None:
    mine = control("xc pbe\n", "O H")
    assert mine.names_of(WATER) == ["O", "H", "H"]
    renamed = Control(mine.text.replace("species        H", "species        H_light"), "control.in", True)
    assert renamed.names_of(WATER) == ["O", "H_light", "H_light"]
    with pytest.raises(OracleConfigError, match=r"control\.in has no O; give exactly one block 'species O'"):
        control("xc pbe\n", "H").names_of(WATER)
    with pytest.raises(OracleConfigError, match=r"2 species of H \(H, H_tight\)"):
        Control(mine.text + species("H").replace("species        H", "species H_tight"), "control.in", True).names_of(WATER)


def test_only_the_theory_makes_the_fingerprint() -> None:
    plain = control("xc pbe\nsc_accuracy_rho 1e-6\n").physics()
    for same in (
        "# remark\n\nsc_accuracy_rho   1e-6 # tight\nxc\tpbe\n",
        "xc pbe\nsc_accuracy_rho 1e-6\noutput hirshfeld\ncharge 1\ncompute_forces .true.\n",
        "xc pbe\nsc_accuracy_rho 1e-6\ncharge_mix_param 0.1\nsc_iter_limit 50\n",
    ):
        assert control(same).physics() == plain
    for other in ("xc pbe0\nsc_accuracy_rho 1e-6\n", "xc pbe\n", "xc pbe\nsc_accuracy_rho 1e-6\nspin collinear\n"):
        assert control(other).physics() != plain
    more = control("xc pbe\nsc_accuracy_rho 1e-6\n").text.replace("hydro 2 p 3.5", "hydro 2 p 3.4", 1)
    assert Control(more, "", True).physics() != plain
    assert Control(control("xc pbe\nsc_accuracy_rho 1e-6\n").text + "relativistic none\n", "", True).physics() != plain


def test_a_rung_of_the_ladder_changes_no_theory() -> None:
    check_rungs("aims", [{"charge_mix_param": 0.02, "n_max_pulay": 10}], SCF_KEYWORDS)
    for rung in ({"charge_mix_param": 0.02, "sc_accuracy_rho": 1e-3}, {"xc": "lda"}, {"occupation_type": "gaussian 0.5"}, {}):
        with pytest.raises(OracleConfigError, match="ladder: rung 1 may change only"):
            check_rungs("aims", [rung], SCF_KEYWORDS)


def test_the_files_of_a_published_data_set_are_understood(shared_data: Path) -> None:
    folder = shared_data / "zundel_eigen_qbc" / "aims"
    zundel, eigen = (
        Control((folder / name).read_bytes().decode("latin-1"), name, True) for name in ("control_zundel.in", "control.in")
    )
    for mine, added in ((zundel, {}), (eigen, {"charge": "1"})):
        mine.check_single_point(stress=False)
        mine.check_boundary(ZUNDEL)
        assert mine.names_of(ZUNDEL) == ["O", "O", "H", "H", "H", "H", "H"]
        assert mine.state_keywords(ZUNDEL) == added
    # the two differ in "charge 1" and "spin none", not in the species
    assert zundel.physics()["species"] == eigen.physics()["species"]
    with pytest.raises(OracleConfigError, match=r"line 6: charge 1 contradicts \[system\] charge = 0"):
        zundel.state_keywords(replace(ZUNDEL, charge=0))
