"""The laws of every oracle over FHI-aims and VASP, whose stand-ins answer for any structure in the layout of recorded outputs.

What is tested so is the way in and out: units, signs, order of atoms and components, files.  The codes themselves are not here.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_contract as laws
from oracle_subjects import ZUNDEL, Subject
from scripted_code import left, wait_until
from stand_ins import inputs
from test_contract import (  # noqa: F401
    test_a_cell_is_only_a_choice_of_images,
    test_a_label_says_where_it_comes_from,
    test_a_label_survives_json_to_the_last_bit,
    test_absurd_forces_are_refused,
    test_an_unfit_frame_is_refused_before_it_costs_anything,
    test_every_setting_is_either_physics_or_mechanics,
    test_forces_are_minus_the_slope_of_the_energy,
    test_forces_in_a_triclinic_cell_are_slopes_too,
    test_stress_is_the_slope_by_strain_per_volume,
    test_the_frame_is_left_as_it_was,
    test_the_multiplicity_reaches_the_code_or_is_refused,
    test_the_order_of_the_atoms_is_irrelevant,
)

from bnn_driver.errors import OracleConfigError
from bnn_driver.oracle import label
from bnn_driver.records import Frames

BOX = np.array([[[9.0, 0.3, -0.2], [0.1, 8.4, 0.4], [-0.3, 0.2, 8.9]]])


def aims(folder: Path) -> Subject:
    """Whose k-points follow the boundary: the laws use molecules and crystals with the same settings."""
    light, tight = inputs.species_folder(folder / "light"), inputs.species_folder(folder / "tight", "     hydro 3 d 7.6\n")
    settings = {
        "command": inputs.aims_command("compute"), "control": {"xc": "pbe"}, "species_dir": str(light), "stress": True,
        "version": "221103",
    }  # fmt: skip
    physics = {"control": {"xc": "pbe0"}, "species_dir": str(tight), "stress": False, "version": "240507"}
    mechanics = {
        "session": "socket", "restart_every": 7,
        "command": ["srun", "aims.x"], "restart": True, "keep_files": "all", "ladder": [{"charge_mix_param": 0.02}],
        "control": {"xc": "pbe", "sc_iter_limit": 200, "output_level": "MD_light"},
    }  # fmt: skip
    return Subject(
        "aims",
        "aims",
        settings,
        1e-3,
        2e-4,
        1e-7,
        physics,
        mechanics,
        {"version": "221103"},
        elsewhere=frozenset({"folder", "host"}),
    )


def vasp(folder: Path) -> Subject:
    """Energies and forces are printed with eight decimals: 1e-8 eV over 2e-3 Å."""
    pp_path = str(inputs.potential_folder(folder / "pp"))
    settings = {
        "command": inputs.vasp_command("compute"), "incar": {"encut": 520, "isym": 0}, "kpts": [1, 1, 1], "pp_path": pp_path,
        "potcars": {"O": "O", "H": "H"}, "version": "6.3.0",
    }  # fmt: skip
    physics = {
        "incar": {"encut": 400, "isym": 0}, "xc": "pbesol", "kpts": [2, 1, 1], "gamma": False, "potcars": {"O": "O", "C": "C"}, "stress": False,
        "version": "6.4.2",
    }  # fmt: skip
    mechanics = {
        "session": "interactive", "restart_every": 7,
        "command": ["srun", "vasp_std"], "restart": True, "keep_files": "all", "ladder": [{"algo": "All"}],
        "incar": {"encut": 520.0, "isym": 0, "ncore": 4, "algo": "Fast"},
    }  # fmt: skip
    return Subject(
        "vasp", "vasp", settings, 1e-3, 2e-4, 1e-7, physics, mechanics, {"version": "6.3.0"}, elsewhere=frozenset({"folder"})
    )


def kept_running(subject: Subject, session: str, invariance: float) -> Subject:
    """Its settings are those of single runs."""
    again = replace(subject, settings=subject.settings | {"session": session}, invariance=invariance)
    again.mechanics.pop("session")
    again.mechanics.pop("restart")  # no meaning beside it
    return replace(again, elsewhere=again.elsewhere | {"restart"})


@pytest.fixture(params=["aims", "aims-socket", "vasp", "vasp-interactive"])
def subject(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    monkeypatch.chdir(tmp_path)
    kind, _, session = request.param.partition("-")
    found = (aims if kind == "aims" else vasp)(tmp_path)
    if session:
        found = kept_running(found, session, 3e-7)  # forces of VASP with seven decimals, positions of FHI-aims in its own bohr
    if kind == "aims":
        # one law is about crystals, another about molecules: FHI-aims wants k-points for the first only
        name = request.node.name
        if any(word in name for word in ("triclinic", "stress", "images", "json", "left")):
            found.settings["control"]["k_grid"] = [1, 1, 1]
    else:
        # VASP knows crystals only: the molecules of the laws get a box
        monkeypatch.setattr(laws, "molecule", lambda subject: replace(subject.crystal, cell=BOX))
    yield found
    gc.collect()  # oracles end their codes
    assert wait_until(lambda: not left(tmp_path), 15.0), "processes were left behind"


def test_odd_electrons_are_refused_where_no_bands_share_them(subject: Subject) -> None:
    radical = replace(laws.molecule(subject), charge=1, multiplicity=3)
    with pytest.raises(OracleConfigError, match="multiplicity"):
        subject.oracle().check(radical)


def test_the_charge_reaches_the_code_and_moves_the_energy(subject: Subject) -> None:
    oracle, plain = subject.oracle(), laws.molecule(subject)
    assert abs(laws.energy(oracle, replace(plain, charge=2)) - laws.energy(oracle, plain)) > 1e-3


@pytest.mark.parametrize("shift", [7.3, -2.0])
def test_forces_do_not_mind_a_translation(subject: Subject, shift: float) -> None:
    oracle, frame = subject.oracle(), laws.molecule(subject)
    laws.assert_same(label(oracle, laws.transformed(frame, np.eye(3), shift)), label(oracle, frame), subject.invariance)


def test_a_label_depends_on_its_frame_only(subject: Subject) -> None:
    """Not on frames of the same and of other atoms that came before, to the last bit."""
    oracle, frame = subject.oracle(), laws.molecule(subject)
    first = label(oracle, frame)
    label(oracle, laws.moved(frame, 1, 0, 0.1))
    label(oracle, replace(ZUNDEL, cell=frame.cell))
    for other in (label(oracle, frame), label(subject.oracle(), frame)):
        laws.assert_same(other, first, 0.0)


def test_the_check_passes_what_can_be_labelled(subject: Subject) -> None:
    subject.oracle().check(laws.molecule(subject))
    subject.oracle().check(replace(ZUNDEL, cell=laws.molecule(subject).cell))


def test_twenty_atoms_in_disorder_come_back_in_order(subject: Subject) -> None:
    """Hydrogens and oxygens at random on a grid: each force against the finite difference of one atom."""
    rng = np.random.default_rng(5)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:20] * 2.0
    numbers = rng.permutation([8] * 8 + [1] * 12)
    frame = Frames(numbers, (grid + rng.normal(0, 0.2, (20, 3)))[None], laws.molecule(subject).cell)
    oracle = subject.oracle()
    forces = label(oracle, frame).forces
    for atom in rng.choice(20, 3, replace=False):
        slope = laws.slope(lambda h, a=atom: laws.energy(oracle, laws.moved(frame, a, 1, h)), subject.step)
        assert forces[atom, 1] == pytest.approx(-slope, abs=subject.force_tolerance)
