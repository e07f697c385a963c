"""Any ASE calculator: what it says about convergence is asked for and believed for its own frame only; its errors get our names."""

from __future__ import annotations

import configparser
import datetime
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import odd_calculators
import pytest
from oracle_subjects import ALLOY, ASE_TBLITE, TBLITE, WATER, ZUNDEL

from bnn_driver.errors import (
    BnnError,
    EnvironmentProblem,
    GeometryRejected,
    OracleConfigError,
    OracleCrashed,
    SCFNotConverged,
    UnstableState,
)
from bnn_driver.oracle import Oracle, fingerprint, label, load_oracle
from bnn_driver.records import Frames
from bnn_driver.units import volume

EMT = {"calculator": "ase.calculators.emt:EMT", "convergence": "exception"}


def odd(name: str, convergence: str = "exception", **arguments: Any) -> Oracle:
    settings = {"calculator": f"odd_calculators:{name}", "convergence": convergence, "code": "odd 1", "arguments": arguments}
    return load_oracle("ase", settings)


@pytest.mark.parametrize("convergence", ["attribute:converged", "attribute:scf.converged", r"regex:emt.log:^SCF run converged$"])
@pytest.mark.parametrize("rewrites", [True, False], ids=["one log per frame", "one log for all"])
def test_each_frame_needs_its_own_evidence(convergence: str, rewrites: bool, tmp_path: Path) -> None:
    oracle = odd("Candid", convergence, log="emt.log", rewrites=rewrites, directory=str(tmp_path))
    for _ in range(2):  # a log that is written anew with the same words is evidence too
        assert "converged" in label(oracle, ALLOY).evidence
        time.sleep(0.02)  # a file system's clock may tick every 10 ms
    odd_calculators.BUILT[-1].set(converges=False)
    with pytest.raises(SCFNotConverged, match="the calculation ended, but"):
        label(oracle, ALLOY)
    assert "converged" in label(oracle, ALLOY).evidence


def test_a_log_that_is_shorter_or_longer_than_the_last_one_is_read_from_its_start(tmp_path: Path) -> None:
    oracle = odd("Candid", "regex:emt.log:^SCF run", log="emt.log", rewrites=True, directory=str(tmp_path))
    for says in ("converged", "converged in 1000000 cycles", "ok"):
        label(oracle, ALLOY)
        odd_calculators.BUILT[-1].set(says=says)
        assert label(oracle, ALLOY).evidence.startswith("emt.log: SCF run")


def test_the_answer_of_an_earlier_frame_does_not_stand_for_a_later_one() -> None:
    oracle = odd("Silent", "attribute:converged")
    label(oracle, ALLOY)
    with pytest.raises(SCFNotConverged, match="converged is None"):
        label(oracle, ALLOY)


def test_numbers_of_an_earlier_frame_do_not_stand_for_a_later_one() -> None:
    oracle = odd("Idle")
    label(oracle, ALLOY)
    with pytest.raises(OracleConfigError, match="gave no energy and no forces and no stress"):
        label(oracle, replace(ALLOY, positions=ALLOY.positions + 0.1))


def test_evidence_that_cannot_be_is_a_fault_of_the_config(tmp_path: Path) -> None:
    with pytest.raises(OracleConfigError, match=r"iterations is 7, expected true or false"):
        label(odd("Candid", "attribute:scf.iterations"), ALLOY)
    with pytest.raises(OracleConfigError, match=r"no file .*else\.log"):
        label(odd("Candid", "regex:else.log:converged", log="emt.log", directory=str(tmp_path)), ALLOY)


def test_the_energy_is_the_one_of_the_forces() -> None:
    plain = label(load_oracle("ase", EMT), ALLOY)
    free, only = label(odd("Smeared"), ALLOY), label(odd("Smeared", free=False), ALLOY)
    assert free.energy == plain.energy
    assert "free_energy (of the forces)" in free.evidence
    assert only.energy == plain.energy + 1.0
    assert "tells no free_energy" in only.evidence


