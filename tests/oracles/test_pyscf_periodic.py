"""Crystals with PySCF: k-points against supercells, spin, dispersion, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracle_subjects import HYDROGEN, WATER

from bnn_driver.errors import OracleConfigError, OracleInconsistent
from bnn_driver.oracle import Oracle, fingerprint, label, load_oracle
from bnn_driver.records import Frames

pytest.importorskip("pyscf")
pytestmark = [pytest.mark.dft, pytest.mark.filterwarnings("ignore::UserWarning:pyscf")]


def crystal(**settings: Any) -> Oracle:
    return load_oracle(
        "pyscf_periodic",
        {"method": "rks", "xc": "pbe", "basis": "gth-szv", "pseudopotential": "gth-pbe", "mesh": [21, 21, 25]} | settings,
    )


def test_two_kpoints_are_a_doubled_cell() -> None:
    """Energy, forces and stress of a mesh of k-points are those of the supercell at Γ: a law that knows nothing of the code."""
    cell = HYDROGEN.cell[0]
    twice = Frames(
        np.array([1, 1, 1, 1]),
        np.concatenate([HYDROGEN.positions[0], HYDROGEN.positions[0] + cell[0]])[None],
        (cell * [[2], [1], [1]])[None],
    )
    small, large = label(crystal(kpoints=[2, 1, 1]), HYDROGEN), label(crystal(mesh=[42, 21, 25]), twice)
    assert large.energy / 2 == pytest.approx(small.energy, abs=1e-5)
    np.testing.assert_allclose(large.forces, np.concatenate([small.forces] * 2), atol=1e-4)
    np.testing.assert_allclose(large.stress, small.stress, atol=1e-5)
    assert abs(small.energy - label(crystal(), HYDROGEN).energy) > 0.1


def test_the_spin_is_that_of_one_cell() -> None:
    """A triplet cell at two k-points: two unpaired electrons in each cell, as at Γ, not one."""
    oracle, triplet = crystal(method="uks", kpoints=[2, 1, 1], mesh=[27, 27, 31]), replace(HYDROGEN, multiplicity=3)
    cell = oracle._checked(triplet)
    assert oracle._mean_field(cell, None).nelec == (4, 0)
    result, h = label(oracle, triplet), 1e-3
    energies = []
    for sign in (1, -1):
        moved = triplet.positions.copy()
        moved[0, 1, 0] += sign * h
        energies.append(label(oracle, replace(triplet, positions=moved)).energy)
    assert result.forces[1, 0] == pytest.approx(-(energies[0] - energies[1]) / (2 * h), abs=1e-4)
    assert result.energy > label(crystal(kpoints=[2, 1, 1]), HYDROGEN).energy + 5


def test_dispersion_is_part_of_the_label() -> None:
    pytest.importorskip("pyscf.dispersion")
    oracle = crystal(dispersion="d3bj")
    plain, corrected, added = label(crystal(), HYDROGEN), label(oracle, HYDROGEN), dispersion_of(HYDROGEN, "d3bj")
    assert corrected.energy - plain.energy == pytest.approx(added.energy, abs=1e-8)
    assert corrected.forces - plain.forces == pytest.approx(-added.gradient, abs=1e-8)
    assert corrected.stress - plain.stress == pytest.approx(added.virial / abs(np.linalg.det(HYDROGEN.cell[0])), abs=1e-8)


@pytest.mark.parametrize(("name", "scale"), [("d3bj", 1.0), ("d4", 2.0)])
def test_dispersion_has_forces_and_stress(name: str, scale: float) -> None:
    """Its own derivatives, by finite differences; D4 in a wider cell, where its sum over triples takes a fifth of a second, not a minute."""
    pytest.importorskip("pyscf.dispersion")
    frame, h = replace(HYDROGEN, cell=HYDROGEN.cell * scale), 1e-3

    def moved(distance: float) -> float:
        positions = frame.positions.copy()
        positions[0, 1, 2] += distance
        return dispersion_of(replace(frame, positions=positions), name).energy

    def strained(strain: float) -> float:
        matrix = np.eye(3)
        matrix[0, 1] += strain
        changed = replace(frame, positions=frame.positions @ matrix.T, cell=frame.cell @ matrix.T)
        return dispersion_of(changed, name).energy

    found = dispersion_of(frame, name)
    assert found.energy < -1e-3
    assert found.gradient[1, 2] == pytest.approx((moved(h) - moved(-h)) / (2 * h), abs=1e-5)
    assert found.virial[0, 1] == pytest.approx((strained(h) - strained(-h)) / (2 * h), abs=1e-5)
    assert min(abs(found.gradient[1, 2]), abs(found.virial[0, 1])) > 1e-3


def dispersion_of(frame: Frames, name: str) -> Any:
    """The correction alone; its SCF is not needed."""
    from oracles.pyscf_dispersion import correction

    return correction(crystal(dispersion=name)._checked(frame), "pbe", name)


def test_a_cutoff_is_a_mesh_and_a_coarse_one_is_refused() -> None:
    by_cutoff, by_mesh = label(crystal(mesh=[], ke_cutoff="80 hartree"), HYDROGEN), label(crystal(), HYDROGEN)
    assert by_cutoff.energy == by_mesh.energy
    assert "mesh 21x21x25" in by_cutoff.evidence
    with pytest.raises(OracleInconsistent, match="raise ke_cutoff or mesh"):
        label(crystal(mesh=[], ke_cutoff="30 hartree"), HYDROGEN)
    assert fingerprint(crystal(mesh=[], ke_cutoff="80 hartree")) != fingerprint(crystal())


def test_the_ladder_of_a_crystal_ends_where_the_plain_scf_would_have() -> None:
    settings = {"basis": "gth-dzvp"}
    plain, climbed = label(crystal(**settings), HYDROGEN), label(crystal(**settings, max_cycle=3), HYDROGEN)
    assert (plain.rung, climbed.rung) == (0, 1)
    assert "stable" in climbed.evidence
    assert climbed.energy == pytest.approx(plain.energy, abs=1e-6)
    np.testing.assert_allclose(climbed.forces, plain.forces, atol=1e-4)
    np.testing.assert_allclose(climbed.stress, plain.stress, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "frame", "expected"),
    [
        ({"xc": "pbe0"}, HYDROGEN, "a hybrid"),
        ({"xc": "hse06"}, HYDROGEN, "a hybrid"),
        ({"xc": "r2scan"}, HYDROGEN, "a MGGA"),
        ({"xc": "pbex"}, HYDROGEN, "xc = 'pbex'"),
        ({"xc": "pbe-d3bj"}, HYDROGEN, "dispersion = 'd3bj'"),
        ({"basis": "gth-nonsense"}, HYDROGEN, "gth-nonsense"),
        ({"pseudopotential": "gth-nonsense"}, HYDROGEN, "gth-nonsense"),
        ({"kpoints": [2, 2]}, HYDROGEN, "three positive numbers"),
        ({"mesh": [21, 0, 21]}, HYDROGEN, "three positive numbers"),
        ({"ke_cutoff": "80 hartree"}, HYDROGEN, "say the same"),
        ({}, replace(WATER, cell=None), "crystals only"),
        ({}, replace(HYDROGEN, multiplicity=3), "multiplicity 1 only, but 3"),
        ({"method": "uks"}, replace(HYDROGEN, multiplicity=2), "multiplicity 2"),
    ],
)
def test_settings_that_can_never_work_are_refused_by_the_check(settings: dict[str, Any], frame: Frames, expected: str) -> None:
    with pytest.raises(OracleConfigError, match=expected):
        crystal(**settings).check(frame)
