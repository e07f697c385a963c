"""A MACE of which only the last weights are sampled: the layers before are evaluated once for all members.

The members share X, what the fixed layers make of a frame (`trunk.py`).  Inference: X once, then each member's readouts (and last
layer), with a backward pass of each through the common layers.  Training: X and its Jacobian are computed once per label and kept,
so that a step of the chains is small dense algebra.  Both give the numbers of the whole network with the other weights at θ_0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Literal

import torch
from torch import Tensor

from bnn_driver.errors import ModelError
from bnn_driver.potential.arrangement import Arranged, arrange, edge_sums
from bnn_driver.potential.contract import Evaluation
from bnn_driver.potential.graph import Graph
from bnn_driver.potential.layers import Bonds, read, slope_along_bonds
from bnn_driver.potential.planning import SHARE, free_memory, plan
from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.potential.trunk import KnownFrames, Split, Trunk, split_at, with_known

logger = logging.getLogger(__name__)

Sampled = Literal["all", "last-interaction", "readout"]
Weights = Mapping[str, Tensor]
_SYMMETRIC = [0, 3, 4, 3, 1, 5, 4, 5, 2]  # `trunk.STRAINS` of the nine entries of a matrix
#: evaluations that would take the memory of `Trunk.known`
_KNOWING = 4
#: members go back through the fixed layers together only where this many times as many would be evaluated together: each of them costs
#: a forward pass too, which one after the other need once (measured: small ethanol 14 against 19 ms together, medium 149 against 80)
_TOGETHER = 4


def sampled_names(weights: Weights, sampled: Sampled, layers: int) -> tuple[str, ...]:
    """Names of the weights that move.

    Args: weights: every weight that could.   layers: number of interaction layers.
    Raises: ModelError when the model has no such weights.
    """
    last = (f"interactions.{layers - 1}.", f"products.{layers - 1}.")
    prefixes = {"all": ("",), "last-interaction": (*last, "readouts."), "readout": ("readouts.",)}[sampled]
    names = tuple(name for name in weights if name.startswith(prefixes))
    if not names:
        raise ModelError(
            f'sampled = "{sampled}" selects weights that start with {", ".join(prefixes)}, but the model has none; use sampled = "all"'
        )
    return names


class _Groups(dict[str, Tensor]):
    """Weights of all members, and of groups of them made ready, by the size of the groups."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.by_size: dict[int, list[Weights]] = {}