def test_a_calculator_with_getters_only_gives_the_same() -> None:
    plain, getters = label(load_oracle("ase", EMT), ALLOY), label(odd("Getters"), ALLOY)
    assert getters.energy == plain.energy
    np.testing.assert_array_equal(getters.forces, plain.forces)
    np.testing.assert_array_equal(getters.stress, plain.stress)


def test_the_calculator_stays_until_the_atoms_change_or_it_fails() -> None:
    oracle, built = odd("Candid", "attribute:converged"), odd_calculators.BUILT
    start = len(built)
    label(oracle, ALLOY)
    label(oracle, replace(ALLOY, positions=ALLOY.positions + 0.1, cell=ALLOY.cell * 1.01))
    assert len(built) == start + 1
    label(oracle, replace(ALLOY, cell=None))
    label(oracle, replace(ALLOY, numbers=ALLOY.numbers[::-1].copy(), cell=None))
    assert len(built) == start + 3
    built[-1].set(converges=False)
    with pytest.raises(SCFNotConverged):
        label(oracle, replace(ALLOY, numbers=ALLOY.numbers[::-1].copy(), cell=None))
    label(oracle, replace(ALLOY, numbers=ALLOY.numbers[::-1].copy(), cell=None))
    assert len(built) == start + 4


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ("scf", SCFNotConverged),
        ("gpaw", SCFNotConverged),
        ("failed", SCFNotConverged),
        ("input", OracleConfigError),
        ("property", OracleConfigError),
        ("program", EnvironmentProblem),
        ("read", OracleCrashed),
        ("exit", OracleCrashed),
        ("memory", OracleCrashed),
        ("singular", GeometryRejected),
    ],
)
def test_errors_of_calculators_get_our_names(failure: str, expected: type[BnnError]) -> None:
    with pytest.raises(expected) as caught:
        label(odd("Failing", failure=failure), ALLOY)
    assert str(odd_calculators.Failing.FAILURES[failure]) in str(caught.value)
    assert type(caught.value) is expected


@pytest.mark.parametrize(
    ("settings", "expected", "words"),
    [
        ({"calculator": "EMT"}, OracleConfigError, "expected 'module:Class'"),
        ({"calculator": "ase.calculators.emt:EMTT"}, OracleConfigError, "did you mean 'EMT'"),
        ({"calculator": "ase.calculators.emmt:EMT"}, OracleConfigError, "No module named"),
        ({"calculator": "no_such_package.ase:Code"}, EnvironmentProblem, "pip install no_such_package"),
        ({"calculator": "ase.calculators.mopac:MOPAC"}, OracleConfigError, "code = 'NAME VERSION'"),
        ({"convergence": "yes"}, OracleConfigError, "'attribute:converged'"),
        ({"convergence": "attribute:"}, OracleConfigError, "unknown"),
        ({"convergence": "regex:out.log"}, OracleConfigError, "unknown"),
        ({"convergence": "regex:out.log:("}, OracleConfigError, "not a regular expression"),
        ({"mechanics": ["command"]}, OracleConfigError, "'command', which is not among"),
        ({"arguments": {"day": datetime.date(2026, 1, 1)}}, OracleConfigError, "numbers, texts"),
        ({"charge_key": "charge"}, OracleConfigError, "'argument:NAME', 'info:NAME' or 'initial_charges'"),
        ({"multiplicity_key": "initial_charges"}, OracleConfigError, "'magmoms'"),
        ({"charge_key": "argument:charge", "arguments": {"charge": 1}}, OracleConfigError, "leave it to"),
        ({"box": "-1 A"}, OracleConfigError, "negative"),
    ],
)
def test_settings_that_can_never_work_are_refused_at_once(settings: dict[str, Any], expected: Any, words: str) -> None:
    with pytest.raises(expected, match=words):
        load_oracle("ase", EMT | settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arguments": {"asap_cutof": True}}, "did you mean 'asap_cutoff'"),  # which ASE would have swallowed
        ({"calculator": "odd_calculators:Getters", "code": "odd 1", "arguments": {"depth": 1}}, "TypeError.*'depth'"),
        ({"calculator": "ase.calculators.emt:defaultdict", "code": "odd 1"}, "no ASE calculator"),
        ({"calculator": "ase.calculators.tip3p:TIP3P"}, "no stress.*stress = false"),
    ],
)
def test_arguments_that_can_never_work_are_refused_by_the_check(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OracleConfigError, match=words):
        load_oracle("ase", EMT | settings).check(ALLOY)


