"""Nothing waits for a GPU but the one transfer at the end: shown on the host by the operators that run, and with a made-up GPU.

On the host no operator may run that reads a value (which on a GPU waits for it) or makes a tensor of Python numbers (which on a
GPU is copied from ordinary memory).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from no_wait import NoWait
from random_models import VARIANTS, crystals, members, molecules, random_mace

from bnn_driver.bayes.laplace import LastLayer, energy_sd
from bnn_driver.bayes.likelihood import NoiseHead, NoiseModel
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import build_graph
from bnn_driver.potential.transfer import to_device, to_host
from bnn_driver.records import Frames

CPU = torch.device("cpu")


def test_arrays_come_back_in_one_piece() -> None:
    tensors = [torch.arange(6.0).view(2, 3).T, torch.zeros(0, 3), torch.tensor(2.5), torch.arange(3.0, dtype=torch.float64)]
    for tensor, array in zip(tensors, to_host(tensors), strict=True):
        assert array.dtype == np.float64
        assert array.shape == tuple(tensor.shape)
        assert np.array_equal(array, tensor.double().numpy())
    assert to_host([]) == []
    x = torch.arange(3)
    assert to_device(x, CPU) is x
    assert to_device(x.expand(2, 3), CPU, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_an_evaluation_reads_nothing_on_the_host(variant: str) -> None:
    potential = make_potential(random_mace(**VARIANTS[variant]), [1, 6, 8], torch.float64, "cpu", path="stacked")
    weights = potential.prepare(members(potential.weights, 2))
    for frames in (molecules(2), crystals(2)):
        graph = build_graph(frames, potential.cutoff, torch.float64, CPU)
        potential.evaluate(weights, graph)
        moved = build_graph(Frames(frames.numbers, frames.positions + 1e-3, frames.cell), potential.cutoff, torch.float64, CPU)
        with NoWait():
            potential.evaluate(weights, moved)
            potential.evaluate({name: x.requires_grad_(True) for name, x in weights.items()}, moved, create_graph=True)


def test_a_prediction_waits_once() -> None:
    """With the noise head, the distance to the labels, members and frames in several pieces, and a list that is kept."""
    potential = make_potential(random_mace(), [1, 6, 8], torch.float64, "cpu", path="stacked")
    noise = NoiseModel(0.01, 0.05, 0.001, NoiseHead(potential.n_features, (3,)))
    weights: dict[str, torch.Tensor] = dict(members(dict(potential.weights) | noise.head.init(), 3))
    size = sum(potential.weights[name].numel() for name in potential.last_layer)
    posterior = LastLayer(torch.eye(size).double(), torch.zeros(size).double(), 0.1, 1.0, 1.0).tensors()
    weights |= {f"distance.{name}": x for name, x in posterior.items()}
    ensemble = Ensemble(potential, weights, 0, noise, member_chunk=2, skin=1.0, distance=energy_sd)
    frames = molecules(2)
    expected = ensemble.predict(frames)
    graph = ensemble._graph(frames)
    distances: list[torch.Tensor] = []
    with NoWait():
        found = list(ensemble._quantities(graph, ensemble._plan(graph).members, distances))
    assert np.array_equal(np.concatenate(to_host(found[1::5])), expected.forces)
    noise_sd = np.concatenate(to_host(found[3::5]))
    assert np.array_equal(np.hypot(noise_sd, to_host(distances)[0]), expected.energy_noise_sd)


def test_an_evaluation_needs_no_values() -> None:
    """Tensors that have shapes and no values, on a device that no tensor of the host mixes with in arithmetic."""
    potential = make_potential(random_mace(), [1, 6, 8], torch.float64, "cpu", path="stacked", kernels="off")
    frames = crystals(2)
    graph, weights = build_graph(frames, potential.cutoff, torch.float64, CPU), members(potential.weights, 2)
    expected = potential.evaluate(weights, graph)
    assert potential._sorted is not None
    ghost = valueless(graph)
    potential.tables, potential._e0 = valueless(potential.tables), valueless(potential._e0)
    potential._factors = {name: valueless(x) for name, x in potential._factors.items()}
    potential._sorted = ghost.numbers, valueless(potential._sorted[1])
    for create_graph in (False, True):
        found = potential.evaluate(valueless(weights), ghost, create_graph=create_graph)
        for name in ("energy", "forces", "virial", "features"):
            a, b = getattr(found, name), getattr(expected, name)
            assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype), name


def valueless(x: Any) -> Any:
    """The same object with tensors that are only shapes; weights want a gradient."""
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    if isinstance(x, dict):
        return {name: valueless(y).requires_grad_(True) for name, y in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(valueless(y) for y in x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return dataclasses.replace(x, **{f.name: valueless(getattr(x, f.name)) for f in dataclasses.fields(x)})
    return x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_prediction_on_a_gpu_waits_once() -> None:
    potential = make_potential(random_mace(), [1, 6, 8], torch.float64, "cuda", path="stacked", compile="auto")
    ensemble = Ensemble(potential, members(potential.weights, 3), 0, None)
    frames = [molecules(2, seed) for seed in range(8)]
    for one in frames:
        ensemble.predict(one)
    graph = ensemble._graph(frames[0])
    split = ensemble._plan(graph)
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantities = list(ensemble._quantities(graph, split.members, []))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(to_host(quantities)) == 5
