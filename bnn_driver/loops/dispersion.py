"""How far apart the chains begin: as far as explains the foundation's error in the first labels.

With J the derivatives of the forces by the weights at θ_0 and weights θ_0 + w, w ~ N(0, s²), the forces change by Jw, whose mean
square is s² tr(JJᵀ); s is where that is the square of the residual: a moment estimate of the scale of the prior, from labels alone.
tr(JJᵀ) = E|Jᵀu|² over u ~ N(0, 1) (Hutchinson 1990, DOI 10.1080/03610919008812866), a backward pass for all u of a label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bnn_driver.potential.contract import Potential
from bnn_driver.potential.graph import build_graph
from bnn_driver.potential.params import repeat_weights
from bnn_driver.records import LabelledFrame

MARGIN = 1.25
"""The sd of the chains' centres in units of the estimate, chosen by `tests/benchmarks/uncertainty.py`."""
EXPLAINED = 8
"""Labels used at most."""
PROBES = 8
"""Random directions u per label."""


def explaining_sd(potential: Potential, labels: Sequence[LabelledFrame], generator: torch.Generator) -> float:
    """s, with the weights' unit; infinite when the forces do not depend on the weights.

    Args: labels: of the first update.   generator: of the directions, on the CPU.
    """
    residual = slopes = 0.0
    for item in labels[:EXPLAINED]:
        graph = build_graph(item.frame, potential.cutoff, potential.dtype, potential.device)
        leaves = {k: v.requires_grad_(True) for k, v in repeat_weights(potential.weights, PROBES).items()}
        forces = potential.evaluate(leaves, graph, create_graph=True).forces[:, 0]
        probes = torch.randn(forces.shape, generator=generator, dtype=torch.float64).to(forces)
        gradients = torch.autograd.grad((forces * probes).sum(), list(leaves.values()), materialize_grads=True)
        slopes += sum(float(x.double().square().sum()) for x in gradients) / PROBES
        label = torch.as_tensor(item.label.forces, dtype=torch.float64)
        residual += float((forces[0].detach().cpu().double() - label).square().sum())
    return math.sqrt(residual / slopes) if slopes > 0 else math.inf
