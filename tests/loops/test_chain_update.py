"""The likelihood's gradient as one function of tensors is that of the likelihood."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bnn_driver.bayes import sghmc
from bnn_driver.bayes.likelihood import NoiseHead, NoiseModel, Targets
from bnn_driver.bayes.posterior import MinibatchPosterior
from bnn_driver.bayes.sghmc import SghmcSettings
from bnn_driver.bayes.update import UpdateSettings
from bnn_driver.loops import dispersion
from bnn_driver.loops.chain_update import Learner, TrainingLoss, _padded, update
from bnn_driver.potential.capturing import Recording
from bnn_driver.potential.compiling import Compiler, Mode
from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import build_graph
from bnn_driver.potential.params import repeat_weights
from bnn_driver.records import Generation, Label, LabelledFrame

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "potential"))
from no_wait import NoWait
from random_models import crystals, molecules, random_mace

SETTINGS = UpdateSettings(1, 3, 1e-3, SghmcSettings(0.1, 0.999, 1e-4), 1.0, 0.2, 0.05, 1.0, (0.2, 5.0))


def learner_of(compile: Mode = "off", device: str = "cpu") -> Learner:
    module = random_mace(hidden="4x0e", max_ell=1, num_interactions=1, radial_MLP=[8])
    potential = make_potential(module, [1, 6, 8], torch.float64, device, path="stacked", compile=compile)
    noise = NoiseModel(0.01, 0.05, 0.001, NoiseHead(potential.n_features, (3,)))
    return Learner.around(potential, noise, 0.5, SETTINGS, 0)


def labels_of(periodic: bool) -> list[LabelledFrame]:
    """Five labels; of periodic frames every second one has a stress."""
    frames, rng = (crystals if periodic else molecules)(5), np.random.default_rng(0)
    out = []
    for i in range(5):
        forces = rng.standard_normal((len(frames.numbers), 3))
        stress = 0.01 * rng.standard_normal((3, 3)) if periodic and i % 2 else None
        out.append(
            LabelledFrame(frames[i], Label(-3.0 + i, forces, stress, "made up", "t", str(i), "t"), {"foundation_energy": -3.0})
        )
    return out


def minibatch(learner: Learner, chains: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    theta = learner.prior.centre + 0.05 * torch.randn(chains, learner.layout.size, dtype=torch.float64, generator=generator)
    return theta, torch.tensor([[0, 1, 4], [2, 3, 1]]), torch.tensor([[1.0, 2.0, 0.5], [1.0, 1.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("periodic", [False, True])
def test_gradient_is_that_of_the_loss(periodic: bool) -> None:
    learner = learner_of()
    loss = TrainingLoss.build(learner, labels_of(periodic))
    theta, index, weight = minibatch(learner)
    leaf = theta.clone().requires_grad_(True)
    expected = loss(leaf, index, weight)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    gradient, value = loss.gradient(theta, index, weight)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-10 * float(slope.abs().max()))
    assert not gradient.requires_grad


@pytest.mark.parametrize("periodic", [False, True])
def test_a_chain_step_reads_nothing_on_the_host(periodic: bool) -> None:
    """Of what lies on the device: minibatches are drawn on the host."""
    learner = learner_of()
    loss = TrainingLoss.build(learner, labels_of(periodic))
    theta, index, weight = minibatch(learner)
    posterior = MinibatchPosterior(loss, learner.prior, 5)
    state, noises = sghmc.init(theta), [torch.Generator().manual_seed(m) for m in range(2)]
    for _ in range(2):
        posterior.gradient(state.theta, index, weight)  # the first call sorts the atoms
    with NoWait():
        gradient, _ = posterior.gradient(state.theta, index, weight)
        settings = learner.settings.sampler
        state = sghmc.step_(state, gradient, step_size=1e-3, temperature=1.0, n_labels=5, settings=settings, generators=noises)
        sghmc.kinetic_temperature(state, step_size=1e-3, n_labels=5, settings=settings)


def test_recorded_gradient_is_the_plain_one() -> None:
    """Other weights, minibatches and labels at the same addresses; a stand-in runs the function again on its buffers."""

    def record(function: Callable[[], tuple[torch.Tensor, ...]]) -> Recording:
        outputs = function()

        def replay() -> None:
            for old, new in zip(outputs, function(), strict=True):
                old.copy_(new)

        return Recording(replay, outputs)

    plain, fast = learner_of(), learner_of()
    fast.potential.compiler = Compiler("auto", patience=3600.0, recorder=record)
    theta, index, weight = minibatch(plain)
    for step in range(8):
        labels = labels_of(periodic=True)[: 4 + step // 4]
        chosen = (index + step) % len(labels)
        built = [TrainingLoss.build(plain, labels), TrainingLoss.build(fast, labels)]
        (a, loss_a), (b, loss_b) = (loss.gradient(theta, chosen, weight) for loss in built)
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10 * float(a.abs().max()))
        torch.testing.assert_close(loss_b, loss_a, rtol=1e-12, atol=0)
        theta.add_(0.01 * step)
    assert fast.potential.compiler.compiled == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradient_on_a_gpu_is_that_on_the_host_and_waits_for_nothing() -> None:
    host, fast = learner_of(), learner_of("auto", "cuda")
    labels = labels_of(periodic=True)
    built = [TrainingLoss.build(learner, labels) for learner in (host, fast)]
    theta, index, weight = minibatch(host)
    for step in range(8):
        a, _ = built[0].gradient(theta, (index + step) % 5, weight)
        there = theta.to("cuda")
        torch.cuda.set_sync_debug_mode("error" if step == 7 else "default")
        try:
            b, _ = built[1].gradient(there, (index + step) % 5, weight)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(b.cpu(), a, rtol=1e-8, atol=1e-10 * float(a.abs().max()))
        theta.add_(0.01 * step)
    assert fast.potential.compiler.compiled == 1


def test_a_batch_survives_being_taken_apart() -> None:
    learner = learner_of()
    loss = TrainingLoss.build(learner, labels_of(periodic=True))
    batch = loss._batch(torch.tensor([[0, 3], [1, 2]]))
    again = batch.with_tensors(batch.tensors())
    for field in dataclasses.fields(batch.targets):
        assert getattr(again.targets, field.name) is getattr(batch.targets, field.name), field.name
    assert again.volume is batch.volume
    assert again.graph.tensors() == batch.graph.tensors()


@pytest.mark.parametrize("periodic", [False, True])
def test_squared_residuals_are_those_of_the_likelihood(periodic: bool) -> None:
    """A label's -2 log p is its squared residuals plus what does not depend on the label; five labels are two minibatches."""
    learner, labels = learner_of(), labels_of(periodic)
    loss = TrainingLoss.build(learner, labels)
    theta, _, _ = minibatch(learner)
    rows = [4, 0, 1, 2, 3]
    sums, components = loss.squared_residuals(theta, rows)
    exact = TrainingLoss(loss.learner, loss.graph, met_exactly(loss, theta[:1]), loss.atoms, loss.volume)
    index, weight = torch.tensor([rows]), torch.full((1, 5), 2.0, dtype=torch.float64)
    leaf = theta[:1].clone().requires_grad_(True)
    difference = (loss(leaf, index, weight) - exact(leaf, index, weight)).detach()
    torch.testing.assert_close(sums[:1].sum(1), difference, rtol=1e-9, atol=1e-7)
    assert components.tolist() == [5, 15 * len(labels[0].frame.numbers), 6 * 2 if periodic else 0]
    assert not sums.requires_grad


