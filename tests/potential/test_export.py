"""Exported members are ordinary MACE models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from random_models import crystals, members, random_mace

from bnn_driver.errors import ModelError
from bnn_driver.potential.export import export_mace, to_mace
from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import build_graph
from bnn_driver.potential.mace import load_mace

CPU = torch.device("cpu")


@pytest.mark.parametrize("path", ["stacked", "modules"])
def test_a_calculator_on_an_exported_member_gives_its_forces(tmp_path: Path, path: Any) -> None:
    from mace.calculators import MACECalculator

    potential = make_potential(random_mace(elements=(1, 6, 7, 8)), [1, 6, 8], torch.float64, CPU, path=path)
    weights = members(potential.weights, 2)
    frames = crystals(1)
    expected = potential.evaluate(weights, build_graph(frames, potential.cutoff, torch.float64, CPU))
    for m, file in enumerate(export_mace(potential, weights, tmp_path)):
        atoms = Atoms(frames.numbers, frames.positions[0], cell=frames.cell[0], pbc=True)  # type: ignore[index]
        atoms.calc = MACECalculator(model_paths=str(file), device="cpu", default_dtype="float64")
        assert np.abs(atoms.get_forces() - expected.forces[m, 0].numpy()).max() < 1e-6
        assert atoms.get_potential_energy() == pytest.approx(float(expected.energy[m, 0]), abs=1e-6)
        stress = atoms.get_stress(voigt=False)
        assert np.abs(-stress * atoms.get_volume() - expected.virial[m, 0].numpy()).max() < 1e-6


def test_absent_elements_and_the_caller_keep_their_foundation_weights() -> None:
    module = random_mace(elements=(1, 6, 7, 8))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    potential = make_potential(module, [1, 6, 8], torch.float64, CPU)
    weights = members(potential.weights, 1)
    exported = to_mace(potential, {name: x[0] for name, x in weights.items()})
    table = exported.node_embedding.linear.weight.view(4, -1)
    old = before["node_embedding.linear.weight"].view(4, -1)
    assert torch.equal(table[2], old[2])
    assert not torch.equal(table[0], old[0])
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_reloading_an_export_and_sampling_from_it_again_gives_the_same_weights(tmp_path: Path) -> None:
    potential = make_potential(random_mace(), [1, 8], torch.float64, CPU)
    weights = members(potential.weights, 1)
    (file,) = export_mace(potential, weights, tmp_path)
    again = make_potential(load_mace(file).module, [1, 8], torch.float64, CPU)
    assert all(torch.equal(again.weights[name], x[0]) for name, x in weights.items())


def test_a_missing_weight_is_named() -> None:
    potential = make_potential(random_mace(), [1, 8], torch.float64, CPU)
    weights = dict(potential.weights)
    name = next(iter(weights))
    del weights[name]
    with pytest.raises(ModelError, match=name):
        to_mace(potential, weights)