class SubspacePotential:
    """The fast path with few sampled weights; see `Potential` for the contract."""

    def __init__(self, whole: StackedPotential, sampled: Sampled) -> None:
        """Args: whole: the same model with all its weights; its `weights` are θ_0."""
        layers = whole.tables.layers
        names = sampled_names(whole.weights, sampled, len(layers))
        self.whole = whole
        self.module, self.head, self.elements, self.cutoff = whole.module, whole.head, whole.elements, whole.cutoff
        self.dtype, self.device, self.compiler, self.n_features = whole.dtype, whole.device, whole.compiler, whole.n_features
        self.sampled = whole.sampled.only(names, sampled)
        self.weights = {name: whole.weights[name] for name in names}
        self.never_sampled = self.sampled.never_sampled
        fixed = len(layers) - (1 if sampled == "last-interaction" else 0)
        self.trunk = Trunk(whole, split_at(whole.tables, fixed)) if fixed else None
        shared = f"{fixed} of {len(layers)} layers once for all" if fixed else "there is no layer before the last one to share"
        self.path = f"{whole.path}; sampled: {sampled}, {shared}"
        self.edge_width, self.together = 1, whole.together  # all members come at once, and are split here
        self.last_layer = whole.last_layer
        self._kept: KnownFrames | None = None

    def energy_slopes(self, features: Tensor) -> Tensor:
        """See `Potential.energy_slopes`."""
        return self.whole.energy_slopes(features)

    def prepare(self, weights: Weights) -> Weights:
        """Weights that remember what follows from them for the groups of members in which frames need them."""
        return _Groups(weights)

    def prepare_frames(self, graph: Graph) -> Graph:
        """Frames with X and its Jacobian; those that begin the last list asked for are not computed again."""
        if self.trunk is None:
            return graph
        needed = graph.lead[0] * self.trunk.bytes_per_frame(len(graph.numbers), graph.cell is not None)
        room = int(SHARE * free_memory(self.device))
        if needed > room:
            logger.warning(
                "the fixed layers of %d labels and their derivatives take %.1f GB, of which %.1f may be used: they are evaluated at "
                "every step of the chains instead, with the same result, slower",
                graph.lead[0], needed / 1e9, room / 1e9,
            )  # fmt: skip
            return graph
        kept = _same_rows(self._kept, graph)
        parts = [self.trunk.known(graph.take(rows)) for rows in self._frames(graph, kept, _KNOWING)]
        before = [] if self._kept is None or not kept else [self._kept.take(torch.arange(kept, device=self.device))]
        names = {f.name for f in fields(KnownFrames)} - {f.name for f in fields(Graph)}
        self._kept = with_known(graph, {n: torch.cat([getattr(part, n) for part in (*before, *parts)]) for n in names})
        return self._kept

    def evaluate(self, weights: Weights, graph: Graph, *, create_graph: bool = False) -> Evaluation:
        """See `Potential.evaluate`."""
        if create_graph and self.trunk is not None and isinstance(graph, KnownFrames):
            return self._train(self.trunk, weights, graph)
        if create_graph or self.trunk is None or len(graph.lead) == 2:
            everything = self._all(weights)
            if create_graph:  # the whole network differentiates by what its weights make of an edge
                everything = {name: x if name in weights else x.requires_grad_(True) for name, x in everything.items()}
            return self.whole.evaluate(everything, graph, create_graph=create_graph)
        chunks = self._frames(graph, 0)
        parts = [self._serve(self.trunk, weights, graph.take(rows) if len(chunks) > 1 else graph) for rows in chunks]
        return Evaluation(*(torch.cat([getattr(part, f.name) for part in parts], dim=1) for f in fields(Evaluation)))

    # ---- inference

    def _serve(self, trunk: Trunk, weights: Weights, graph: Graph) -> Evaluation:
        """All members on frames whose edges fit into memory, compiled where that was asked for."""
        members = len(next(iter(weights.values())))
        copies = min(members, plan(members, graph.lead[0], _TOGETHER * self._frame_bytes(graph), self.device).members)
        groups = self._grouped(weights, copies)
        atoms, names, fixed = self.whole._sorting(graph.numbers), tuple(groups[0]), len(graph.tensors())

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            g = arrange(graph.with_tensors(tensors[:fixed]), atoms)
            firsts = range(fixed, len(tensors), len(names))
            return self._members(trunk, [dict(zip(names, tensors[i : i + len(names)], strict=True)) for i in firsts], g, copies)

        tensors = [*graph.tensors(), *(x for group in groups for x in group.values())]
        key = (atoms.key, names, copies, graph.cell is None)
        return Evaluation(*self.compiler("evaluation", key, function, tensors))

    def _members(self, trunk: Trunk, groups: Sequence[Weights], g: Arranged, copies: int) -> tuple[Tensor, ...]:
        """X once, then one group of at most `copies` members after the other, each with its own way back through the fixed layers."""
        with torch.no_grad():
            length, harmonics, slopes, basis = self.whole._geometry(g)
            fixed = [bonds.of_members(copies) for bonds in trunk.radial(basis)]
        with torch.enable_grad():
            y = harmonics.expand(copies, *harmonics.shape[1:]).clone().requires_grad_(True)
            fixed = [bonds.made_leaves(kernels=bool(self.whole.native)) for bonds in fixed]
            x = trunk.outputs(copies, y, fixed, g)
        found = []
        for some in groups:
            n = len(some[next(iter(self.weights))])
            with torch.no_grad():
                own = self._own_radial(some, basis)
            with torch.enable_grad():
                own = [bonds.made_leaves(kernels=bool(self.whole.native)) for bonds in own]
                node_energy, features = self._head(trunk.split, some, x[:n], y[:n], own, g)
                inputs = [y, *(leaf for bonds in (*fixed, *own) for leaf in bonds.leaves)]
                gradient_y, *grads = torch.autograd.grad(node_energy.sum(), inputs, retain_graph=some is not groups[-1])
            slope = slope_along_bonds([gradient[:n] for gradient in grads], [*(bonds.shortened(n) for bonds in fixed), *own])
            node_energy, slope = self.whole._with_repulsion(node_energy.detach(), slope, g, length)
            forces, virial = edge_sums(gradient_y[:n], slope, slopes, length, g)
            found.append((self.whole._total(node_energy, g), forces, virial, _by_frame(features.detach(), g)))
        return tuple(torch.cat(column) for column in zip(*found, strict=True))

    # ---- training

    def _train(self, trunk: Trunk, weights: Weights, graph: KnownFrames) -> Evaluation:
        """The minibatches of all members, by the chain rule through X."""
        split, members, b, a = trunk.split, len(next(iter(weights.values()))), graph.lead[-1], len(graph.numbers)
        weights = self.whole.prepare(weights)
        x = graph.outputs.expand(members, b, a, -1).clone().requires_grad_(True)
        if split.widths:
            node_energy, features, u, forces, virial = self._last_layer(split, weights, x, graph)
        else:
            node_energy, features = self._head(split, weights, x.view(members, b * a, -1))
            (u,) = torch.autograd.grad(node_energy.sum(), x, create_graph=True)
            node_energy, features = node_energy.view(members, b, a).double(), features.view(members, b, a, -1)
            forces, virial = x.new_zeros(()), x.new_zeros(())
        gradient = graph.fixed_slopes + _through(u, graph, split)
        forces = forces - gradient[..., : 3 * a].unflatten(-1, (a, 3))
        if graph.cell is None:
            virial = forces.transpose(-1, -2) @ graph.positions
        else:
            virial = virial - gradient[..., 3 * a :][..., _SYMMETRIC].unflatten(-1, (3, 3))
        return Evaluation(node_energy.sum(dim=-1) + graph.fixed_energy, forces, virial, features)

    def _last_layer(self, split: Split, weights: Weights, x: Tensor, graph: KnownFrames) -> tuple[Tensor, ...]:
        """Node energies (M, B, A), features, ∂E/∂X, and the forces and virial of the sampled layer's own edges."""
        g = arrange(graph, self.whole._sorting(graph.numbers))
        a, b, _ = g.shape
        members = len(x)
        with torch.no_grad():
            length, harmonics, slopes, basis = self.whole._geometry(g)
        own = self._own_radial(weights, basis)
        y = harmonics.expand(members, *harmonics.shape[1:]).clone().requires_grad_(True)
        nodes = x.transpose(1, 2).index_select(1, g.inverse.argsort()).reshape(members, a * b, -1)
        node_energy, features = self._head(split, weights, nodes, y, own, g)
        leaves = [leaf for bonds in own for leaf in bonds.leaves]
        u, gy, *grads = torch.autograd.grad(node_energy.sum(), [x, y, *leaves], create_graph=True)
        slope = slope_along_bonds(grads, own)
        forces, virial = edge_sums(gy, slope, slopes, length, g)
        by_atom = node_energy.double().view(members, a, b).transpose(1, 2)  # in any order: it is only summed
        virial = 0.5 * (virial + virial.transpose(-1, -2))  # only with that of X, whose rotations are not kept, is it symmetric
        return by_atom, _by_frame(features, g), u, forces, virial

    # ---- both

    def _head(
        self,
        split: Split,
        weights: Weights,
        x: Tensor,
        y: Tensor | None = None,
        radial: Sequence[Bonds] = (),
        g: Arranged | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Interaction energy of each node (M, N) and features (M, N, F).

        Args: x: (M, N, F).   y, radial, g: of the sampled layer, where there is one; nodes are then sorted.
        """
        tables = self.whole.tables
        blocks, scalars = split.pieces(x)
        if split.widths and y is not None and g is not None:
            last = len(tables.layers) - 1
            scalars[last - 1] = blocks[tables.layers[last - 1].scalar].flatten(2)
            blocks = self.whole._layer(last, weights, blocks, y, radial[0], g)
            scalars[last] = blocks[tables.layers[last].scalar].flatten(2)
        energy = torch.stack([read(readout, weights, scalars[readout.layer]) for readout in tables.readouts]).sum(dim=0)
        features = torch.cat([scalars[t] for t in range(max(0, len(tables.layers) - 2), len(tables.layers))], dim=2)
        return energy * tables.scale + tables.shift, features

    def _grouped(self, weights: Weights, size: int) -> list[Weights]:
        """At most `size` members in each, with what follows from their weights."""
        known = weights if isinstance(weights, _Groups) else _Groups(weights)
        if size not in known.by_size:
            members = len(next(iter(weights.values())))
            slices = [slice(first, first + size) for first in range(0, members, size)]
            with torch.no_grad():
                known.by_size[size] = [self.whole.prepare({name: x[rows] for name, x in weights.items()}) for rows in slices]
        return known.by_size[size]

    def _own_radial(self, weights: Weights, basis: tuple[Tensor, ...]) -> list[Bonds]:
        """What the radial networks of the sampled layer, if there is one, make of the bonds."""
        layers = self.whole.tables.layers
        first = len(layers) if self.trunk is None else self.trunk.split.fixed
        return [self.whole._radial(layer, weights, basis) for layer in layers[first:]]

    def _all(self, weights: Weights) -> Weights:
        """The whole network's weights, those that are not sampled at θ_0."""
        members = len(next(iter(weights.values())))
        return {name: x.expand(members, *x.shape) for name, x in self.whole.weights.items()} | dict(weights)

    def _frames(self, graph: Graph, first: int, share: int = 1) -> list[Tensor]:
        """Numbers of the frames from `first` on, as many at a time as fit into memory.  Args: share: evaluations whose memory each takes."""
        left = torch.arange(first, graph.lead[0], device=self.device)
        if not len(left):
            return []
        return list(left.split(plan(1, len(left), share * self._frame_bytes(graph), self.device).frames))

    def _frame_bytes(self, graph: Graph) -> int:
        return graph.source[0].numel() * self.whole.edge_width * self.dtype.itemsize


def _through(u: Tensor, graph: KnownFrames, split: Split) -> Tensor:
    """dE/dX · dX/dr, (M, B, D).  Args: u: (M, B, A, F) dE/dX."""
    m, b, a, _ = u.shape
    free = u[..., : split.first_sum].reshape(m, b, 1, a * split.first_sum)
    linear = u[..., 0, split.first_sum : split.first_plain].unsqueeze(2)  # the same for all atoms
    return (free @ graph.slopes + linear @ graph.sums).squeeze(2)


def _by_frame(x: Tensor, g: Arranged) -> Tensor:
    """Nodes (M, N, ·) in the order of the frames: (M, B, A, ·)."""
    a, b, _ = g.shape
    return x.view(len(x), a, b, -1).index_select(1, g.inverse).transpose(1, 2)


def _same_rows(known: KnownFrames | None, graph: Graph) -> int:
    """How many frames at the beginning of both are the same."""
    if known is None or not torch.equal(known.numbers, graph.numbers) or (known.cell is None) != (graph.cell is None):
        return 0
    n = min(known.lead[0], graph.lead[0])
    same = (known.positions[:n] == graph.positions[:n]).flatten(1).all(dim=1)
    if known.cell is not None and graph.cell is not None:
        same &= (known.cell[:n] == graph.cell[:n]).flatten(1).all(dim=1)
    return int(same.long().cumprod(0).sum())
