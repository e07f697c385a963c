"""A small pair potential with weights to sample: the same contract as a network, in a fraction of a millisecond.

E = Σ_{a<b} f(r) [ D ((1 - exp(-α (r - r_0)))² - 1) + MLP(r) ], f a smooth cutoff, D, α, r_0 per pair of elements (the first two
as logarithms, so that they stay positive), MLP one hidden layer of tanh on Gaussians of the distance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bnn_driver.potential.compiling import Compiler
from bnn_driver.potential.contract import Evaluation
from bnn_driver.potential.edges import edge_forces, edge_virial
from bnn_driver.potential.graph import Graph
from bnn_driver.potential.planning import CACHE

_CENTRES = 8
_HIDDEN = 8


class ToyPotential:
    """Morse pairs with a small neural correction; exact derivatives, weights > 50, for tests and dry runs."""

    def __init__(
        self,
        elements: Sequence[int],
        *,
        cutoff: float = 5.0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        """Args: elements: atomic numbers, in any order.   cutoff: Å.   generator: draws θ_0 (seed 0 when not given)."""
        self.elements = tuple(sorted({int(z) for z in elements}))
        self.cutoff = cutoff
        self.dtype = dtype
        self.device = torch.device(device)
        self.path = "toy: pair potential for tests"
        self.compiler = Compiler("off")
        self.never_sampled: tuple[str, ...] = ()
        self.edge_width, self.together = _CENTRES, CACHE
        self.n_features = 2 * _CENTRES
        self.last_layer: tuple[str, ...] = ()
        self.weights = _initial(self.elements, generator or torch.Generator().manual_seed(0), dtype, self.device)
        pairs = list(itertools.combinations_with_replacement(range(len(self.elements)), 2))
        table = torch.zeros(len(self.elements), len(self.elements), dtype=torch.int64)
        for i, (a, b) in enumerate(pairs):
            table[a, b] = table[b, a] = i
        self._pair_type = table.to(self.device)
        self._centres = torch.linspace(0.7, cutoff, _CENTRES, dtype=dtype, device=self.device)

    def energy_slopes(self, features: Tensor) -> Tensor:
        """Of no weights."""
        return features.new_zeros(len(features), 0)

    def prepare(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Nothing follows from the weights alone."""
        return weights

    def prepare_frames(self, graph: Graph) -> Graph:
        """Nothing is kept: all weights move."""
        return graph

    def evaluate(self, weights: Mapping[str, Tensor], graph: Graph, *, create_graph: bool = False) -> Evaluation:
        """See `Potential.evaluate`."""
        members = len(weights["morse.depth"])
        own = len(graph.lead) == 2
        with torch.set_grad_enabled(True):
            vectors = graph.vectors().detach()
            vectors = (vectors if own else vectors.expand(members, *vectors.shape)).clone().requires_grad_(True)
            slot_energy, features = self._slots(weights, graph, vectors)
            energy = slot_energy.double().sum(dim=(-1, -2))
            (gradient,) = torch.autograd.grad(energy.sum(), vectors, create_graph=create_graph)
        gradient = gradient * graph.mask.unsqueeze(-1)
        forces = edge_forces(gradient, graph.source)
        virial = edge_virial(gradient, vectors.detach())
        if not create_graph:
            energy, features = energy.detach(), features.detach()
        return Evaluation(energy, forces, virial, features)

    def _slots(self, weights: Mapping[str, Tensor], graph: Graph, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Energy of each slot (M, B, A, K), half a bond each, and features (M, B, A, F)."""
        order = torch.as_tensor(self.elements, device=self.device)
        kind = torch.searchsorted(order, graph.numbers)
        source_kind = kind[graph.source]
        pair_type = self._pair_type[kind[:, None], source_kind]  # (..., A, K)
        r = torch.linalg.vector_norm(vectors, dim=-1)
        x = (r / self.cutoff).clamp(max=1.0)
        cut = (1 - x**2) ** 3

        def of_pair(name: str) -> Tensor:
            flat = pair_type.reshape(-1) if pair_type.dim() == 3 else None
            w = weights[name]
            if flat is not None:
                return w.index_select(1, flat).view(len(w), *pair_type.shape)
            return torch.gather(w, 1, pair_type.reshape(len(w), -1)).view(pair_type.shape)

        stretch = torch.exp(-of_pair("morse.steepness").exp() * (r - of_pair("morse.length")))
        morse = of_pair("morse.depth").exp() * ((1 - stretch) ** 2 - 1)
        width = (self.cutoff - 0.7) / _CENTRES
        basis = torch.exp(-(((r.unsqueeze(-1) - self._centres) / width) ** 2)) * cut.unsqueeze(-1)
        rows = basis.reshape(len(r), -1, _CENTRES)
        hidden = torch.tanh(torch.baddbmm(weights["mlp.b0"], rows, weights["mlp.w0"]))
        correction = torch.bmm(hidden, weights["mlp.w1"]).view(r.shape)
        energy = 0.5 * cut * (morse + correction) * graph.mask
        per_atom = (basis * graph.mask.unsqueeze(-1)).sum(dim=-2)
        kind_weight = weights["embedding.w"].index_select(1, kind).unsqueeze(1)  # (M, 1, A, centres)
        return energy, torch.cat([per_atom, per_atom * kind_weight], dim=-1)


def _initial(
    elements: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """θ_0: bonds of ordinary length and a small correction."""
    pairs = list(itertools.combinations_with_replacement(elements, 2))
    length = torch.tensor([1.1 + 0.15 * ((a > 1) + (b > 1)) for a, b in pairs])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = {
        "morse.depth": torch.full((len(pairs),), math.log(1.5)) + 0.1 * normal(len(pairs)),
        "morse.steepness": torch.full((len(pairs),), math.log(1.8)) + 0.05 * normal(len(pairs)),
        "morse.length": length + 0.02 * normal(len(pairs)),
        "mlp.w0": normal(_CENTRES, _HIDDEN) / math.sqrt(_CENTRES),
        "mlp.b0": 0.1 * normal(1, _HIDDEN),
        "mlp.w1": 0.05 * normal(_HIDDEN, 1),
        "embedding.w": 0.3 * normal(len(elements), _CENTRES),
    }
    return {name: x.to(device, dtype) for name, x in weights.items()}
