"""One suite over every oracle: a label is the exact derivative of one energy surface, or there is no label."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracle_subjects import SUBJECTS, Subject

from bnn_driver.errors import GeometryRejected, OracleConfigError, SCFNotConverged
from bnn_driver.executors import LocalExecutor
from bnn_driver.oracle import Limits, Oracle, fingerprint, label, label_from_json, label_to_json
from bnn_driver.records import Array, Frames, Label

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:pyscf")]
ROTATION = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
THREADS = 1e-9
"""eV and eV/Å: what sums in another order may differ by, where this process has more threads than a worker."""


@pytest.fixture(
    params=[pytest.param(s, marks=pytest.mark.dft) if s.kind.startswith("pyscf") else s for s in SUBJECTS],
    ids=[s.name for s in SUBJECTS],
)
def subject(request: pytest.FixtureRequest) -> Subject:
    return request.param


def molecule(subject: Subject) -> Frames:
    """The subject's atoms, alone where it knows molecules."""
    return subject.crystal if subject.crystals_only else replace(subject.crystal, cell=None)


def one_atom(subject: Subject, place: float) -> Frames:
    """In a crystal at the origin, where the images and the grid are the same on all sides."""
    if subject.crystals_only:
        return Frames(np.array([subject.atom]), np.zeros((1, 1, 3)), subject.crystal.cell)
    return Frames(np.array([subject.atom]), np.array([[[place, 2 * place, 3 * place]]]))


def richest(subject: Subject, oracle: Oracle) -> Frames:
    """The frame whose label has most in it."""
    return subject.crystal if oracle.capabilities.periodic else molecule(subject)


def energy(oracle: Oracle, frame: Frames) -> float:
    return label(oracle, frame).energy


def slope(function: Callable[[float], float], step: float) -> float:
    return (function(step) - function(-step)) / (2 * step)


def moved(frame: Frames, atom: int, axis: int, distance: float) -> Frames:
    positions = frame.positions.copy()
    positions[0, atom, axis] += distance
    return replace(frame, positions=positions)


def transformed(frame: Frames, matrix: Array, shift: float = 0.0) -> Frames:
    cell = None if frame.cell is None else frame.cell @ matrix.T
    return replace(frame, positions=frame.positions @ matrix.T + shift, cell=cell)


def strained(frame: Frames, row: int, column: int, strain: float) -> Frames:
    deformation = np.eye(3)
    deformation[row, column] += strain
    return transformed(frame, deformation)


def assert_forces_are_slopes(oracle: Oracle, frame: Frames, subject: Subject) -> None:
    forces = label(oracle, frame).forces
    numerical = [
        [-slope(lambda h, a=a, x=x: energy(oracle, moved(frame, a, x, h)), subject.step) for x in range(3)]
        for a in range(len(frame.numbers))
    ]
    np.testing.assert_allclose(forces, numerical, rtol=0, atol=subject.force_tolerance)
    assert np.abs(forces).max() > 100 * subject.force_tolerance


def assert_same(one: Label, other: Label, tolerance: float) -> None:
    """Same numbers, of the same frame."""
    assert one.energy == pytest.approx(other.energy, rel=0, abs=tolerance)
    np.testing.assert_allclose(one.forces, other.forces, rtol=0, atol=tolerance)
    assert (one.stress is None) == (other.stress is None)
    if one.stress is not None:
        np.testing.assert_allclose(one.stress, other.stress, rtol=0, atol=tolerance)


def assert_refused(oracle: Oracle, frame: Frames, what: str) -> None:
    """By the check at the start of a run, and by the label."""
    with pytest.raises(OracleConfigError, match=what):
        oracle.check(frame)
    with pytest.raises(OracleConfigError, match=what):
        label(oracle, frame)


def test_forces_are_minus_the_slope_of_the_energy(subject: Subject) -> None:
    assert_forces_are_slopes(subject.oracle(), molecule(subject), subject)


def test_forces_in_a_triclinic_cell_are_slopes_too(subject: Subject) -> None:
    oracle = subject.oracle()
    if subject.crystals_only:
        pytest.skip("the test above was of the cell")
    if oracle.capabilities.periodic:
        assert_forces_are_slopes(oracle, subject.crystal, subject)
    else:
        assert_refused(oracle, subject.crystal, "molecules only.*periodic")


