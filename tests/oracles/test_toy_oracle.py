"""The toy is smooth, keeps molecules together, and can be as slow as a real code."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

from bnn_driver.errors import OracleConfigError
from bnn_driver.oracle import label, load_oracle
from bnn_driver.records import Frames


class Adapter(Calculator):
    implemented_properties = ("energy", "forces")

    def calculate(self, atoms: Atoms, properties: list[str], system_changes: list[str] = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        result = label(load_oracle("toy", {}), Frames(atoms.numbers, atoms.positions[None]))
        self.results = {"energy": result.energy, "forces": result.forces}


def drift(step: float) -> tuple[float, float]:
    """Largest change of the total energy, eV, and the C-C distance, Å, after 50 fs of Verlet dynamics."""
    atoms = molecule("CH3CH2OH")
    atoms.calc = Adapter()
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    start, energies = atoms.get_total_energy(), []
    dynamics = VelocityVerlet(atoms, step * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()), interval=1)
    dynamics.run(round(50 / step))
    return np.abs(np.array(energies) - start).max(), atoms.get_distance(0, 1)


def test_dynamics_conserves_energy_to_second_order_and_keeps_the_molecule() -> None:
    (coarse, bond), (fine, _) = drift(0.5), drift(0.25)
    assert coarse / fine == pytest.approx(4.0, rel=0.3)
    assert fine < 0.06
    assert bond < 2.0


@pytest.mark.parametrize("distance", [6.0, 1.5 * (0.66 + 0.31)], ids=["end of pairs", "end of bonds"])
def test_forces_are_smooth_where_terms_end(distance: float) -> None:
    oracle = load_oracle("toy", {})

    def forces(x: float) -> np.ndarray:
        return label(oracle, Frames(np.array([8, 1, 1]), np.array([[[0.0, 0, 0], [0, 0.9, 0], [x, 0, 0]]]))).forces

    steps = [np.abs(forces(distance + k * 1e-4) - forces(distance + (k - 1) * 1e-4)).max() for k in (0, 1, 2)]
    assert max(steps) < 1e-2


def test_the_third_body_matters() -> None:
    """Its size is that of the formula."""
    oracle, stiff = load_oracle("toy", {"bending": "0 eV"}), load_oracle("toy", {})
    straight = Frames(np.array([8, 1, 1]), np.array([[[0.0, 0, 0], [0.97, 0, 0], [-0.97, 0, 0]]]))
    gain = label(stiff, straight).energy - label(oracle, straight).energy
    # K w² (cos 180° + 1/3)² with w = (1 - 1/1.5²)³
    assert gain == pytest.approx(1.5 * (1 - 1 / 2.25) ** 6 * (2 / 3) ** 2, rel=1e-9)


def test_two_hydrogens_do_not_bond() -> None:
    oracle = load_oracle("toy", {})
    near, far = (label(oracle, Frames(np.array([1, 1]), np.array([[[0.0, 0, 0], [x, 0, 0]]]))).energy for x in (0.74, 1.8))
    assert near > far > -0.1


def test_a_crystal_is_the_same_in_a_larger_cell() -> None:
    oracle, rng = load_oracle("toy", {}), np.random.default_rng(1)
    cell = np.diag([3.5, 3.6, 3.7]) + rng.normal(0, 0.2, (3, 3))
    atoms = Atoms("SiO", np.array([[0.1, 0.2, 0.3], [1.5, 1.3, 0.9]]), cell=cell, pbc=True)
    one = label(oracle, Frames(atoms.numbers, atoms.positions[None], cell[None]))
    large = atoms.repeat((2, 1, 2))
    four = label(oracle, Frames(large.numbers, large.positions[None], large.cell.array[None]))
    assert four.energy == pytest.approx(4 * one.energy, abs=1e-9)
    np.testing.assert_allclose(four.stress, one.stress, atol=1e-10)
    np.testing.assert_allclose(four.forces, np.tile(one.forces, (4, 1)), atol=1e-9)


def test_the_delay_is_kept_and_changes_nothing() -> None:
    helium = Frames(np.array([2, 2]), np.array([[[0.0, 0, 0], [1.2, 0, 0]]]))
    start = time.monotonic()
    slow = label(load_oracle("toy", {"delay": "0.2 s"}), helium)
    assert time.monotonic() - start >= 0.2
    fast = label(load_oracle("toy", {}), helium)
    assert replace(slow, seconds=0, forces=None).__dict__ == replace(fast, seconds=0, forces=None).__dict__


def test_a_cutoff_of_zero_is_refused() -> None:
    with pytest.raises(OracleConfigError, match="cutoff"):
        load_oracle("toy", {"cutoff": "0 A"})
