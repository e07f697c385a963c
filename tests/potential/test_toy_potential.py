"""The toy keeps the contract of a potential."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_models import crystals, members

from bnn_driver.potential.graph import build_graph
from bnn_driver.potential.toy import ToyPotential
from bnn_driver.records import Frames

CPU = torch.device("cpu")


def test_forces_virial_and_training_gradient_are_derivatives() -> None:
    toy = ToyPotential([1, 6, 8], cutoff=3.5)
    frames = crystals(1)
    assert frames.cell is not None
    weights = members(toy.weights, 1)
    assert sum(x.numel() for x in toy.weights.values()) > 50

    def energy(positions: np.ndarray, cell: np.ndarray) -> float:
        return float(toy.evaluate(weights, build_graph(Frames(frames.numbers, positions, cell), 3.5, torch.float64, CPU)).energy)

    e = toy.evaluate(weights, build_graph(frames, 3.5, torch.float64, CPU))
    h = 1e-5
    step = np.zeros_like(frames.positions)
    step[0, 1, 2] = h
    slope = (energy(frames.positions + step, frames.cell) - energy(frames.positions - step, frames.cell)) / (2 * h)
    assert float(e.forces[0, 0, 1, 2]) == pytest.approx(-slope, abs=1e-6)
    strain = np.zeros((3, 3))
    strain[0, 1] = h
    up, down = np.eye(3) + strain, np.eye(3) - strain
    slope = (energy(frames.positions @ up, frames.cell @ up) - energy(frames.positions @ down, frames.cell @ down)) / (2 * h)
    assert float(e.virial[0, 0, 0, 1]) == pytest.approx(-slope, abs=1e-6)


def test_own_frames_per_member_equal_separate_members() -> None:
    toy = ToyPotential([1, 6, 8], cutoff=3.5)
    graph = build_graph(crystals(4), 3.5, torch.float64, CPU)
    weights = members(toy.weights, 2)
    index = torch.tensor([[0, 3], [2, 1]])
    own = toy.evaluate(weights, graph.take(index))
    for m in range(2):
        one = toy.evaluate({k: x[m : m + 1] for k, x in weights.items()}, graph.take(index[m]))
        assert (own.forces[m] - one.forces[0]).abs().max() < 1e-12
