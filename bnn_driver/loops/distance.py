"""The distance of a frame to the labels, as a generation carries it: the last layer's posterior of `bayes.laplace`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from bnn_driver.bayes.laplace import Sums
from bnn_driver.bayes.likelihood import NoiseModel
from bnn_driver.loops.seeds import generator
from bnn_driver.potential.contract import Potential
from bnn_driver.potential.ensemble import DISTANCE_PREFIX
from bnn_driver.potential.graph import build_graph
from bnn_driver.potential.params import repeat_weights
from bnn_driver.records import Frames, Generation, LabelledFrame

COMPONENTS = 96
"""Force components of a label that enter at most; of more, that many are drawn and weigh as all."""
AT_ONCE = 16
"""Copies of a frame that are differentiated together."""


@dataclass
class Distances:
    """Keeps the sums over the labels between updates; a function of the labels alone."""

    potential: Potential
    """With the weights of the foundation model; it must have a last layer."""
    noise: NoiseModel
    _known: set[str] = field(default_factory=set, init=False)
    _sums: Sums | None = field(default=None, init=False)

    def added(self, generation: Generation, labels: Sequence[LabelledFrame]) -> Generation:
        """The generation with the posterior of the last layer after these labels."""
        for item in labels:
            if item.label.frame_id not in self._known:
                self._sums = self._with(item)
                self._known.add(item.label.frame_id)
        if self._sums is None:
            return generation
        found = self._sums.posterior()
        facts = {"prior_sd": found.prior_sd, "noise": found.noise, "constant_sd": found.constant_sd}
        weights = generation.weights | {DISTANCE_PREFIX + name: x.numpy() for name, x in found.tensors().items()}
        return replace(generation, weights=weights, state=generation.state | {"distance": facts})

    def _with(self, item: LabelledFrame) -> Sums:
        names = self.potential.last_layer
        sums = self._sums or Sums.none(sum(self.potential.weights[name].numel() for name in names))
        components = item.label.forces.size
        rng = generator(0, "force components", item.label.frame_id)
        chosen = np.sort(rng.permutation(components)[:COMPONENTS])
        energy, forces, slopes = derivatives(self.potential, item.frame, chosen.tolist())
        residual = torch.as_tensor(item.label.forces.ravel()[chosen]) - forces
        noise, given = self.noise, item.label.energy + float(item.context.get("energy_offset", 0.0))
        return sums.with_label(
            slopes[0], given - energy, noise.energy_sd, slopes[1:], residual, noise.force_base_sd, components / len(chosen)
        )  # fmt: skip


def derivatives(potential: Potential, frame: Frames, components: Sequence[int]) -> tuple[float, Tensor, Tensor]:
    """What the foundation model says of a frame, and its derivatives by the weights of the last layer.

    Args: components: of the forces (0 .. 3A-1).   Returns: energy, eV; these forces (R,), eV/Å; derivatives (1 + R, D), energy first.
    """
    graph = build_graph(frame, potential.cutoff, potential.dtype, potential.device)
    wanted = [-1, *components]
    rows, energy, forces = [], 0.0, torch.zeros(0)
    for first in range(0, len(wanted), AT_ONCE):
        some = wanted[first : first + AT_ONCE]
        leaves = {k: v.requires_grad_(True) for k, v in repeat_weights(potential.weights, len(some)).items()}
        result = potential.evaluate(leaves, graph, create_graph=True)
        flat = result.forces[:, 0].flatten(1)
        parts = [result.energy[m, 0] if c < 0 else flat[m, c].double() for m, c in enumerate(some)]
        gradients = torch.autograd.grad(sum(parts), [leaves[name] for name in potential.last_layer], materialize_grads=True)  # type: ignore[arg-type]
        rows.append(torch.cat([x.reshape(len(some), -1) for x in gradients], dim=1).double().cpu())
        if first == 0:
            energy, forces = float(result.energy[0, 0].detach()), flat[0].detach().double().cpu()
    return energy, forces[list(components)], torch.cat(rows)
