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


@pytest.mark.parametrize("dispersion", ["d3bj", pytest.param("d4", marks=pytest.mark.slow)])
def test_dispersion_has_forces_and_stress(dispersion: str) -> None:
    """What is added, by finite differences: the rest is known to be exact."""
    pytest.importorskip("pyscf.dispersion")
    from oracles.pyscf_dispersion import correction

    oracle, h = crystal(dispersion=dispersion), 1e-3
    plain, corrected = label(crystal(), HYDROGEN), label(oracle, HYDROGEN)
    volume = abs(np.linalg.det(HYDROGEN.cell[0]))

    def added(frame: Frames) -> float:
        return correction(oracle._checked(frame), "pbe", dispersion).energy

    def moved(distance: float) -> Frames:
        positions = HYDROGEN.positions.copy()
        positions[0, 1, 2] += distance
        return replace(HYDROGEN, positions=positions)

    def strained(strain: float) -> Frames:
        matrix = np.eye(3)
        matrix[0, 1] += strain
        return replace(HYDROGEN, positions=HYDROGEN.positions @ matrix.T, cell=HYDROGEN.cell @ matrix.T)

    assert corrected.energy - plain.energy == pytest.approx(added(HYDROGEN), abs=1e-8)
    assert added(HYDROGEN) < -0.01
    force, stress = (corrected.forces - plain.forces)[1, 2], (corrected.stress - plain.stress)[0, 1]
    assert force == pytest.approx(-(added(moved(h)) - added(moved(-h))) / (2 * h), abs=1e-5)
    assert stress == pytest.approx((added(strained(h)) - added(strained(-h))) / (2 * h) / volume, abs=1e-5)
    assert min(abs(force), abs(stress)) > 1e-5


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