def test_stress_is_the_slope_by_strain_per_volume(subject: Subject) -> None:
    oracle = subject.oracle()
    if not oracle.capabilities.stress:
        pytest.skip("labels of this oracle carry no stress")
    frame = subject.crystal
    volume = abs(np.linalg.det(frame.cell[0]))
    numerical = [
        [slope(lambda h, i=i, j=j: energy(oracle, strained(frame, i, j, h)), subject.step) / volume for j in range(3)]
        for i in range(3)
    ]
    stress = label(oracle, frame).stress
    # a strain of h moves atoms by about h * 4 Å in a volume of 60 to 100 Å^3: the noise of a force, divided by some 20 Å^2
    np.testing.assert_allclose(stress, numerical, rtol=0, atol=subject.force_tolerance / 10)
    # all six components count: had two of them changed places, or signs, they would differ by more than the tolerance
    six = stress[np.triu_indices(3)]
    apart = np.abs(six[:, None] - six[None, :])[np.triu_indices(6, 1)]
    assert min(apart.min(), np.abs(six).max()) > subject.force_tolerance / 10


def test_a_cell_is_only_a_choice_of_images(subject: Subject) -> None:
    oracle = subject.oracle()
    if not oracle.capabilities.periodic:
        pytest.skip("molecules only")
    cell, away = subject.crystal.cell[0], subject.crystal.positions.copy()
    away[0, 1] += cell[0] - 2 * cell[2]
    near, far = label(oracle, subject.crystal), label(oracle, replace(subject.crystal, positions=away))
    assert_same(near, far, subject.invariance)


def test_the_order_of_the_atoms_is_irrelevant(subject: Subject) -> None:
    oracle, frame = subject.oracle(), molecule(subject)
    order = np.roll(np.arange(len(frame.numbers)), 1)
    plain = label(oracle, frame)
    shuffled = label(oracle, replace(frame, numbers=frame.numbers[order], positions=frame.positions[:, order]))
    assert_same(shuffled, replace(plain, forces=plain.forces[order]), subject.invariance)


@pytest.mark.parametrize(("matrix", "shift"), [(np.eye(3), 7.3), (ROTATION, -2.0)], ids=["translated", "rotated"])
def test_forces_and_stress_turn_with_the_atoms(subject: Subject, matrix: Array, shift: float) -> None:
    oracle = subject.oracle()
    for frame in (molecule(subject), richest(subject, oracle))[subject.crystals_only :]:
        plain, turned = label(oracle, frame), label(oracle, transformed(frame, matrix, shift))
        stress = None if plain.stress is None else matrix @ plain.stress @ matrix.T
        assert_same(turned, replace(plain, forces=plain.forces @ matrix.T, stress=stress), subject.invariance + subject.egg_box)


def test_the_charge_reaches_the_code_or_is_refused(subject: Subject) -> None:
    oracle = subject.oracle()
    if oracle.capabilities.charge:
        assert abs(energy(oracle, subject.ion) - energy(oracle, replace(subject.ion, charge=subject.other_charge))) > 1e-3
    else:
        assert_refused(oracle, replace(molecule(subject), charge=1), r"charge is \+1")


def test_the_multiplicity_reaches_the_code_or_is_refused(subject: Subject) -> None:
    oracle, triplet = subject.oracle(), replace(molecule(subject), multiplicity=3)
    if oracle.capabilities.spin:
        assert abs(energy(oracle, triplet) - energy(oracle, molecule(subject))) > 1e-3
    else:
        assert_refused(oracle, triplet, "multiplicity 1 only, but 3")


def test_one_atom_feels_no_force(subject: Subject) -> None:
    np.testing.assert_allclose(label(subject.oracle(), one_atom(subject, 0.1)).forces, np.zeros((1, 3)), atol=1e-9)


def test_a_label_depends_on_its_frame_only(subject: Subject) -> None:
    """Not on frames of the same and of other atoms that came before: to the last bit, but where a running code starts warm."""
    assert_forgetful(subject, subject.oracle(), subject.memory)
    if subject.memory:
        assert_forgetful(subject, subject.oracle(**subject.forgetful), 0.0)


