"""A potential with few sampled weights is the whole one with the other weights at θ_0."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import VARIANTS, crystals, members, molecules, random_mace

from bnn_driver.errors import ModelError
from bnn_driver.potential import subspace
from bnn_driver.potential.contract import Evaluation
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.export import export_mace, to_mace
from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import Graph, build_graph
from bnn_driver.potential.mace import load_mace
from bnn_driver.potential.modules import ModulesPotential
from bnn_driver.potential.params import unstack_weights
from bnn_driver.potential.planning import Plan
from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.potential.subspace import SubspacePotential, sampled_names
from bnn_driver.potential.trunk import KnownFrames
from bnn_driver.records import Frames

CPU = torch.device("cpu")
MODES: list[Any] = ["last-interaction", "readout"]
FIELDS = ("energy", "forces", "virial", "features")
KINDS = pytest.mark.parametrize("frames", [molecules(3), crystals(3)], ids=["molecules", "small triclinic cells"])
Weights = dict[str, torch.Tensor]


@functools.cache
def whole_one(name: str) -> StackedPotential:
    """The whole potential of a variant."""
    module, head = random_mace(**VARIANTS[name]), int("heads" in name)
    whole = make_potential(module, [1, 6, 8], torch.float64, CPU, path="stacked", head=head)
    assert isinstance(whole, StackedPotential)
    return whole


def both(mode: Any, name: str = "residual") -> tuple[StackedPotential, SubspacePotential]:
    """The whole potential, and a new one with few sampled weights."""
    return whole_one(name), SubspacePotential(whole_one(name), mode)


def completed(whole: StackedPotential, weights: Weights) -> Weights:
    """The sampled weights and θ_0."""
    count = len(next(iter(weights.values())))
    return {name: weights.get(name, x.expand(count, *x.shape).clone()) for name, x in whole.weights.items()}


def graph_of(frames: Frames, potential: Any) -> Graph:
    return build_graph(frames, potential.cutoff, potential.dtype, CPU)


def assert_equal(a: Evaluation, b: Evaluation, tolerance: float = 1e-10) -> None:
    """Rounding in float64 alone, of the largest value."""
    for field in FIELDS:
        x, y = getattr(a, field).detach(), getattr(b, field).detach()
        assert x.shape == y.shape, field
        assert (x - y).abs().max() <= tolerance * max(1.0, float(y.abs().max())), field


def gradient(e: Evaluation, leaves: Weights, names: tuple[str, ...]) -> Weights:
    """Gradient of a loss on energies, forces, virials and features."""
    target = torch.linspace(-1, 1, e.forces.numel(), dtype=e.forces.dtype).view(e.forces.shape)
    loss = ((e.forces - target) ** 2).sum() + 1e-5 * (e.energy**2).sum() + (e.virial**2).sum() + (e.features**2).sum()
    found = torch.autograd.grad(loss, [leaves[name] for name in names], materialize_grads=True)
    return dict(zip(names, found, strict=True))


def differentiable(weights: Weights) -> Weights:
    return {name: x.clone().requires_grad_(True) for name, x in weights.items()}


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("mode", MODES)
@KINDS
def test_evaluation_equals_the_whole_network(mode: Any, name: str, frames: Frames) -> None:
    whole, part = both(mode, name)
    weights = members(part.weights, 3)
    graph = graph_of(frames, whole)
    expected = whole.evaluate(completed(whole, weights), graph)
    assert_equal(part.evaluate(part.prepare(weights), graph), expected)
    assert_equal(part.evaluate(weights, graph), expected)
    assert (expected.forces[0] - expected.forces[1]).abs().max() > 1e-4, "the members differ"


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("mode", MODES)
@KINDS
def test_training_equals_the_whole_network_with_own_frames_per_member(mode: Any, name: str, frames: Frames) -> None:
    whole, part = both(mode, name)
    weights, names = members(part.weights, 3), tuple(part.weights)
    graph = graph_of(frames, whole)
    index = torch.tensor([[0, 2], [1, 0], [2, 2]])
    ours, all_leaves = differentiable(weights), differentiable(completed(whole, weights))
    a = part.evaluate(ours, part.prepare_frames(graph).take(index), create_graph=True)
    b = whole.evaluate(all_leaves, graph.take(index), create_graph=True)
    assert_equal(a, b)
    found, expected = gradient(a, ours, names), gradient(b, all_leaves, names)
    scale = max(float(g.abs().max()) for g in expected.values())
    for block, g in expected.items():
        assert (found[block] - g).abs().max() <= 1e-10 * scale, block
    assert scale > 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_groups_of_members_and_frames_give_the_same_numbers(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, part = both(mode)
    frames, weights = crystals(5), members(part.weights, 4)
    expected = whole.evaluate(completed(whole, weights), graph_of(frames, whole))
    prepared = part.prepare(weights)
    for split in (Plan(1, 1), Plan(3, 2), Plan(4, 5), Plan(1, 5)):
        monkeypatch.setattr(subspace, "plan", lambda *_, split=split: split)
        assert_equal(part.evaluate(prepared, graph_of(frames, part)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_labels_that_are_known_are_not_computed_again(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    part, fresh = both(mode)[1], both(mode)[1]
    frames = crystals(5)
    assert frames.cell is not None
    computed: list[int] = []
    known = type(part.trunk).known
    monkeypatch.setattr(type(part.trunk), "known", lambda self, g: (computed.append(g.lead[0]), known(self, g))[1])
    moved = frames.positions.copy()
    moved[1] += 0.1
    strained = frames.cell.copy()
    strained[3] *= 1.01
    for positions, cell, new in [
        (frames.positions[:2], frames.cell[:2], 2),
        (frames.positions, frames.cell, 3),
        (moved, frames.cell, 4),
        (moved, strained, 2),
    ]:
        graph = graph_of(Frames(frames.numbers, positions, cell), part)
        kept = part.prepare_frames(graph)
        assert computed.pop() == new
        again = fresh.trunk.known(graph) if fresh.trunk else graph
        computed.clear()
        for x, y in zip(kept.tensors(), again.tensors(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_what_does_not_fit_into_memory_is_said_and_evaluated_whole(
    mode: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, part = both(mode)
    monkeypatch.setattr(subspace, "free_memory", lambda _: 1000)
    graph = graph_of(molecules(2), part)
    with caplog.at_level(logging.WARNING):
        plain = part.prepare_frames(graph)
    assert not isinstance(plain, KnownFrames)
    assert "every step of the chains" in caplog.text
    weights = members(part.weights, 2)
    ours, all_leaves = differentiable(weights), differentiable(completed(whole, weights))
    a = part.evaluate(ours, plain, create_graph=True)
    b = whole.evaluate(all_leaves, graph, create_graph=True)
    assert_equal(a, b)
    names = tuple(weights)
    for block, g in gradient(b, all_leaves, names).items():
        torch.testing.assert_close(gradient(part.evaluate(ours, plain, create_graph=True), ours, names)[block], g)


def test_the_jacobian_is_the_derivative_of_the_outputs() -> None:
    """Central differences of X with positions and cell: error h², about 1e-8 here."""
    part = both("last-interaction")[1]
    assert part.trunk is not None
    frames = crystals(1)
    assert frames.cell is not None
    known = part.trunk.known(graph_of(frames, part))
    h, width = 1e-4, part.trunk.split.first_sum

    def outputs(positions: np.ndarray, cell: np.ndarray) -> torch.Tensor:
        assert part.trunk is not None
        return part.trunk.known(graph_of(Frames(frames.numbers, positions, cell), part)).outputs[0, :, :width].reshape(-1)

    for column, (atom, axis) in ((1, (0, 1)), (8, (2, 2))):
        step = np.zeros_like(frames.positions)
        step[0, atom, axis] = h
        slope = (outputs(frames.positions + step, frames.cell) - outputs(frames.positions - step, frames.cell)) / (2 * h)
        torch.testing.assert_close(known.slopes[0, :, column], slope, rtol=0, atol=1e-6)
    strain = np.zeros((3, 3))
    strain[0, 1] = strain[1, 0] = 0.5 * h
    up, down = np.eye(3) + strain, np.eye(3) - strain
    slope = (outputs(frames.positions @ up, frames.cell @ up) - outputs(frames.positions @ down, frames.cell @ down)) / (2 * h)
    torch.testing.assert_close(known.slopes[0, :, 9 + 3], slope, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_maces_own_code_moves_the_same_weights(mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    whole, part = both(mode)
    module = whole.module
    with caplog.at_level(logging.WARNING):
        slow = make_potential(module, [1, 6, 8], torch.float64, CPU, path="modules", sampled=mode)
    assert isinstance(slow, ModulesPotential)
    assert "saves no time" in caplog.text
    assert slow.weights.keys() == part.weights.keys()
    assert slow.never_sampled == part.never_sampled
    weights, graph, names = members(part.weights, 2), graph_of(crystals(2), part), tuple(part.weights)
    assert_equal(part.evaluate(weights, graph), slow.evaluate(weights, graph))
    ours, theirs = differentiable(weights), differentiable(weights)
    a = gradient(part.evaluate(ours, part.prepare_frames(graph), create_graph=True), ours, names)
    b = gradient(slow.evaluate(theirs, graph, create_graph=True), theirs, names)
    scale = max(float(g.abs().max()) for g in b.values())
    assert all((a[name] - b[name]).abs().max() <= 1e-10 * scale for name in names)


def test_which_weights_move() -> None:
    whole, part = both("last-interaction")
    assert {name.rsplit(".", 1)[0].split(".")[0] for name in part.weights} == {"interactions", "products", "readouts"}
    assert all(name.startswith(("interactions.1.", "products.1.", "readouts.")) for name in part.weights)
    assert set(both("readout")[1].weights) == {name for name in whole.weights if name.startswith("readouts.")}
    assert any("interactions.0.*: sampled = last-interaction" in reason for reason in part.never_sampled)
    assert "1 of 2 layers" in part.path
    with pytest.raises(ModelError, match='use sampled = "all"'):
        sampled_names({"interactions.0.weight": torch.zeros(1)}, "readout", 1)


def test_the_ensemble_swaps_generations_of_the_subspace_and_refuses_others() -> None:
    whole, part = both("readout")
    first, second = members(part.weights, 3), members(part.weights, 3, seed=1)
    ensemble, frames = Ensemble(part, first, 1, None), molecules(2)
    before = ensemble.predict(frames)
    ensemble.swap({name: x.numpy() for name, x in second.items()}, 2)
    after = ensemble.predict(frames)
    expected = Ensemble(whole, completed(whole, second), 2, None).predict(frames)
    assert np.abs(after.forces - expected.forces).max() < 1e-12
    assert np.abs(after.energy - expected.energy).max() < 1e-10
    assert np.abs(after.energy - before.energy).max() > 1e-3
    with pytest.raises(ModelError, match="do not fit"):
        ensemble.swap(completed(whole, second), 3)


@pytest.mark.parametrize("path", ["stacked", "modules"])
@pytest.mark.parametrize("mode", MODES)
def test_an_exported_member_is_a_whole_model(tmp_path: Path, mode: Any, path: Any) -> None:
    module = random_mace(elements=(1, 6, 7, 8))
    part = make_potential(module, [1, 6, 8], torch.float64, CPU, path=path, sampled=mode)
    weights, frames = members(part.weights, 2), crystals(1)
    graph = graph_of(frames, part)
    expected = part.evaluate(weights, graph)
    for m, file in enumerate(export_mace(part, weights, tmp_path)):
        again = make_potential(load_mace(file).module, [1, 6, 8], torch.float64, CPU)
        one = again.evaluate({name: x[None] for name, x in again.weights.items()}, graph)
        assert (one.forces[0] - expected.forces[m]).abs().max() < 1e-12
    untouched = dict(to_mace(part, unstack_weights(weights)[0]).named_parameters())["interactions.0.linear_up.weight"]
    assert torch.equal(untouched, dict(module.named_parameters())["interactions.0.linear_up.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled_evaluation_equals_the_plain_one(mode: Any) -> None:
    module = random_mace(hidden="4x0e", max_ell=1, radial_MLP=[8])
    plain = make_potential(module, [1, 6, 8], torch.float64, CPU, path="stacked", sampled=mode)
    assert isinstance(plain, SubspacePotential)
    fast = make_potential(module, [1, 6, 8], torch.float64, CPU, path="stacked", compile="on", sampled=mode)
    weights = members(plain.weights, 2)
    for seed in range(3):
        graph = build_graph(molecules(2, seed), plain.cutoff, torch.float64, CPU, rounded=True)
        assert_equal(fast.evaluate(fast.prepare(weights), graph), plain.evaluate(weights, graph), 1e-12)
    assert fast.compiler.compiled >= 1
