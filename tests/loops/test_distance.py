"""The distance to the labels: exact derivatives, exact variances, whatever the evaluator does with members and frames."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bnn_driver.bayes.laplace import Sums, energy_sd
from bnn_driver.bayes.likelihood import NoiseHead, NoiseModel
from bnn_driver.loops import distance
from bnn_driver.loops.distance import Distances, derivatives
from bnn_driver.potential.contract import Potential
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import build_graph
from bnn_driver.potential.params import repeat_weights
from bnn_driver.potential.toy import ToyPotential
from bnn_driver.records import Frames, Generation, Label, LabelledFrame, Prediction

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "potential"))
from random_models import crystals, molecules, random_mace

NOISE = NoiseModel(0.01, 0.05, 0.001, NoiseHead(8, (), ()))


def potential_of(hidden: str = "4x0e+4x1o", layers: int = 2, **more: Any) -> Potential:
    module = random_mace(hidden=hidden, max_ell=1, num_interactions=layers, radial_MLP=[8])
    return make_potential(module, [1, 6, 8], torch.float64, "cpu", **({"path": "stacked"} | more))


def labels_of(frames: Frames) -> list[LabelledFrame]:
    rng = np.random.default_rng(0)
    shape = (len(frames.numbers), 3)
    return [
        LabelledFrame(frames[i], Label(-3.0 + i, rng.normal(size=shape), None, "t", "t", f"{i:x}", "t"))
        for i in range(len(frames))
    ]


def generation_of(potential: Potential, members: int = 3) -> Generation:
    rng = np.random.default_rng(1)
    weights = {k: v.numpy() + 0.05 * rng.normal(size=v.shape) for k, v in repeat_weights(potential.weights, members).items()}
    return Generation(4, weights, ())


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("sampled", ["all", "last-interaction", "readout"])
@pytest.mark.parametrize("frames", [molecules(3), crystals(2)], ids=["molecule", "cell"])
def test_slopes_from_features_are_the_derivatives_of_the_energy(layers: int, sampled: str, frames: Frames) -> None:
    potential = potential_of(layers=layers, sampled=sampled)
    items = labels_of(frames)
    graph = build_graph(frames, potential.cutoff, potential.dtype, potential.device)
    features = potential.evaluate({k: v[None] for k, v in potential.weights.items()}, graph).features[0]
    slopes = potential.energy_slopes(features)
    for i, item in enumerate(items):
        energy, forces, rows = derivatives(potential, item.frame, range(3 * len(frames.numbers)))
        assert torch.allclose(slopes[i], rows[0], rtol=1e-9, atol=1e-11)
        result = potential.evaluate({k: v[None] for k, v in potential.weights.items()}, graph)
        assert energy == pytest.approx(float(result.energy[0, i]), rel=1e-12)
        assert torch.allclose(forces, result.forces[0, i].flatten(), atol=1e-11)


def test_derivatives_of_forces_are_those_of_finite_differences() -> None:
    """Central, 1e-4 of a weight: errors 1e-8 of the largest."""
    potential, item = potential_of(), labels_of(molecules(1))[0]
    _, _, rows = derivatives(potential, item.frame, [0, 7])
    graph = build_graph(item.frame, potential.cutoff, potential.dtype, potential.device)
    column = 0
    for name in potential.last_layer:
        for j in range(0, potential.weights[name].numel(), 5):
            pair = []
            for sign in (1, -1):
                moved = {k: v.clone()[None] for k, v in potential.weights.items()}
                moved[name].view(-1)[j] += sign * 1e-4
                pair.append(potential.evaluate(moved, graph).forces[0, 0].flatten())
            slope = (pair[0] - pair[1]) / 2e-4
            assert torch.allclose(rows[1:, column + j], slope[[0, 7]], atol=1e-7 * float(rows.abs().max()))
        column += potential.weights[name].numel()
    assert column == rows.shape[1]


@pytest.mark.parametrize("chunk", [1, 2, 4, None])
def test_the_evaluator_adds_the_distance_to_the_energys_noise_and_nothing_else(chunk: int | None) -> None:
    potential, frames = potential_of(), molecules(4)
    plain = generation_of(potential)
    told = Distances(potential, NOISE).added(plain, labels_of(frames)[:2])
    before = Ensemble(potential, plain.weights, 4, NOISE, chunk, distance=energy_sd).predict(frames)
    after = Ensemble(potential, told.weights, 4, NOISE, chunk, distance=energy_sd).predict(frames)
    for field in dataclasses.fields(Prediction):
        if field.name not in ("generation", "energy_noise_sd"):
            assert getattr(after, field.name) == pytest.approx(getattr(before, field.name), rel=1e-12, abs=1e-13), field.name
    expected = exact_sd(potential, labels_of(frames)[:2], frames)
    assert after.energy_noise_sd == pytest.approx(np.broadcast_to(np.hypot(NOISE.energy_sd, expected), (3, 4)), rel=1e-8)
    assert after.energy_noise_sd[0, :2].max() < after.energy_noise_sd[0, 2:].min(), "labelled frames are the nearest"


def exact_sd(potential: Potential, labels: list[LabelledFrame], frames: Frames) -> np.ndarray:
    """From all components of the forces and the derivatives of each frame."""
    sums = Sums.none(sum(potential.weights[name].numel() for name in potential.last_layer))
    for item in labels:
        energy, forces, rows = derivatives(potential, item.frame, range(item.label.forces.size))
        residual = torch.as_tensor(item.label.forces.ravel()) - forces
        sums = sums.with_label(rows[0], item.label.energy - energy, NOISE.energy_sd, rows[1:], residual, NOISE.force_base_sd, 1.0)
    slopes = torch.stack([derivatives(potential, item.frame, [])[2][0] for item in labels_of(frames)])
    return sums.posterior().energy_sd(slopes).numpy()


def test_frames_in_parts_have_the_distances_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnn_driver.potential import ensemble as module
    from bnn_driver.potential.planning import Plan

    potential, frames = potential_of(), molecules(5)
    told = Distances(potential, NOISE).added(generation_of(potential), labels_of(frames)[:1])
    whole = Ensemble(potential, told.weights, 4, NOISE, distance=energy_sd).predict(frames)
    monkeypatch.setattr(module, "plan", lambda *_, **__: Plan(3, 2))
    parts = Ensemble(potential, told.weights, 4, NOISE, distance=energy_sd).predict(frames)
    assert parts.energy_noise_sd == pytest.approx(whole.energy_noise_sd, rel=1e-10)
    assert parts.energy.shape == whole.energy.shape == (3, 5)


def test_a_restart_knows_what_an_unbroken_trainer_knows() -> None:
    potential, items = potential_of(), labels_of(molecules(4))
    unbroken, generation = Distances(potential, NOISE), generation_of(potential)
    unbroken.added(generation, items[:1])
    unbroken.added(generation, items[:3])
    a, b = unbroken.added(generation, items), Distances(potential, NOISE).added(generation, items)
    for name in ("distance.root", "distance.centre", "distance.constant_sd"):
        assert a.weights[name] == pytest.approx(b.weights[name], rel=1e-9)
    assert a.state["distance"] == b.state["distance"]


def test_of_many_force_components_some_are_drawn_and_weigh_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the sums over 300 labels of the same frame, whose draws differ: 15 % of the gram's norm."""
    potential, item = potential_of("2x0e", 1), labels_of(molecules(1))[0]
    whole = Distances(potential, NOISE)
    whole.added(generation_of(potential), [item])
    monkeypatch.setattr(distance, "COMPONENTS", 5)
    part = Distances(potential, NOISE)
    part.added(
        generation_of(potential),
        [dataclasses.replace(item, label=dataclasses.replace(item.label, frame_id=str(i))) for i in range(300)],
    )
    assert whole._sums is not None
    assert part._sums is not None
    difference = part._sums.gram / 300 - whole._sums.gram
    assert float(difference.norm() / whole._sums.gram.norm()) < 0.15
    assert part._sums.count == pytest.approx(300 * whole._sums.count)


def test_potentials_without_a_last_layer_say_so() -> None:
    assert ToyPotential([1, 8]).last_layer == ()
    assert potential_of(path="modules").last_layer == ()