def met_exactly(loss: TrainingLoss, theta: torch.Tensor) -> Targets:
    """Labels that one chain predicts without any error."""
    batch = loss._batch(torch.arange(5)[None])
    energy, forces, stress, *_ = loss._compared(loss.learner.layout.views(theta), batch, create_graph=False)
    return Targets(
        energy[0].detach(), forces[0].detach(), None if stress is None else stress[0].detach(), loss.targets.has_stress
    )


@pytest.mark.parametrize("size", [1, 3, 5])
def test_padding_a_minibatch_changes_no_gradient(size: int) -> None:
    learner = learner_of()
    loss = TrainingLoss.build(learner, labels_of(periodic=True))
    theta, index, weight = minibatch(learner)
    expected, value = loss.gradient(theta, index, weight)
    padded = _padded(index, weight, size)
    assert padded[0].shape == padded[1].shape == (2, max(3, size))
    gradient, again = loss.gradient(theta, *padded)
    torch.testing.assert_close(again, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.slow
def test_compiled_gradient_equals_the_plain_one() -> None:
    plain, fast = learner_of(), learner_of("on")
    a, b = TrainingLoss.build(plain, labels_of(False)), TrainingLoss.build(fast, labels_of(False))
    theta, index, weight = minibatch(plain)
    for shift in range(3):
        moved = theta + 0.01 * shift
        (expected, loss), (found, value) = a.gradient(moved, index, weight), b.gradient(moved, index, weight)
        torch.testing.assert_close(value, loss, rtol=1e-11, atol=0)
        assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()
    assert isinstance(fast.potential.compiler, Compiler)
    assert fast.potential.compiler.compiled == 1


def foundation(learner: Learner, members: int = 3) -> Generation:
    centre = learner.layout.views(learner.prior.centre)
    return Generation(0, {k: v.numpy() for k, v in repeat_weights(centre, members).items()}, ())


def test_the_first_update_begins_at_the_chains_own_centres_and_later_ones_keep_them() -> None:
    learner, labels = dataclasses.replace(learner_of(), dispersion=0.1), labels_of(False)
    prior = learner.prior_of(3, 0.1)
    spread = (prior.centre - learner.prior.centre) / 0.1
    head = torch.cat([torch.full((b.size,), b.name.startswith("noise.")) for b in learner.layout.blocks])
    assert (spread[:, head] == 0).all(), "the noise head begins at the base noise"
    assert spread[:, ~head].var(dim=0).mean().item() == pytest.approx(1, abs=0.1), "divisor M - 1"
    assert spread.mean(dim=0).abs().max() < 1e-6, "no common shift"
    assert torch.equal(learner.start(foundation(learner), prior), prior.centre)
    first, _ = update(learner, foundation(learner), labels[:1], 0)
    assert first.state["dispersion"] == 0.1
    changed = dataclasses.replace(learner, dispersion=0.3)
    assert changed.dispersion_of(first, labels) == 0.1, "the centres of a run stay"
    weights = learner.layout.flat({k: torch.as_tensor(v) for k, v in first.weights.items()})
    assert torch.equal(learner.start(first, prior), weights)


def test_without_dispersion_all_chains_begin_at_the_foundation() -> None:
    learner = learner_of()
    assert learner.prior_of(3, 0.0) is learner.prior
    start = learner.start(foundation(learner), learner.prior)
    assert torch.equal(start, learner.prior.centre.expand(3, -1))
    assert learner.dispersion_of(Generation(4, {}, (), {}), []) == 0.0, "generations of runs that did not record it"


@pytest.mark.parametrize("periodic", [False, True])
def test_the_dispersion_explains_the_residual(periodic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the trace of the whole Jacobian; 2000 directions: relative error of the trace below 2 %, of its root 1 %."""
    monkeypatch.setattr(dispersion, "PROBES", 2000)
    learner, labels = learner_of(), labels_of(periodic)[:2]
    potential, trace, residual = learner.potential, 0.0, 0.0
    for item in labels:
        graph = build_graph(item.frame, potential.cutoff, potential.dtype, potential.device)
        leaves = {k: v[None].clone().requires_grad_(True) for k, v in potential.weights.items()}
        forces = potential.evaluate(leaves, graph, create_graph=True).forces
        for component in forces.flatten():
            rows = torch.autograd.grad(component, list(leaves.values()), retain_graph=True, materialize_grads=True)
            trace += sum(float(x.square().sum()) for x in rows)
        residual += float((forces[0, 0].detach() - torch.as_tensor(item.label.forces)).square().sum())
    found = dispersion.explaining_sd(potential, labels, torch.Generator().manual_seed(0))
    assert found == pytest.approx((residual / trace) ** 0.5, rel=0.02)


def test_the_chosen_dispersion_is_at_most_the_priors_sd_and_is_kept() -> None:
    learner, labels = dataclasses.replace(learner_of(), dispersion="auto"), labels_of(False)
    far = [dataclasses.replace(x, label=dataclasses.replace(x.label, forces=1e6 * x.label.forces)) for x in labels]
    assert learner.dispersion_of(foundation(learner), far) == 0.5
    near = [dataclasses.replace(x, label=dataclasses.replace(x.label, forces=1e-3 * x.label.forces)) for x in labels]
    chosen = learner.dispersion_of(foundation(learner), near)
    assert 0 < chosen < 0.5
    assert learner.dispersion_of(foundation(learner), near) == chosen, "a function of seed and labels alone"
    generation, _ = update(learner, foundation(learner), near[:1], 0)
    assert learner.dispersion_of(generation, far) == generation.state["dispersion"]
