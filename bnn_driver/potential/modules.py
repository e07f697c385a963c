"""Any MACE energy model, exactly and slowly: its own module, one member after the other, on the same graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bnn_driver.potential.compiling import Compiler
from bnn_driver.potential.contract import Evaluation
from bnn_driver.potential.graph import Graph
from bnn_driver.potential.planning import CACHE
from bnn_driver.potential.pruning import SampledWeights


class ModulesPotential:
    """MACE's own forward pass by `torch.func.functional_call`; the reference of the fast path, and its fallback."""

    def __init__(
        self,
        module: Any,
        elements: tuple[int, ...],
        head: int,
        dtype: torch.dtype,
        device: torch.device,
        why: str,
    ) -> None:
        """Args: module: in `dtype` on `device`; its parameters are not changed.   why: reason for this path, for the log."""
        self.compiler = Compiler("off")
        self.module = self.network = module
        self.head = head
        self.elements = elements
        self.cutoff = float(module.r_max)
        self.dtype = dtype
        self.device = device
        self.sampled = SampledWeights(module, elements, head, dtype, device)
        self.weights = self.sampled.theta()
        self.never_sampled = self.sampled.never_sampled
        self.path = f"modules: MACE's own code, one member after the other ({why})"
        self._columns = _invariant_columns(module, device)
        self.edge_width, self.together = 1, CACHE  # one member at a time in any case
        self.n_features = len(self._columns)
        self.last_layer: tuple[str, ...] = ()
        e0 = torch.atleast_2d(module.atomic_energies_fn.atomic_energies).double()
        self._e0 = e0[head if len(e0) > 1 else 0].to(device)

    def restrict(self, names: Collection[str], why: str) -> None:
        """Let these weights move alone, before anything is evaluated.  Args: why: what the choice is called."""
        self.sampled = self.sampled.only(names, why)
        self.weights = self.sampled.theta()
        self.never_sampled = self.sampled.never_sampled
        self.path = f"{self.path}; sampled: {why}"

    def energy_slopes(self, features: Tensor) -> Tensor:
        """Of no weights."""
        return features.new_zeros(len(features), 0)

    def prepare(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Nothing follows from the weights alone."""
        return weights

    def prepare_frames(self, graph: Graph) -> Graph:
        """Nothing is kept: mace's modules compute all or nothing."""
        return graph

    def evaluate(self, weights: Mapping[str, Tensor], graph: Graph, *, create_graph: bool = False) -> Evaluation:
        """See `Potential.evaluate`."""
        members = len(next(iter(weights.values())))
        own = len(graph.lead) == 2
        shared = None if own else self._inputs(graph)
        parts = []
        for m in range(members):
            data = shared if shared is not None else self._inputs(_member(graph, m))
            parts.append(self._one({name: w[m] for name, w in weights.items()}, data, graph.lead[-1], create_graph))
        return Evaluation(*(torch.stack(column) for column in zip(*parts, strict=True)))

    def _parameters(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of the network that is called, from the sampled weights of one member."""
        return self.sampled.expanded(weights)

    def _one(self, weights: Mapping[str, Tensor], data: Mapping[str, Tensor], frames: int, create_graph: bool) -> list[Tensor]:
        """Energy (B,), forces (B, A, 3), virial (B, 3, 3) and features (B, A, F) of one member."""
        parameters = self._parameters(weights)
        if not create_graph:
            parameters = {name: p.detach() for name, p in parameters.items()}
        with torch.enable_grad(), _precision(self.dtype if hasattr(self.module, "pair_repulsion_fn") else None):
            out = torch.func.functional_call(
                self.network,
                parameters,
                (dict(data, positions=data["positions"].detach().clone()),),
                {"training": create_graph, "compute_force": True, "compute_virials": True},
            )
        kinds = data["node_attrs"].argmax(dim=1)
        # MACE adds E_0 in its own precision: take it off again per atom, and add it in float64
        e0 = self.module.atomic_energies_fn(data["node_attrs"])
        node_e0 = e0[:, self.head if e0.shape[1] > 1 else 0].double()
        inner = (out["node_energy"].double() - node_e0).view(frames, -1).sum(dim=1)
        energy = inner + self._e0[kinds].view(frames, -1).sum(dim=1)
        features = out["node_feats"].index_select(1, self._columns)
        result = [
            energy,
            out["forces"].view(frames, -1, 3),
            out["virials"].view(frames, 3, 3),
            features.view(frames, -1, self.n_features),
        ]
        return result if create_graph else [x.detach() for x in result]

    def _inputs(self, graph: Graph) -> dict[str, Tensor]:
        """A (B,)-graph as the dict MACE reads."""
        b, a, _ = graph.positions.shape
        first = torch.arange(b, device=self.device).view(b, 1, 1) * a
        receiver = (torch.arange(a, device=self.device).view(1, a, 1) + first).expand_as(graph.source)[graph.mask]
        source = (graph.source + first)[graph.mask]
        shift = graph.shift[graph.mask]
        if graph.cell is None:
            cell = torch.eye(3, dtype=self.dtype, device=self.device).expand(b, 3, 3)
            unit = torch.zeros_like(shift)
        else:
            cell = graph.cell
            frame = torch.arange(b, device=self.device).view(b, 1, 1).expand_as(graph.source)[graph.mask]
            inverse = torch.linalg.inv(cell.double())
            unit = torch.einsum("ei,eij->ej", shift.double(), inverse[frame]).round().to(self.dtype)
        known = self.module.atomic_numbers
        attrs = (graph.numbers.view(-1, 1) == known.view(1, -1)).to(self.dtype).repeat(b, 1)
        return {
            "positions": graph.positions.reshape(-1, 3),
            "node_attrs": attrs,
            "edge_index": torch.stack([source, receiver]),
            "shifts": shift,
            "unit_shifts": unit,
            "cell": cell.reshape(-1, 3),
            "batch": torch.arange(b, device=self.device).repeat_interleave(a),
            "ptr": torch.arange(b + 1, device=self.device) * a,
            "head": torch.full((b,), self.head, dtype=torch.int64, device=self.device),
        }


@contextmanager
def _precision(dtype: torch.dtype | None) -> Iterator[None]:
    """torch's default precision for a moment: MACE's nuclear repulsion raises integers to a power in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _member(graph: Graph, m: int) -> Graph:
    """The (B,)-graph of one member of an (M, B)-graph."""
    return Graph(
        numbers=graph.numbers,
        positions=graph.positions[m],
        source=graph.source[m],
        shift=graph.shift[m],
        mask=graph.mask[m],
        pair=graph.pair[m],
        half=graph.half[m],
        cell=None if graph.cell is None else graph.cell[m],
    )


def _invariant_columns(module: Any, device: torch.device) -> Tensor:
    """Columns of MACE's node features that are scalars of the last two layers."""
    columns, first = [], 0
    for product in module.products:
        layer: list[int] = []
        offset = first
        for mul, ir in product.linear.irreps_out:
            if ir.l == 0 and ir.p == 1:
                layer += range(offset, offset + mul)
            offset += mul * ir.dim
        columns.append(layer)
        first = offset
    return torch.tensor([c for layer in columns[-2:] for c in layer], device=device)