def test_a_missing_program_is_a_matter_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ase.config.cfg.parser", configparser.ConfigParser())
    settings = {"calculator": "ase.calculators.espresso:Espresso", "code": "QE 7.3"}
    with pytest.raises(EnvironmentProblem, match="espresso"):
        load_oracle("ase", EMT | settings).check(replace(WATER, cell=None))


def test_elements_that_a_calculator_does_not_know_are_refused() -> None:
    iron = replace(ALLOY, numbers=np.full(4, 26))
    with pytest.raises(OracleConfigError, match="No EMT-potential for Fe"):
        label(load_oracle("ase", EMT), iron)


def test_a_moment_that_leaves_the_multiplicity_is_no_label() -> None:
    settings = {
        "calculator": "odd_calculators:Smeared",
        "convergence": "exception",
        "code": "odd 1",
        "multiplicity_key": "magmoms",
    }
    oracle = load_oracle("ase", settings | {"arguments": {"moment": 2.1}})
    label(oracle, replace(ALLOY, multiplicity=3))
    with pytest.raises(UnstableState, match=r"moment of 2\.10"):
        label(oracle, ALLOY)


def test_a_box_is_around_the_molecule_and_changes_nothing_else() -> None:
    molecule = replace(ALLOY, positions=ALLOY.positions - 40.0, cell=None)
    boxed, bare = (label(load_oracle("ase", EMT | {"box": box}), molecule) for box in ("30 A", "0 A"))
    assert boxed.energy == pytest.approx(bare.energy, abs=1e-9)
    np.testing.assert_allclose(boxed.forces, bare.forces, atol=1e-9)
    assert boxed.stress is None
    label(load_oracle("ase", EMT | {"calculator": "odd_calculators:Candid", "code": "odd 1", "box": "30 A"}), molecule)
    seen = odd_calculators.BUILT[-1].atoms
    np.testing.assert_array_equal(seen.cell.array, np.eye(3) * 30)
    np.testing.assert_allclose(seen.positions.mean(axis=0), [15, 15, 15])
    assert not seen.pbc.any()


@pytest.mark.parametrize("cell", [WATER.cell, None], ids=["triclinic", "molecule"])
def test_both_ways_to_tblite_agree(cell: np.ndarray | None) -> None:
    """Units, signs and order of components, by two codes that share the Hamiltonian only."""
    frame = replace(WATER, cell=cell)
    direct, through_ase = label(TBLITE.oracle(), frame), label(ASE_TBLITE.oracle(), frame)
    assert through_ase.energy == pytest.approx(direct.energy, abs=1e-6)
    np.testing.assert_allclose(through_ase.forces, direct.forces, atol=1e-6)
    assert (direct.stress is None) == (cell is None)
    if cell is not None:
        np.testing.assert_allclose(through_ase.stress, direct.stress, atol=1e-8)


@pytest.mark.parametrize(
    "keys",
    [
        {"charge_key": "argument:charge", "multiplicity_key": "argument:multiplicity"},
        {"charge_key": "initial_charges", "multiplicity_key": "magmoms"},
    ],
    ids=str,
)
def test_charge_and_spin_mean_the_same_in_both(keys: dict[str, str]) -> None:
    triplet = replace(ZUNDEL, multiplicity=3)
    for frame in (ZUNDEL, triplet, replace(ZUNDEL, charge=-1)):
        direct, through_ase = label(TBLITE.oracle(), frame), label(ASE_TBLITE.oracle(**keys), frame)
        assert through_ase.energy == pytest.approx(direct.energy, abs=1e-6)


