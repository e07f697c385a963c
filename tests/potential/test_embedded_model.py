"""The shipped model: it loads, and it stays near GFN2-xTB where its card says so; that it is a potential is tested with the oracles."""

from __future__ import annotations

import importlib.util
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule

# mace registers TorchScript classes and reads its model by pickle; both warn
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:mace", "ignore::UserWarning:e3nn", "ignore::UserWarning:torch")

ZUNDEL = Atoms(
    "OH2OH2H",
    [
        [-1.2, 0.0, 0.0],
        [-1.55, 0.78, 0.43],
        [-1.55, -0.78, 0.43],
        [1.2, 0.0, 0.0],
        [1.55, 0.43, -0.78],
        [1.55, 0.43, 0.78],
        [0.0, 0.0, 0.0],
    ],
)

WATER_DIMER = Atoms(  # hydrogen-bonded, O-O 2.9 Å
    "OH2OH2",
    [[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0], [2.9, 0.0, 0.0], [3.35, -0.3, 0.78], [3.35, -0.3, -0.78]],
)
SHARED_PROTON = ZUNDEL.copy()  # O-O 3.0 Å, the proton 0.4 Å from the middle: far from any minimum
SHARED_PROTON.positions[:3] += [-0.3, 0, 0]
SHARED_PROTON.positions[3:6] += [0.3, 0, 0]
SHARED_PROTON.positions[6] += [0.4, 0, 0]


@pytest.fixture(scope="module")
def calculator():
    """MACECalculator on the shipped file."""
    calculators = pytest.importorskip("mace.calculators")
    torch.set_num_threads(1)
    with as_file(files("bnn_driver") / "data" / "embedded.model") as path:
        yield calculators.MACECalculator(model_paths=str(path), device="cpu", default_dtype="float64")


def evaluated(atoms: Atoms, positions: np.ndarray, calculator) -> tuple[float, np.ndarray]:
    """Energy eV and forces eV/Å at the positions."""
    moved = Atoms(atoms.numbers, positions)
    moved.calc = calculator
    return moved.get_potential_energy(), moved.get_forces()


def test_the_model_covers_hydrogen_carbon_nitrogen_and_oxygen_in_double_precision_and_is_small(calculator):
    model = calculator.models[0]
    assert model.atomic_numbers.tolist() == [1, 6, 7, 8]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert (files("bnn_driver") / "data" / "embedded.model").stat().st_size < 6e6


def test_an_isolated_atom_has_exactly_its_reference_energy(calculator):
    model = calculator.models[0]
    for number, reference in zip([1, 6, 7, 8], model.atomic_energies_fn.atomic_energies.ravel().tolist(), strict=True):
        energy, _ = evaluated(Atoms([number]), np.zeros((1, 3)), calculator)
        # exact up to rounding of a sum of about 1e3 eV
        assert energy == pytest.approx(reference, abs=1e-10)


def test_the_energy_written_out_for_training_is_that_of_mace(calculator):
    source = Path(__file__).resolve().parents[2] / "examples" / "foundation" / "fast.py"
    if not source.exists():
        pytest.skip("needs a checkout with examples")
    spec = importlib.util.spec_from_file_location("foundation_fast", source)
    fast = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fast)
    atoms = molecule("CH3CONH2")
    atoms = atoms[np.argsort(atoms.numbers, kind="stable")]
    expected_energy, expected_forces = evaluated(atoms, atoms.positions, calculator)
    apart = atoms.get_all_distances()
    receiver, sender = (torch.as_tensor(k) for k in np.nonzero((apart < 4.5) & (apart > 0)))
    counts = [int(np.sum(atoms.numbers == z)) for z in (1, 6, 7, 8)]
    positions = torch.tensor(atoms.positions, requires_grad=True)
    frame = torch.zeros(len(atoms), dtype=torch.long)
    potential = fast.ScalarMACE(calculator.models[0])
    energy = potential.energy(counts, positions[receiver] - positions[sender], sender, receiver, frame, 1).sum()
    (pull,) = torch.autograd.grad(energy, positions)
    reference = calculator.models[0].atomic_energies_fn.atomic_energies.ravel().numpy() @ counts
    # the same sums in another order
    assert energy.item() + reference == pytest.approx(expected_energy, abs=1e-9)
    np.testing.assert_allclose(-pull.numpy(), expected_forces, atol=1e-9)


@pytest.mark.parametrize(
    ("atoms", "charge", "noise", "force_bound", "energy_bound"),
    [
        (molecule("CH3CH2OH"), 0, 0.05, 0.19, 0.003),
        (WATER_DIMER, 0, 0.04, 0.052, 0.0013),
        (ZUNDEL, 1, 0.04, 0.045, 0.0013),
        (SHARED_PROTON, 1, 0.04, 0.09, 0.003),
    ],
    ids=["ethanol", "water dimer", "H5O2+", "H5O2+ stretched"],
)
def test_errors_against_fresh_labels_stay_below_twice_those_measured_when_it_was_made(
    calculator, atoms, charge, noise, force_bound, energy_bound
):
    interface = pytest.importorskip("tblite.interface")
    rng = np.random.default_rng(11)
    energy_errors, force_errors = [], []
    for _ in range(7):
        positions = atoms.positions + noise * rng.standard_normal(atoms.positions.shape)
        gfn2 = interface.Calculator("GFN2-xTB", atoms.numbers, positions / units.Bohr, charge=float(charge))
        gfn2.set("verbosity", 0)
        result = gfn2.singlepoint()
        energy, forces = evaluated(atoms, positions, calculator)
        energy_errors.append((energy - result.get("energy") * units.Hartree) / len(atoms))
        force_errors.append(forces + result.get("gradient") * units.Hartree / units.Bohr)
    # measured: 0.094, 0.026, 0.022, 0.043 eV/Å and 1.5, 0.6, 0.6, 1.4 meV/atom; the bounds are twice that
    assert np.sqrt(np.mean(np.square(force_errors))) < force_bound
    assert np.sqrt(np.mean(np.square(energy_errors))) < energy_bound
