"""The fast path is MACE: energies, forces, virials and training gradients, for every variant it covers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from random_models import VARIANTS, crystals, members, molecules, random_mace

from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import Graph, build_graph
from bnn_driver.potential.mace import load_mace
from bnn_driver.potential.modules import ModulesPotential
from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.records import Frames

CPU = torch.device("cpu")
REAL = [
    "mace_spice/MACE_SPICE_mace0316_float64.model",
    "ani_cc/ani500k_small_CC_mace0316.model",
    "solvent_xtb_committee/imag_com1.model",
    "gst/mace_swa.model",
    "h2cu/MACE_model_swa.model",
    "si/aimspax_Si.model",
]


def both(
    module: torch.nn.Module, numbers: Any, head: int = 0, kernels: Any = "auto", dtype: torch.dtype = torch.float64
) -> tuple[Any, Any]:
    """The fast path, with compiled kernels where there are some, and the reference."""
    stacked = make_potential(module, numbers, dtype, CPU, path="stacked", head=head, kernels=kernels)
    reference = make_potential(module, numbers, dtype, CPU, path="modules", head=head)
    assert isinstance(stacked, StackedPotential)
    assert isinstance(reference, ModulesPotential)
    return stacked, reference


def graph_of(frames: Frames, potential: Any) -> Graph:
    return build_graph(frames, potential.cutoff, potential.dtype, CPU)


def training_gradient(potential: Any, weights: dict[str, torch.Tensor], graph: Graph) -> dict[str, torch.Tensor]:
    """Gradient of a loss on energies, forces and virials: second derivatives of the network."""
    leaves = {name: x.clone().requires_grad_(True) for name, x in weights.items()}
    e = potential.evaluate(leaves, graph, create_graph=True)
    target = torch.linspace(-1, 1, e.forces.numel(), dtype=e.forces.dtype).view(e.forces.shape)
    loss = ((e.forces - target) ** 2).sum() + 1e-2 * (e.energy**2).sum() / 1e3 + (e.virial**2).sum() + (e.features**2).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(leaves.items(), grads, strict=True)}


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("frames", [molecules(2), crystals(2)], ids=["molecules", "small triclinic cells"])
def test_fast_path_equals_maces_modules(name: str, kernels: str, frames: Frames) -> None:
    stacked, reference = both(random_mace(**VARIANTS[name]), frames.numbers, int("heads" in name), kernels)
    assert bool(stacked.native) == (kernels == "auto" and name != "few channels"), stacked.path
    weights = members(reference.weights, 2)
    graph = graph_of(frames, stacked)
    a, b = stacked.evaluate(weights, graph), reference.evaluate(weights, graph)
    for field in ("energy", "forces", "virial", "features"):
        x, y = getattr(a, field), getattr(b, field)
        # rounding in float64 alone: 1e-10 of the largest value
        assert (x - y).abs().max() <= 1e-10 * max(1.0, float(y.abs().max())), field


@pytest.mark.parametrize("name", list(VARIANTS))
def test_all_forms_of_the_contraction_are_the_same_polynomial(name: str) -> None:
    """Pairs, monomials term by term (used compiled, for few nodes), and the factorised terms of the kernels."""
    potential, _ = both(random_mace(**VARIANTS[name]), [1, 6, 8], int("heads" in name))
    weights = members(potential.weights, 2)
    generator = torch.Generator().manual_seed(3)
    slices = ((0, 0, 2), (2, 2, 7))
    for layer in potential.tables.layers:
        contraction = layer.contraction
        groups = potential._contraction_weights(layer, weights)
        x = torch.randn(2, 7, contraction.components, layer.mixed, dtype=torch.float64, generator=generator)
        a = contraction(x, contraction.weights(groups), slices)
        forms = [contraction.plain, contraction.sparse] if potential.native else [contraction.plain]
        for form in forms:
            b = form(x, form.weights(groups), slices)
            assert a.shape == b.shape
            assert (a - b).abs().max() <= 1e-12 * float(a.abs().max())


@pytest.mark.parametrize(
    "name", ["residual", "first layer without skip", "lmax 2, correlation 3", "density", "second of two heads", "three layers"]
)
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_training_gradient_equals_maces_double_backward(name: str, kernels: str) -> None:
    frames = crystals(2)
    stacked, reference = both(random_mace(**VARIANTS[name]), frames.numbers, int("heads" in name), kernels)
    weights = members(reference.weights, 2)
    graph = graph_of(frames, stacked)
    ours, theirs = training_gradient(stacked, weights, graph), training_gradient(reference, weights, graph)
    scale = max(float(g.abs().max()) for g in theirs.values())
    for block, g in theirs.items():
        assert (ours[block] - g).abs().max() <= 1e-10 * scale, block
    assert sum(float(g.abs().max()) > 1e-8 * scale for g in theirs.values()) > len(theirs) // 2


@pytest.mark.parametrize("file", REAL)
def test_real_models_take_the_fast_path_and_agree(shared_data: Any, file: str) -> None:
    path = shared_data / "models" / file
    if not path.is_file():
        pytest.skip(f"no {file}")
    loaded = load_mace(path)
    numbers = loaded.elements[:3]
    stacked, reference = both(loaded.module, numbers)
    rng = np.random.default_rng(0)
    grid = np.array([(i, j, k) for i in range(2) for j in range(2) for k in range(2)], dtype=float)
    frames = Frames(np.resize(numbers, 8), 1.7 * grid + 0.2 * rng.standard_normal((2, 8, 3)))
    weights = members(reference.weights, 2, spread=0.01)
    graph = graph_of(frames, stacked)
    a, b = stacked.evaluate(weights, graph), reference.evaluate(weights, graph)
    assert (a.forces - b.forces).abs().max() <= 1e-10 * float(b.forces.abs().max())
    assert (a.energy - b.energy).abs().max() <= 1e-10 * float(b.energy.abs().max())


@pytest.fixture
def potential(residual_mace: torch.nn.Module) -> StackedPotential:
    return both(residual_mace, [1, 6, 8])[0]


def test_forces_and_virial_are_derivatives_of_the_energy(potential: StackedPotential) -> None:
    frames = crystals(1)
    weights = members(potential.weights, 1)

    def energy(positions: np.ndarray, cell: np.ndarray) -> float:
        return float(potential.evaluate(weights, graph_of(Frames(frames.numbers, positions, cell), potential)).energy)

    e = potential.evaluate(weights, graph_of(frames, potential))
    assert frames.cell is not None
    h = 1e-4  # central differences: error h² F''', about 1e-7 here
    for a, c in ((0, 0), (1, 2), (2, 1)):
        step = np.zeros_like(frames.positions)
        step[0, a, c] = h
        slope = (energy(frames.positions + step, frames.cell) - energy(frames.positions - step, frames.cell)) / (2 * h)
        assert float(e.forces[0, 0, a, c]) == pytest.approx(-slope, abs=2e-6)
    for i, j in ((0, 0), (0, 1), (2, 1)):
        strain = np.zeros((3, 3))
        strain[i, j] = h
        up, down = np.eye(3) + strain, np.eye(3) - strain
        slope = (energy(frames.positions @ up, frames.cell @ up) - energy(frames.positions @ down, frames.cell @ down)) / (2 * h)
        assert float(e.virial[0, 0, i, j]) == pytest.approx(-slope, abs=2e-6)


def test_energy_is_invariant_and_forces_turn_with_the_frame(potential: StackedPotential) -> None:
    frames = molecules(1)
    weights = members(potential.weights, 2)
    q, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((3, 3)))  # a reflection or a rotation: both are symmetries
    order = np.array([3, 0, 4, 2, 1])
    turned = Frames(frames.numbers[order], frames.positions[:, order] @ q.T + 1.7)
    a = potential.evaluate(weights, graph_of(frames, potential))
    b = potential.evaluate(weights, graph_of(turned, potential))
    assert (a.energy - b.energy).abs().max() < 1e-9
    assert (a.forces[:, :, order] @ torch.as_tensor(q.T) - b.forces).abs().max() < 1e-10
    assert (a.features[:, :, order] - b.features).abs().max() < 1e-10


@pytest.mark.parametrize("frames", [molecules(3), crystals(3)], ids=["molecules", "small triclinic cells"])
def test_a_batch_equals_its_single_frames(potential: StackedPotential, frames: Frames) -> None:
    weights = members(potential.weights, 2)
    whole = potential.evaluate(weights, graph_of(frames, potential))
    for b in range(len(frames)):
        one = potential.evaluate(weights, graph_of(frames[b], potential))
        assert (whole.forces[:, b] - one.forces[:, 0]).abs().max() < 1e-12
        assert (whole.virial[:, b] - one.virial[:, 0]).abs().max() < 1e-11
        assert (whole.energy[:, b] - one.energy[:, 0]).abs().max() < 1e-10


@pytest.mark.parametrize("path", ["stacked", "modules"])
def test_own_frames_per_member_equal_separate_members(residual_mace: torch.nn.Module, path: Any) -> None:
    potential = make_potential(residual_mace, [1, 6, 8], torch.float64, CPU, path=path)
    graph = graph_of(crystals(4), potential)
    weights = members(potential.weights, 2)
    index = torch.tensor([[0, 3], [2, 1]])
    own = potential.evaluate(weights, graph.take(index))
    gradient = training_gradient(potential, weights, graph.take(index))
    for m in range(2):
        alone = {name: x[m : m + 1] for name, x in weights.items()}
        one = potential.evaluate(alone, graph.take(index[m]))
        assert (own.energy[m] - one.energy[0]).abs().max() < 1e-10
        assert (own.forces[m] - one.forces[0]).abs().max() < 1e-12
        assert (own.virial[m] - one.virial[0]).abs().max() < 1e-11
    assert all(torch.isfinite(g).all() for g in gradient.values())


def test_single_precision_is_close_to_double(residual_mace: torch.nn.Module) -> None:
    import copy

    frames = molecules(2)
    double, _ = both(residual_mace, frames.numbers)
    single, _ = both(copy.deepcopy(residual_mace), frames.numbers, dtype=torch.float32)
    weights = members(double.weights, 2)
    a = double.evaluate(weights, graph_of(frames, double))
    b = single.evaluate({k: x.float() for k, x in weights.items()}, graph_of(frames, single))
    assert b.energy.dtype == torch.float64
    # E_0 of -500 eV is added in float64: the error is that of the interaction energy alone
    assert (a.energy - b.energy).abs().max() < 2e-5
    assert (a.forces - b.forces).abs().max() < 1e-4 * max(1.0, float(a.forces.abs().max()))


def test_prepared_weights_give_the_same_answer(potential: StackedPotential) -> None:
    weights = members(potential.weights, 2)
    graph = graph_of(molecules(), potential)
    a, b = potential.evaluate(weights, graph), potential.evaluate(potential.prepare(weights), graph)
    assert torch.equal(a.forces, b.forces)


def test_what_the_fast_path_does_not_cover_runs_on_maces_modules() -> None:
    module = random_mace(radial_type="gaussian")
    potential = make_potential(module, [1, 6, 8], torch.float64, CPU)
    assert isinstance(potential, ModulesPotential)
    assert "GaussianBasis" in potential.path