def test_a_version_that_was_found_out_counts_as_major_and_minor() -> None:
    physics = load_oracle("ase", EMT).physics()
    assert load_oracle("ase", EMT).code.startswith(physics["code"] + ".")
    typed = load_oracle("ase", EMT | {"code": "EMT 3.29.0-patched"})
    assert typed.physics()["code"] == "EMT 3.29.0-patched"
    assert fingerprint(typed) != fingerprint(load_oracle("ase", EMT))


@pytest.mark.skipif(shutil.which("mopac") is None, reason="needs the program mopac")
def test_a_real_program_with_files(tmp_path: Path) -> None:
    """MOPAC through ASE: its own folder, its log as evidence, its version given by hand."""
    oracle = load_oracle(
        "ase",
        {
            "calculator": "ase.calculators.mopac:MOPAC",
            "code": "MOPAC 22.0.6",
            "arguments": {
                "label": "water",
                "directory": str(tmp_path),
                "task": "1SCF GRADIENTS",
                "method": "PM7",
                "relscf": 1e-4,
            },
            "convergence": "regex:water.out:SCF FIELD WAS ACHIEVED",
            "stress": False,
        },
    )
    frame = replace(WATER, cell=None)
    result = label(oracle, frame)
    assert "SCF FIELD WAS ACHIEVED" in result.evidence
    h = 1e-2
    ends = [frame.positions.copy(), frame.positions.copy()]
    ends[0][0, 1, 0] += h
    ends[1][0, 1, 0] -= h
    up, down = (label(oracle, replace(frame, positions=x)).energy for x in ends)
    assert -(up - down) / (2 * h) == pytest.approx(result.forces[1, 0], abs=1e-2)


@pytest.mark.dft
def test_plane_waves_with_stress(tmp_path: Path) -> None:
    """GPAW through ASE, which has the getters only: derivatives by finite differences, and an SCF that runs out of cycles."""
    pytest.importorskip("gpaw")
    arguments = {
        "mode": {"name": "pw", "ecut": 250}, "kpts": [2, 2, 2], "symmetry": "off", "txt": str(tmp_path / "gpaw.txt"),
        "convergence": {"energy": 1e-6, "density": 1e-6},
    }  # fmt: skip
    settings = {"calculator": "gpaw:GPAW", "convergence": "exception", "mechanics": ["txt"]}
    oracle = load_oracle("ase", settings | {"arguments": arguments})
    cell = np.array([[0.05, 2.75, 2.70], [2.71, 0.02, 2.74], [2.72, 2.69, -0.03]])
    frame = Frames(np.array([14, 14]), np.array([[[0.1, -0.05, 0.08], [1.36, 1.36, 1.36]]]), cell[None])
    oracle.check(frame)
    result, h = label(oracle, frame), 2e-3

    def slope(change: Callable[[float], Frames]) -> float:
        return (label(oracle, change(h)).energy - label(oracle, change(-h)).energy) / (2 * h)

    def moved(h: float) -> Frames:
        return replace(frame, positions=frame.positions + np.array([[0, h, 0], [0, 0, 0]]))

    def sheared(h: float) -> Frames:
        turn = np.eye(3) + h * np.eye(3, k=1)[[0, 2, 2]]  # xy alone
        return replace(frame, positions=frame.positions @ turn.T, cell=frame.cell @ turn.T)

    # a plane-wave basis that does not follow the strain costs 5e-5 eV/Å^3 here
    assert -slope(moved) == pytest.approx(result.forces[0, 1], abs=1e-3)
    assert slope(sheared) / volume(cell) == pytest.approx(result.stress[0, 1], abs=3e-4)
    with pytest.raises(SCFNotConverged, match="KohnShamConvergenceError"):
        label(load_oracle("ase", settings | {"arguments": arguments | {"maxiter": 3}}), frame)
