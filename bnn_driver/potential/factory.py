"""The potential of a MACE module: the fast path where it is exact, MACE's own code elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from bnn_driver.errors import ModelError
from bnn_driver.potential import compiling
from bnn_driver.potential.architecture import UnsupportedModel
from bnn_driver.potential.compiling import Compiler, Mode
from bnn_driver.potential.cueq import CueqPotential
from bnn_driver.potential.graph import Graph, build_graph
from bnn_driver.potential.modules import ModulesPotential
from bnn_driver.potential.params import repeat_weights
from bnn_driver.potential.stacked import PLAIN_PATH, StackedPotential
from bnn_driver.potential.subspace import Sampled, SubspacePotential, sampled_names
from bnn_driver.records import Frames

logger = logging.getLogger(__name__)

Path = Literal["auto", "stacked", "modules", "cueq"]
MacePotential = StackedPotential | ModulesPotential | SubspacePotential

#: largest allowed difference of energies and forces between the two paths, relative to the largest force
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
#: the same for cuEquivariance, whose tables are fitted (measured in float64: up to 6e-8)
CUEQ_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def make_potential(
    module: nn.Module,
    numbers: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    path: Path = "auto",
    head: int = 0,
    check: Frames | None = None,
    compile: Mode = "off",
    kernels: Literal["auto", "off"] = "auto",
    sampled: Sampled = "all",
) -> MacePotential:
    """A potential for the elements in `numbers`.

    Args: path: "auto" takes the fast path when it covers the model and agrees with MACE's own code on `check`.
            "cueq" takes MACE's code with cuEquivariance's operators when that agrees, and else what "auto" takes.
        head: index of the head.   check: frames for the comparison; a random cluster when not given.
        compile: whether the fast path is compiled, see `compiling.Compiler`.   kernels: "auto" takes those of `native` on a CPU where
        they can be compiled.   sampled: which weights move.
    Raises: ModelError when an element is unknown, or "stacked" was asked for and cannot be had.
    """
    device = torch.device(device)
    elements = tuple(sorted({int(z) for z in numbers}))
    module = module.to(device=device, dtype=dtype)
    frames = check or random_cluster(numbers)
    if path == "modules":
        return _announced(ModulesPotential(module, elements, head, dtype, device, "asked for"), sampled)
    reference = ModulesPotential(module, elements, head, dtype, device, "reference")
    if path == "cueq":
        accelerated = _cueq(module, reference, elements, head, frames)
        if accelerated is not None:
            return _announced(accelerated, sampled)
    try:
        stacked = StackedPotential(module, elements, head, dtype, device, kernels=kernels == "auto")
        _check_kernels(stacked, frames)
        error = disagreement(stacked, reference, frames)
        if error <= TOLERANCE[dtype]:
            stacked.compiler = Compiler(compile)
            return _announced(stacked, sampled)
        why = f"the fast path differs from MACE by {error:.1e}, allowed {TOLERANCE[dtype]:.0e}"
        logger.warning("%s; MACE's own code is used. Please report the model.", why)
    except UnsupportedModel as refusal:
        why = f"the fast path does not cover {refusal}"
    except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error_in_reading:
        why = f"the fast path cannot read this model ({type(error_in_reading).__name__}: {error_in_reading})"
        logger.warning("%s; MACE's own code is used. Please report the model.", why)
    if path == "stacked":
        raise ModelError(f"path = stacked cannot be had: {why}. Use path = auto.")
    return _announced(ModulesPotential(module, elements, head, dtype, device, why), sampled)


def _cueq(
    module: nn.Module, reference: ModulesPotential, elements: tuple[int, ...], head: int, frames: Frames
) -> CueqPotential | None:
    """The accelerated modules, or None and a warning when they cannot be had or differ."""
    try:
        found = CueqPotential(module, elements, head, reference.dtype, reference.device)
        error = max(disagreement(found, reference, frames), gradient_disagreement(found, reference, frames))
        if error <= CUEQ_TOLERANCE[reference.dtype]:
            return found
        why = f"it differs from MACE by {error:.1e}, allowed {CUEQ_TOLERANCE[reference.dtype]:.0e}"
    except Exception as refusal:  # whatever the package raises for models and devices that it does not cover
        why = f"{type(refusal).__name__}: {refusal!s:.300}"
    logger.warning("path = cueq cannot be had (%s); path = auto is taken", why)
    return None


def disagreement(stacked: StackedPotential | ModulesPotential, reference: ModulesPotential, frames: Frames) -> float:
    """Largest difference of energies and forces of two slightly different members, relative to max(1, |F|)."""
    weights = _perturbed(repeat_weights(reference.weights, 2))
    graph = build_graph(frames, stacked.cutoff, stacked.dtype, stacked.device)
    a, b = stacked.evaluate(weights, graph), reference.evaluate(weights, graph)
    size = max(1.0, float(b.forces.abs().max()))
    worst = max(float((a.forces - b.forces).abs().max()), float((a.energy - b.energy).abs().max()) / len(frames.numbers))
    return worst / size if np.isfinite(worst) else float("inf")


def _check_kernels(stacked: StackedPotential, frames: Frames) -> None:
    """Drops the kernels, with a warning, when they and the plain operations differ in values or in gradients of a loss."""
    if not stacked.native:
        return
    weights = _perturbed(repeat_weights(stacked.weights, 2))
    graph = build_graph(frames, stacked.cutoff, stacked.dtype, stacked.device)
    found = _values_and_gradients(stacked, weights, graph)
    native, stacked.native = stacked.native, []
    error = compiling.disagreement(found, _values_and_gradients(stacked, weights, graph))
    if error <= 1.0:
        stacked.native = native
        return
    stacked.path = PLAIN_PATH
    logger.warning("the kernels differ from the plain operations %.1f times the tolerance: they are not used", error)


def _values_and_gradients(stacked: StackedPotential, weights: dict[str, Tensor], graph: Graph) -> list[Tensor]:
    """Energies, forces and virials, and how a loss in all of them changes with every weight."""
    plain = stacked.evaluate(weights, graph)
    leaves = {name: x.detach().clone().requires_grad_(True) for name, x in weights.items()}
    e = stacked.evaluate(leaves, graph, create_graph=True)
    loss = e.energy.to(e.forces).square().sum() / graph.numbers.numel() + e.forces.square().sum() + e.virial.square().sum()
    loss = loss + e.features.square().sum()
    gradient = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return [plain.energy.to(plain.forces), plain.forces, plain.virial, plain.features, *gradient]


def _perturbed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Members that differ by about a hundredth, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    for x in weights.values():
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        x.mul_(1 + 0.01 * noise)
    return weights


def gradient_disagreement(found: ModulesPotential, reference: ModulesPotential, frames: Frames) -> float:
    """Largest difference of the derivatives of E + |F|² by the weights, relative to the largest."""
    graph = build_graph(frames, reference.cutoff, reference.dtype, reference.device)
    slopes = []
    for potential in (found, reference):
        weights = {name: x.requires_grad_(True) for name, x in repeat_weights(reference.weights, 1).items()}
        result = potential.evaluate(weights, graph, create_graph=True)
        loss = result.energy.sum() + result.forces.square().sum()
        slopes.append(torch.autograd.grad(loss, list(weights.values()), materialize_grads=True))
    size = max(float(x.abs().max()) for x in slopes[1])
    worst = max(float((a - b).abs().max()) for a, b in zip(*slopes, strict=True))
    return worst / size if np.isfinite(worst) else float("inf")


def random_cluster(numbers: Sequence[int]) -> Frames:
    """Two frames of up to 12 atoms with every element of the system, no two closer than about 1 Å."""
    kinds = sorted({int(z) for z in numbers})
    chosen = (kinds * 12)[: max(12, len(kinds))]
    rng = np.random.default_rng(0)
    grid = np.array([(i, j, k) for i in range(5) for j in range(5) for k in range(5)], dtype=float)[: len(chosen)]
    positions = 1.6 * grid + 0.25 * rng.standard_normal((2, len(chosen), 3)).clip(-1, 1)
    return Frames(np.array(chosen), positions)


def _announced(whole: StackedPotential | ModulesPotential, sampled: Sampled) -> MacePotential:
    """The potential with the weights that move, said once."""
    potential: MacePotential = whole
    if sampled != "all" and isinstance(whole, StackedPotential):
        potential = SubspacePotential(whole, sampled)
    elif sampled != "all" and isinstance(whole, ModulesPotential):
        whole.restrict(sampled_names(whole.weights, sampled, len(whole.module.interactions)), sampled)
        logger.warning("sampled = %s saves no time here: mace's own code evaluates all layers for every member", sampled)
    weights = sum(x.numel() for x in potential.weights.values())
    logger.info("potential path: %s; %d sampled weights, elements %s", potential.path, weights, potential.elements)
    return potential
