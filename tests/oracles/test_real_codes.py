"""FHI-aims and VASP themselves, for whoever has a licence: `pytest -m needs_binary tests/oracles/test_real_codes.py`.

    BNN_AIMS_COMMAND="mpirun -n 4 aims.x"   BNN_AIMS_SPECIES=/sw/aims/species_defaults/defaults_2020/light
    BNN_VASP_COMMAND="mpirun -n 4 vasp_std" BNN_VASP_POTENTIALS=/sw/vasp/potpaw_PBE.64      (needs O, H and Si)

What stands here was never run where this project was written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnn_driver.errors import OracleConfigError, SCFNotConverged
from bnn_driver.oracle import Oracle, label, load_oracle
from bnn_driver.records import Frames

pytestmark = [pytest.mark.needs_binary, pytest.mark.slow]

#: a rattled and sheared cell of silicon, and water in a box
SILICON = Frames(
    np.array([14, 14]),
    np.array([[[0.05, -0.02, 0.03], [1.39, 1.33, 1.42]]]),
    np.array([[[0.05, 2.75, 2.72], [2.70, 0.02, 2.74], [2.69, 2.76, -0.03]]]),
)
WATER = Frames(
    np.array([1, 8, 1]),
    np.array([[[3.98, 3.07, 2.96], [3.05, 2.98, 3.03], [2.69, 3.90, 3.11]]]),
    np.array([[[6.5, 0.0, 0.0], [0.2, 6.4, 0.0], [0.0, -0.1, 6.6]]]),
)
STEP = 5e-3
"""Å, of the finite differences."""
Make = Callable[..., Oracle]


def given(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        pytest.skip(f"set {name}")
    return value


def aims(**changes: Any) -> Oracle:
    control = {
        "xc": "pbe",
        "relativistic": "atomic_zora scalar",
        "k_grid": [3, 3, 3],
        "sc_accuracy_rho": 1e-7,
        "sc_accuracy_forces": 1e-5,
    }
    control |= changes.pop("control", {})
    command, species = given("BNN_AIMS_COMMAND"), given("BNN_AIMS_SPECIES")
    return load_oracle("aims", {"command": command, "species_dir": species, "control": control, "stress": True} | changes)


def vasp(elements: tuple[str, ...] = ("Si",), **changes: Any) -> Oracle:
    incar = {
        "encut": 500,
        "ediff": 1e-8,
        "isym": 0,
        "prec": "Accurate",
        "lasph": True,
        "lreal": False,
        "ismear": 0,
        "sigma": 0.05,
    }
    incar |= changes.pop("incar", {})
    command, potentials = given("BNN_VASP_COMMAND"), given("BNN_VASP_POTENTIALS")
    settings = {"command": command, "pp_path": potentials, "potcars": {x: x for x in elements}, "incar": incar, "kpts": [3, 3, 3]}
    return load_oracle("vasp", settings | changes)


@pytest.fixture(params=["aims", "vasp"])
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return request.param


def silicon(kind: str) -> Oracle:
    return aims() if kind == "aims" else vasp()


def water(kind: str) -> Oracle:
    return aims(control={"k_grid": [1, 1, 1]}) if kind == "aims" else vasp(("O", "H"), kpts=[1, 1, 1])


def slope(energy: Callable[[float], float]) -> float:
    return (energy(STEP) - energy(-STEP)) / (2 * STEP)


def test_forces_are_slopes_of_the_energy(kind: str) -> None:
    oracle = water(kind)

    def energy(atom: int, axis: int, h: float) -> float:
        positions = WATER.positions.copy()
        positions[0, atom, axis] += h
        return label(oracle, replace(WATER, positions=positions)).energy

    forces = label(oracle, WATER).forces
    for atom, axis in ((0, 0), (1, 1), (2, 2)):
        assert forces[atom, axis] == pytest.approx(-slope(lambda h, a=atom, x=axis: energy(a, x, h)), abs=5e-3)
    assert np.abs(forces).max() > 0.1


def test_stress_is_the_slope_by_strain(kind: str) -> None:
    oracle = silicon(kind)
    volume = abs(np.linalg.det(SILICON.cell[0]))

    def energy(i: int, j: int, strain: float) -> float:
        deformation = np.eye(3)
        deformation[i, j] += strain
        moved = replace(SILICON, positions=SILICON.positions @ deformation.T, cell=SILICON.cell @ deformation.T)
        return label(oracle, moved).energy

    stress = label(oracle, SILICON).stress
    assert stress is not None
    # plane waves change in number with the cell (Pulay stress): a few kbar
    tolerance = 5e-4 if kind == "aims" else 5e-3
    for i, j in ((0, 0), (0, 1), (1, 2)):
        assert stress[i, j] == pytest.approx(slope(lambda h, i=i, j=j: energy(i, j, h)) / volume, abs=tolerance)


def test_the_order_of_the_atoms_is_irrelevant(kind: str) -> None:
    oracle, order = water(kind), np.array([1, 2, 0])
    plain = label(oracle, WATER)
    other = label(oracle, replace(WATER, numbers=WATER.numbers[order], positions=WATER.positions[:, order]))
    assert other.energy == pytest.approx(plain.energy, abs=1e-4)
    np.testing.assert_allclose(other.forces, plain.forces[order], atol=2e-3)


def test_two_iterations_are_no_label(kind: str) -> None:
    oracle = aims(control={"sc_iter_limit": 2}) if kind == "aims" else vasp(incar={"nelm": 2})
    with pytest.raises(SCFNotConverged):
        label(oracle, SILICON)


def test_a_rung_that_allows_more_iterations_rescues_the_label(kind: str) -> None:
    if kind == "aims":
        oracle = aims(control={"sc_iter_limit": 2}, ladder=[{"sc_iter_limit": 200}])
    else:
        oracle = vasp(incar={"nelm": 2}, ladder=[{"nelm": 200}])
    result = label(oracle, SILICON)
    assert result.rung == 1
    assert result.energy == pytest.approx(label(silicon(kind), SILICON).energy, abs=1e-4)


def test_charge_and_multiplicity_reach_the_code(kind: str) -> None:
    oracle = water(kind)
    singlet = label(oracle, WATER).energy
    assert label(oracle, replace(WATER, multiplicity=3)).energy > singlet + 2
    # above or below: the energy of a charged cell depends on where the code puts its zero of potential
    assert abs(label(oracle, replace(WATER, charge=1, multiplicity=2)).energy - singlet) > 1
    with pytest.raises(OracleConfigError):
        label(oracle, replace(WATER, charge=1, multiplicity=3))


def test_a_label_from_a_kept_density_is_the_cold_one(kind: str) -> None:
    warm = aims(restart=True) if kind == "aims" else vasp(restart=True)
    label(warm, SILICON)
    moved = replace(SILICON, positions=SILICON.positions + np.array([[0.02, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    second, cold = label(warm, moved), label(silicon(kind), moved)
    assert "started from the density" in second.evidence
    assert second.energy == pytest.approx(cold.energy, abs=1e-4)
    np.testing.assert_allclose(second.forces, cold.forces, atol=2e-3)


def test_a_running_code_gives_the_labels_of_cold_runs(kind: str) -> None:
    warm: Any = aims(session="socket") if kind == "aims" else vasp(session="interactive")
    for distance in (0.0, 0.02, -0.03):
        moved = replace(SILICON, positions=SILICON.positions + np.array([[distance, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        mine, cold = label(warm, moved), label(silicon(kind), moved)
        assert ("warm, frame" in mine.evidence) == (distance != 0.0)
        assert mine.energy == pytest.approx(cold.energy, abs=1e-4)
        np.testing.assert_allclose(mine.forces, cold.forces, atol=2e-3)
        np.testing.assert_allclose(mine.stress, cold.stress, atol=1e-4)
    warm.close()


def test_a_running_code_gives_no_label_of_two_iterations(kind: str) -> None:
    if kind == "aims":
        oracle: Any = aims(control={"sc_iter_limit": 2}, session="socket")
    else:
        oracle = vasp(incar={"nelm": 2}, session="interactive")
    with pytest.raises(SCFNotConverged):
        label(oracle, SILICON)


def test_the_version_is_found(kind: str) -> None:
    result = label(silicon(kind), SILICON)
    assert len(result.code.split()) > 1
    assert "version" in result.evidence
