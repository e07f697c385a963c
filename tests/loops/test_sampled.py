"""Chains that move few weights: their updates, their settings, and a whole run through the command line."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import program, write_run
from test_chain_update import labels_of

from bnn_driver.bayes.likelihood import NoiseHead, NoiseModel
from bnn_driver.bayes.sghmc import SghmcSettings
from bnn_driver.bayes.update import UpdateSettings
from bnn_driver.config import read_config
from bnn_driver.errors import ConfigError
from bnn_driver.loops.assembly import load_model
from bnn_driver.loops.chain_update import Learner, TrainingLoss, update
from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import build_graph
from bnn_driver.records import Generation, LabelledFrame
from bnn_driver.store import weights
from bnn_driver.store.dataset import LabelStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "potential"))
from random_models import random_mace

MODES = ["last-interaction", "readout"]
SETTINGS = UpdateSettings(40, 3, 1e-3, SghmcSettings(0.1, 0.999, 1e-4), 1.0, 0.2, 0.05, 10.0, (0.0, 1e9))


def learner_of(sampled: Any, compile: Any = "off") -> Learner:
    potential = make_potential(random_mace(), [1, 6, 8], torch.float64, "cpu", path="stacked", compile=compile, sampled=sampled)
    return Learner.around(potential, NoiseModel(0.01, 0.05, 0.001, NoiseHead(potential.n_features, (3,))), 0.5, SETTINGS, 0)


def start(learner: Learner, members: int, seed: int = 0) -> Generation:
    """Different members around the prior's centre."""
    noise = torch.randn(members, learner.layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    views = learner.layout.views(learner.prior.centre + 0.01 * noise)
    return Generation(0, {name: x.numpy().copy() for name, x in views.items()}, ())


def taught(learner: Learner, items: list[LabelledFrame]) -> list[LabelledFrame]:
    """The same frames with what another member says about them."""
    teacher = {k: torch.as_tensor(x[:1]) for k, x in start(learner, 1, seed=5).weights.items()}
    out = []
    for item in items:
        graph = build_graph(item.frame, learner.potential.cutoff, torch.float64, torch.device("cpu"))
        e = learner.potential.evaluate(teacher, graph)
        label = dataclasses.replace(item.label, energy=float(e.energy), forces=e.forces[0, 0].numpy(), stress=None)
        out.append(LabelledFrame(item.frame, label, {"foundation_energy": label.energy if not out else 0.0}))
    return out


@pytest.mark.parametrize("periodic", [False, True], ids=["molecules", "crystals with stress"])
@pytest.mark.parametrize("sampled", MODES)
def test_gradient_is_that_block_of_the_whole_gradient(sampled: Any, periodic: bool) -> None:
    part, whole = learner_of(sampled), learner_of("all")
    items = labels_of(periodic)
    index, weight = torch.tensor([[0, 1, 4], [2, 3, 1]]), torch.tensor([[1.0, 2.0, 0.5], [1.0, 1.0, 1.0]], dtype=torch.float64)
    moved = {name: torch.as_tensor(x) for name, x in start(part, 2).weights.items()}
    centre = whole.layout.views(whole.prior.centre[None].expand(2, -1))
    found, loss = TrainingLoss.build(part, items).gradient(part.layout.flat(moved), index, weight)
    expected, value = TrainingLoss.build(whole, items).gradient(whole.layout.flat({**centre, **moved}), index, weight)
    torch.testing.assert_close(loss, value, rtol=1e-10, atol=0)
    ours, theirs = part.layout.views(found), whole.layout.views(expected)
    assert any(name.startswith("noise.") for name in ours), "the noise head is always sampled"
    for name, x in ours.items():
        assert (x - theirs[name]).abs().max() <= 1e-10 * expected.abs().max(), name


@pytest.mark.parametrize("sampled", MODES)
def test_an_update_moves_the_sampled_weights_alone_and_learns(sampled: Any) -> None:
    learner = learner_of(sampled)
    after, report = update(learner, start(learner, 2), taught(learner, labels_of(periodic=True)), 0)
    assert not report.diverged
    assert after.weights.keys() == set(learner.potential.weights) | set(learner.noise.head.shapes)
    assert (np.array(report.loss_last) < np.array(report.loss_first)).all()
    assert min(report.rms_change) > 0


@pytest.mark.parametrize("sampled", MODES)
def test_kept_jacobians_give_the_chains_of_the_whole_network(sampled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnn_driver.potential import subspace

    learner = learner_of(sampled)
    items, begin = labels_of(periodic=True), start(learner, 2)
    fast, _ = update(learner, begin, items, 0)
    monkeypatch.setattr(subspace, "free_memory", lambda _: 0)
    slow, _ = update(learner, begin, items, 0)
    for name, x in fast.weights.items():  # 40 steps carry rounding on
        np.testing.assert_allclose(x, slow.weights[name], rtol=0, atol=1e-8, err_msg=name)


def test_the_second_update_begins_with_the_first_and_knows_its_labels() -> None:
    learner = learner_of("readout")
    items = labels_of(periodic=False)
    first, _ = update(learner, start(learner, 2), items[:3], 0)
    again, _ = update(learner, first, items, 0)
    other, _ = update(dataclasses.replace(learner_of("readout")), first, items, 0)
    for name, x in again.weights.items():
        np.testing.assert_allclose(x, other.weights[name], rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.slow
def test_compiled_gradient_equals_the_plain_one() -> None:
    plain, fast = learner_of("readout"), learner_of("readout", "on")
    items, index = labels_of(periodic=True), torch.tensor([[0, 1, 4], [2, 3, 1]])
    theta = plain.layout.flat({name: torch.as_tensor(x) for name, x in start(plain, 2).weights.items()})
    a, b = TrainingLoss.build(plain, items), TrainingLoss.build(fast, items)
    for shift in range(3):
        expected, loss = a.gradient(theta + 0.01 * shift, index, torch.ones(2, 3, dtype=torch.float64))
        found, value = b.gradient(theta + 0.01 * shift, index, torch.ones(2, 3, dtype=torch.float64))
        torch.testing.assert_close(value, loss, rtol=1e-11, atol=0)
        assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()
    assert fast.potential.compiler.compiled == 1


def sampling(config: Path, value: str, model: str = "embedded") -> Path:
    text = config.read_text().replace('model = "toy"', f'model = "{model}"').replace("step_size = 3e-3", "step_size = 1e-4")
    config.write_text(text.replace("members = 4", f'members = 4\nsampled = "{value}"'))
    return config


def test_the_toy_has_no_readouts_to_sample(tmp_path: Path) -> None:
    config = read_config(sampling(write_run(tmp_path), "readout", "toy"))
    with pytest.raises(ConfigError, match='leave sampled at "all"'):
        load_model(config, tmp_path, np.array([8, 1, 1]), "cpu")


def test_an_unknown_choice_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ensemble.sampled.*'all', 'last-interaction' or 'readout'"):
        read_config(sampling(write_run(tmp_path), "readouts"))


@pytest.mark.ipi
def test_a_run_with_sampled_readouts_resumes_is_exported_and_refuses_another_choice(tmp_path: Path) -> None:
    config = sampling(write_run(tmp_path, steps=6), "readout")
    done = program("run", config)
    assert done.returncode == 0, done.stderr
    assert LabelStore(tmp_path / "run" / "labels").all()
    newest = weights.load(tmp_path / "run" / "generations", weights.latest(tmp_path / "run" / "generations") or 0)
    assert newest.number >= 1
    assert all(name.startswith(("readouts.", "distance.")) for name in newest.weights)
    assert newest.weights["distance.root"].ndim == 2
    checked = program("check", config)
    assert "sampled: readout, 2 of 2 layers once for all" in checked.stdout
    exported = program("export", config, "--to", "mace", "-o", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    config.write_text(config.read_text().replace('sampled = "readout"', 'sampled = "all"'))
    refused = program("run", config)
    assert refused.returncode == 2
    assert 'sampled: was "readout", now "all"' in refused.stderr
    assert "directory" in refused.stderr
