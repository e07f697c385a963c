"""Labels of different atoms learnt together: the loss is the sum of every label's own, whatever the minibatches hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bnn_driver.bayes.likelihood import NoiseHead, NoiseModel
from bnn_driver.bayes.sghmc import SghmcSettings
from bnn_driver.bayes.update import UpdateSettings
from bnn_driver.loops.chain_update import Learner, TrainingLoss, update
from bnn_driver.loops.mixture import MixedLoss, training_loss
from bnn_driver.potential.graph import build_graph
from bnn_driver.potential.params import repeat_weights
from bnn_driver.potential.toy import ToyPotential
from bnn_driver.records import Frames, Generation, Label, LabelledFrame

SETTINGS = UpdateSettings(30, 3, 1e-3, SghmcSettings(0.1, 0.999, 1e-4), 1.0, 0.2, 0.05, 50.0, (0.0, 50.0))
ATOMS = [(8, 1, 1), (1, 8, 1), (6, 8), (8, 1, 1), (6, 8), (6, 1, 1, 1, 1), (1, 8, 1), (8, 1, 1)]


def learner_of() -> Learner:
    potential = ToyPotential([1, 6, 8])
    noise = NoiseModel(0.01, 0.05, 0.001, NoiseHead(potential.n_features, (3,)))
    return Learner.around(potential, noise, 0.5, SETTINGS, 0)


def labels_of() -> list[LabelledFrame]:
    rng = np.random.default_rng(2)
    items = []
    for number, atoms in enumerate(ATOMS):
        frame = Frames(np.array(atoms), rng.uniform(0, 3, (1, len(atoms), 3)))
        label = Label(-3.0 - number, rng.normal(size=(len(atoms), 3)), None, "made up", "t", str(number), "t")
        items.append(LabelledFrame(frame, label, {"foundation_energy": -2.5, "energy_offset": 0.1 * number}))
    return items


def test_the_loss_is_the_sum_over_the_labels_one_by_one() -> None:
    learner, items = learner_of(), labels_of()
    loss = training_loss(learner, items)
    assert isinstance(loss, MixedLoss)
    generator = torch.Generator().manual_seed(1)
    theta = learner.prior.centre + 0.05 * torch.randn(3, learner.layout.size, dtype=torch.float64, generator=generator)
    index = torch.tensor([[0, 1, 2, 5], [3, 3, 7, 0], [4, 2, 6, 6]])
    weight = torch.rand(3, 4, dtype=torch.float64, generator=generator)
    alone = [TrainingLoss.build(learner, [item]) for item in items]
    expected = torch.zeros(3, dtype=torch.float64)
    leaf = theta.clone().requires_grad_(True)
    for m in range(3):
        for i, w in zip(index[m].tolist(), weight[m], strict=True):
            expected[m] += alone[i](leaf[m : m + 1], torch.zeros(1, 1, dtype=torch.int64), w.view(1, 1))[0]
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    gradient, value = loss.gradient(theta, index, weight)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss(theta, index, weight), expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-9 * float(slope.abs().max()))


def test_residuals_are_those_of_the_labels_one_by_one() -> None:
    learner, items = learner_of(), labels_of()
    theta = learner.prior.centre.expand(2, -1).clone()
    sums, components = training_loss(learner, items).squared_residuals(theta, [1, 2, 5])
    each = [TrainingLoss.build(learner, [items[i]]).squared_residuals(theta, [0]) for i in (1, 2, 5)]
    torch.testing.assert_close(sums, sum(x for x, _ in each))
    assert components.tolist() == [3, 9 + 6 + 15, 0]


def test_labels_of_the_same_atoms_have_the_plain_loss() -> None:
    items = [item for item in labels_of() if item.frame.numbers.tolist() == [8, 1, 1]]
    assert isinstance(training_loss(learner_of(), items), TrainingLoss)


def test_constants_of_compositions_come_from_the_labels_themselves() -> None:
    """Without one of its own a label has that of the first label, as in a simulation."""
    items = labels_of()
    plain = [replace(item, context={"foundation_energy": -2.5}) for item in items]
    loss = training_loss(learner_of(), plain)
    assert isinstance(loss, MixedLoss)
    assert loss.parts[1].targets.energy[0] == pytest.approx(items[1].label.energy + (-2.5 + 3.0))
    own = training_loss(learner_of(), items)
    assert isinstance(own, MixedLoss)
    assert own.parts[1].targets.energy.tolist() == pytest.approx([-4.0 + 0.1, -9.0 + 0.6])


def test_chains_learn_labels_of_different_atoms() -> None:
    learner = learner_of()
    potential = learner.potential
    items = []
    truth = {name: x + 0.1 for name, x in potential.weights.items()}
    for item in labels_of():
        graph = build_graph(item.frame, potential.cutoff, potential.dtype, potential.device)
        found = potential.evaluate({k: x[None] for k, x in truth.items()}, graph)
        label = replace(item.label, energy=float(found.energy[0, 0]), forces=found.forces[0, 0].numpy())
        items.append(LabelledFrame(item.frame, label, {"energy_offset": 0.0}))
    centre = dict(potential.weights) | learner.noise.head.init(potential.dtype, potential.device)
    start = Generation(0, {k: v.numpy() for k, v in repeat_weights(centre, 2).items()}, ())
    learner = replace(learner, settings=replace(SETTINGS, steps=300, step_size=3e-3))
    after, report = update(learner, start, items, 0, loss_of=training_loss)
    assert not report.diverged, report.reason
    assert max(report.loss_last) < 0.2 * min(report.loss_first)
    again, _ = update(learner, start, items, 0, loss_of=training_loss)
    for name, x in after.weights.items():
        np.testing.assert_array_equal(x, again.weights[name])
