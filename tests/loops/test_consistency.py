"""Energies and their derivatives are told apart when they do not belong together, and only then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk, molecule

from bnn_driver.loops.consistency import FORCE_TOLERANCE, STRESS_TOLERANCE, Line, lines
from bnn_driver.oracle import Oracle, label, load_oracle
from bnn_driver.records import Frames, Label

Fault = Callable[[Label], Label]


def ethanol() -> Frames:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return Frames(atoms.numbers, atoms.positions[None])


def silicon() -> Frames:
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.05, seed=1)
    return Frames(atoms.numbers, atoms.positions[None], atoms.cell.array[None])


def deviations(oracle: Oracle, frame: Frames, fault: Fault = lambda x: x) -> list[tuple[Line, float]]:
    centre = fault(label(oracle, frame))
    found = []
    for line in lines(frame, centre.forces, centre.stress is not None, 3):
        minus, plus = (fault(label(oracle, line.at(s))) for s in (-line.h, line.h))
        found.append((line, line.deviation(minus, centre, plus)))
    return found


@pytest.mark.parametrize("kind", ["toy", "tblite"])
@pytest.mark.parametrize("frame", [ethanol(), silicon()], ids=["molecule", "crystal"])
def test_codes_that_are_right_pass_with_room_to_spare(kind: str, frame: Frames) -> None:
    found = deviations(load_oracle(kind, {}), frame)
    assert [line.what for line, _ in found] == ["forces", "forces"] + (["stress"] if frame.periodic else [])
    for line, deviation in found:
        assert deviation < line.tolerance / 5


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: replace(x, forces=1.02 * x.forces),
        lambda x: replace(x, forces=-x.forces),
        lambda x: replace(x, energy=0.98 * x.energy),
        lambda x: replace(x, forces=x.forces[::-1].copy()),
    ],
    ids=["scaled forces", "gradient for forces", "scaled energy", "order of the atoms"],
)
def test_forces_that_belong_to_another_energy_are_noticed(fault: Fault) -> None:
    found = deviations(load_oracle("toy", {}), ethanol(), fault)
    assert max(deviation for line, deviation in found if line.what == "forces") > FORCE_TOLERANCE


def test_a_wrong_scale_is_noticed_at_a_minimum_too() -> None:
    oracle, frame = load_oracle("toy", {}), ethanol()
    for _ in range(800):
        frame = replace(frame, positions=frame.positions + 0.01 * label(oracle, frame).forces)
    assert np.abs(label(oracle, frame).forces).max() < 2e-2
    found = deviations(oracle, frame, lambda x: replace(x, forces=1.1 * x.forces))
    assert max(deviation for _, deviation in found) > FORCE_TOLERANCE


@pytest.mark.parametrize("factor", [-1.0, 1.05, 0.5291772], ids=["sign", "scale", "bohr"])
def test_a_stress_that_belongs_to_another_energy_is_noticed(factor: float) -> None:
    def fault(x: Label) -> Label:
        return replace(x, stress=None if x.stress is None else factor * x.stress)

    frame = silicon()
    squeezed = replace(frame, positions=0.95 * frame.positions, cell=None if frame.cell is None else 0.95 * frame.cell)
    found = deviations(load_oracle("toy", {}), squeezed, fault)
    assert found[-1][0].what == "stress"
    assert found[-1][1] > STRESS_TOLERANCE
    assert all(deviation < FORCE_TOLERANCE for _, deviation in found[:-1]), "the forces are right"