def assert_forgetful(subject: Subject, oracle: Oracle, tolerance: float) -> None:
    frame = richest(subject, oracle)
    first = label(oracle, frame)
    label(oracle, moved(frame, 1, 0, 0.1))
    again = label(oracle, frame)
    label(oracle, one_atom(subject, 0.0))
    for other in (again, label(oracle, frame), label(subject.oracle(), frame)):
        assert_same(other, first, tolerance)


def test_a_fresh_process_gives_the_same_label(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).resolve().parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here.parents[1]), str(here), os.environ.get("PYTHONPATH", "")]))
    oracle = subject.oracle()
    frame = richest(subject, oracle)
    with LocalExecutor(subject.kind, subject.settings, 1, 120.0, tmp_path / "work", 1, tmp_path / "spool") as executor:
        there = executor.submit(frame).result()
    assert_same(there, label(oracle, frame), THREADS)
    assert there.fingerprint == fingerprint(oracle)
    assert there.frame_id == frame.content_id(fingerprint(oracle))


def test_the_frame_is_left_as_it_was(subject: Subject) -> None:
    oracle = subject.oracle()
    frame = richest(subject, oracle)
    before = frame.content_id(""), frame.positions.tobytes()
    label(oracle, frame)
    assert (frame.content_id(""), frame.positions.tobytes()) == before


def test_a_label_says_where_it_comes_from(subject: Subject) -> None:
    oracle, frame = subject.oracle(), molecule(subject)
    result = label(oracle, frame)
    assert result.code == oracle.code
    assert any(digit in result.code for digit in "0123456789")
    assert result.fingerprint == fingerprint(oracle)
    assert result.frame_id == frame.content_id(fingerprint(oracle))
    assert result.evidence
    assert result.rung == 0
    assert result.seconds > 0


def test_a_label_survives_json_to_the_last_bit(subject: Subject) -> None:
    oracle = subject.oracle()
    result = label(oracle, richest(subject, oracle))
    again = label_from_json(label_to_json(result))
    assert_same(again, result, 0.0)
    assert replace(again, forces=None, stress=None).__dict__ == replace(result, forces=None, stress=None).__dict__


def test_every_setting_is_either_physics_or_mechanics(subject: Subject) -> None:
    plain = subject.oracle()
    names = [fingerprint(subject.oracle(**{key: value})) for key, value in subject.physics.items()]
    assert len({fingerprint(plain), *names}) == len(names) + 1
    for key, value in (*subject.mechanics.items(), *subject.spelt.items()):
        assert fingerprint(subject.oracle(**{key: value})) == fingerprint(plain), key
    named = {f.name for f in dataclasses.fields(plain) if f.init}
    assert named == subject.physics.keys() | subject.mechanics.keys() | subject.settings.keys() | subject.elsewhere


@pytest.mark.parametrize("spoil", ["close", "nan", "batch"])
def test_an_unfit_frame_is_refused_before_it_costs_anything(subject: Subject, spoil: str) -> None:
    oracle, frame = subject.oracle(), molecule(subject)
    if spoil == "batch":
        with pytest.raises(OracleConfigError, match="batch of 2"):
            label(oracle, frame[np.array([0, 0])])
        return
    wrong = frame.positions.copy()
    wrong[0, 1] = wrong[0, 0] + 0.1 if spoil == "close" else np.nan
    with pytest.raises(GeometryRejected, match="apart" if spoil == "close" else "finite"):
        label(oracle, replace(frame, positions=wrong))


def test_absurd_forces_are_refused(subject: Subject) -> None:
    with pytest.raises(GeometryRejected, match="force on atom"):
        label(subject.oracle(), molecule(subject), Limits(max_force=0.01))


def test_what_did_not_converge_is_no_label(subject: Subject) -> None:
    if not subject.unconverged:
        pytest.skip("a closed formula")
    oracle = subject.oracle(**subject.unconverged)
    with pytest.raises(SCFNotConverged):
        label(oracle, molecule(subject))


def test_the_check_passes_what_can_be_labelled(subject: Subject) -> None:
    oracle = subject.oracle()
    oracle.check(molecule(subject))
    oracle.check(richest(subject, oracle))
    if oracle.capabilities.charge:
        oracle.check(subject.ion)
