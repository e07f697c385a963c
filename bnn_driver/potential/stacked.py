"""MACE for M members at once, in plain tensor operations: the same numbers as MACE's own modules, many times faster.

Layout: nodes are (atom, frame) with atoms sorted by element, N = A·B; node features and messages [M, N, 2l+1, C].
Three choices make it fast:
- the radial networks run once per bond, not per direction, on value and derivative dw/dr together (forward mode), and the
  harmonics come with their derivatives, so that reverse mode never enters the geometry: with gY = ∂E/∂Y and gw = ∂E/∂w
  the force on an edge is gY·dY/dr + (gw·dw/dr) r/|r|, and the second derivative of training is one reverse pass;
- messages are summed over the neighbours of a node by one small matrix product, never stored per edge;
- the symmetric contraction is the sparse polynomial of `contraction.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnn_driver.potential.architecture import Architecture, Layer, read_architecture
from bnn_driver.potential.arrangement import Arranged, Sorting, arrange, edge_sums, rows, sort_atoms
from bnn_driver.potential.compiling import Compiler
from bnn_driver.potential.contract import Evaluation
from bnn_driver.potential.geometry import envelope
from bnn_driver.potential.graph import Graph
from bnn_driver.potential.layers import by_element, convolve, element_matrix, forward_mode, matrix, mix, product, read
from bnn_driver.potential.pruning import SampledWeights

_PAIRS = "pairs."
_COEFFICIENTS = "monomials."
_FEW_NODES = 64
"""Nodes up to which a compiled contraction goes term by term."""
Weights = Mapping[str, Tensor]


class StackedPotential:
    """The fast path; see `Potential` for the contract."""

    def __init__(self, module: Any, elements: tuple[int, ...], head: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises: UnsupportedModel when a part of the model is not covered."""
        self.compiler = Compiler("off")
        self.module = module
        self.head = head
        self.elements = elements
        self.cutoff = float(module.r_max)
        self.dtype = dtype
        self.device = device
        self.sampled = SampledWeights(module, elements, head, dtype, device)
        self.weights = self.sampled.theta()
        self.never_sampled = self.sampled.never_sampled
        self.path = "stacked: all members at once"
        self.tables: Architecture = read_architecture(module, self.sampled, head, dtype, device)
        self.edge_width = max(len(layer.paths) * layer.channels for layer in self.tables.layers)
        self.n_features = sum(_width(layer, self.weights) for layer in self.tables.layers[-2:])
        e0 = torch.atleast_2d(module.atomic_energies_fn.atomic_energies).double()
        self._e0 = e0[head if len(e0) > 1 else 0].to(device)[self.sampled.element_index]
        self._z = torch.tensor(elements, device=device)
        self._sorted: Sorting | None = None

    def prepare(self, weights: Weights) -> Weights:
        """Weights with the contraction's pair weights, which depend on them alone."""
        out = dict(weights)
        for t, layer in enumerate(self.tables.layers):
            groups = self._contraction_weights(layer, weights)
            out[f"{_PAIRS}{t}"] = layer.contraction.weights(groups)
            if self.compiler.active:
                out[f"{_COEFFICIENTS}{t}"] = layer.contraction.plain.weights(groups)
        return out

    def evaluate(self, weights: Weights, graph: Graph, *, create_graph: bool = False) -> Evaluation:
        """See `Potential.evaluate`."""
        atoms = self._sorting(graph.numbers)
        if create_graph or not self.compiler.active:
            return self._evaluate(weights, arrange(graph, atoms), create_graph)
        names, fixed = tuple(weights), len(graph.tensors())

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            g = arrange(graph.with_tensors(tensors[:fixed]), atoms)
            e = self._evaluate(dict(zip(names, tensors[fixed:], strict=True)), g, create_graph=False)
            return e.energy, e.forces, e.virial, e.features

        tensors = [*graph.tensors(), *weights.values()]
        key = (atoms.key, names, graph.source.shape, graph.half.shape, graph.cell is None, tensors[-1].shape)
        return Evaluation(*self.compiler("evaluation", key, function, tensors))

    def _sorting(self, numbers: Tensor) -> Sorting:
        """Kept for the last atoms seen: every graph of one run brings the same tensor."""
        if self._sorted is None or self._sorted.numbers is not numbers:
            self._sorted = sort_atoms(numbers, self._z)
        return self._sorted

    def _evaluate(self, weights: Weights, g: Arranged, create_graph: bool) -> Evaluation:
        members = len(next(iter(weights.values())))
        with torch.no_grad():
            length, harmonics, slopes, basis = self._geometry(g)
        unit = g.vectors / length.unsqueeze(-1)
        with torch.set_grad_enabled(create_graph):
            radial = [self._radial(layer, weights, basis) for layer in self.tables.layers]
        with torch.enable_grad():
            leaves = [r[0] if create_graph else r[0].requires_grad_(True) for r in radial]
            y = harmonics.expand(members, *harmonics.shape[1:]).clone().requires_grad_(True)
            node_energy, features = self._network(weights, y, leaves, g)
            grads = torch.autograd.grad(node_energy.sum(), [y, *leaves], create_graph=create_graph)
        with torch.set_grad_enabled(create_graph):
            slope = torch.stack([(gw * dw).sum(dim=-1) for gw, (_, dw) in zip(grads[1:], radial, strict=True)]).sum(dim=0)
            node_energy, slope = self._with_repulsion(node_energy, slope, g, length)
            forces, virial = edge_sums(grads[0], slope, slopes, unit, g)
            energy = self._total(node_energy, g)
        if not create_graph:
            energy, features = energy.detach(), features.detach()
        a, b, _ = g.shape
        features = features.view(members, a, b, -1).index_select(1, g.inverse).transpose(1, 2)
        return Evaluation(energy, forces, virial, features)

    def prepare_frames(self, graph: Graph) -> Graph:
        """Nothing is kept: all weights move."""
        return graph

    # ---- geometry: no weights, no automatic derivative

    def _geometry(self, g: Arranged) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Edge lengths (L, E), Y (L, E, n), dY/dr (L, E, n, 3) 1/Å, and the radial basis of the bonds with derivatives."""
        length = torch.linalg.vector_norm(g.vectors, dim=-1)
        harmonics, slopes = self.tables.angular(g.vectors / length.unsqueeze(-1), length)
        r = torch.gather(length, 1, g.half)
        values, value_slopes, cut, cut_slopes = self.tables.radial(r, g.z)
        basis = (values * g.bond, value_slopes * g.bond, cut * g.bond, cut_slopes * g.bond)
        return length, harmonics, slopes, basis

    def _radial(self, layer: Layer, weights: Weights, basis: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Convolution weights w (M, Q, paths·C [+ 1 density]) of every bond, and dw/dr."""
        values, slopes, cut, cut_slopes = basis
        w, dw = forward_mode(layer.radial, weights, values, slopes)
        if layer.density is not None:
            q, dq = forward_mode(layer.density, weights, values, slopes)
            rho = torch.tanh(q * q)
            w, dw = torch.cat([w, rho], dim=-1), torch.cat([dw, (1 - rho * rho) * 2 * q * dq], dim=-1)
        if not self.tables.radial.inside:
            w, dw = w * cut, dw * cut + w * cut_slopes
        return w, dw

    # ---- network

    def _network(self, weights: Weights, y: Tensor, radial: list[Tensor], g: Arranged) -> tuple[Tensor, Tensor]:
        """Interaction energy of each node (M, N) and features (M, N, F)."""
        m, n = len(y), g.kind.numel()
        blocks: list[Tensor] = []
        energy = y.new_zeros(m, n)
        scalars = []
        for t, layer in enumerate(self.tables.layers):
            blocks = self._layer(t, weights, blocks, y, radial[t], g)
            scalars.append(blocks[layer.scalar].flatten(2))
        for readout in self.tables.readouts:
            energy = energy + read(readout, weights, scalars[readout.layer])
        features = torch.cat(scalars[-2:], dim=2)
        return energy * self.tables.scale + self.tables.shift, features

    def _layer(self, t: int, weights: Weights, blocks: list[Tensor], y: Tensor, radial: Tensor, g: Arranged) -> list[Tensor]:
        """Node features after layer t from those before it (none before the first): per block (M, N, 2l+1, C)."""
        layer = self.tables.layers[t]
        embedding = None
        if t == 0:
            w = weights["node_embedding.linear.weight"]
            embedding = w.view(len(y), len(self.elements), -1) * self.tables.embedding_scale
        message = self._messages(layer, weights, embedding, blocks, y, radial, g)
        contracted = self._contract(t, weights, message, g)
        skip = self._skip(layer, weights, embedding, blocks, g)
        return product(layer, weights, contracted, skip)

    def _messages(
        self,
        layer: Layer,
        weights: Weights,
        embedding: Tensor | None,
        blocks: list[Tensor],
        y: Tensor,
        radial: Tensor,
        g: Arranged,
    ) -> Tensor:
        """Summed, mixed messages with a constant 1 behind: (M, N, n + 1, C)."""
        m, n, k = len(y), g.kind.numel(), g.shape[2]
        w = rows(radial, g.pair)  # (M, E, paths·C [+ 1])
        sources = self._sources(layer, weights, embedding, blocks, g)
        mid = convolve(layer, w, sources, y.view(m * n, k, -1))
        density = None
        if layer.density is not None:
            density = 1.0 + w[..., -1].view(m, n, k).sum(dim=-1)  # (M, N)
        mixed = mix(layer, weights, mid, m, g.slices)
        out = []
        for degree, x in zip(layer.degrees, mixed, strict=True):
            d = 2 * degree + 1
            block = y.new_zeros(m, n, d, layer.mixed) if x is None else x.view(m, n, d, -1)
            out.append(block if density is None else block / density[:, :, None, None])
        out.append(y.new_ones(1, 1, 1, 1).expand(m, n, 1, out[0].shape[3]))
        return torch.cat(out, dim=2)

    def _sources(
        self, layer: Layer, weights: Weights, embedding: Tensor | None, blocks: list[Tensor], g: Arranged
    ) -> list[Tensor | None]:
        """Per block of the neighbours' features: (M, E, 2l+1, C)."""
        if embedding is not None:
            (first,) = [part for part in layer.up.parts if part is not None]
            up = torch.bmm(embedding, matrix(weights[layer.up.weight], first))
            return [rows(up, g.source_kind).unsqueeze(2)]
        out: list[Tensor | None] = []
        for part in layer.up.parts:
            if part is None:
                out.append(None)
                continue
            (i,) = part.inputs
            m, n, d, c = blocks[i].shape
            up = torch.bmm(blocks[i].view(m, n * d, c), matrix(weights[layer.up.weight], part))
            out.append(rows(up.view(m, n, -1), g.source).view(m, -1, d, part.columns))
        return out

    def _skip(
        self, layer: Layer, weights: Weights, embedding: Tensor | None, blocks: list[Tensor], g: Arranged
    ) -> dict[int, Tensor]:
        """Skip connection: target block -> (M, N, 2l+1, C)."""
        if not (layer.residual and layer.use_skip):
            return {}
        out = {}
        for part in layer.skip.parts:
            w = element_matrix(weights[layer.skip.weight], part)  # (M, elements, in, out)
            if embedding is not None:
                per_element = torch.matmul(embedding.unsqueeze(2), w)
                out[part.target] = per_element.index_select(1, g.kind)
            else:
                m, n, d, c = blocks[part.source].shape
                mapped = by_element(blocks[part.source].reshape(m, n * d, c), w, g.slices, d)
                out[part.target] = mapped.view(m, n, d, -1)
        return out

    def _contract(self, t: int, weights: Weights, message: Tensor, g: Arranged) -> Tensor:
        """Contracted messages (M, N, R, C), in the form that is fastest for so many nodes."""
        layer = self.tables.layers[t]
        plain = self.compiler.tracing and g.kind.numel() <= _FEW_NODES
        name, contract = (_COEFFICIENTS, layer.contraction.plain) if plain else (_PAIRS, layer.contraction)
        prepared = weights.get(f"{name}{t}")
        if prepared is None:
            prepared = contract.weights(self._contraction_weights(layer, weights))
        return contract(message, prepared, g.slices)

    def _contraction_weights(self, layer: Layer, weights: Weights) -> list[list[Tensor]]:
        """Per output irrep and ν: (M, E, k_ν, C)."""
        groups = []
        for coupling in layer.contraction.couplings:
            group = []
            for name, u in zip(coupling.weights, coupling.tensors, strict=True):
                w = weights[name]
                group.append(w.view(len(w), len(self.elements), u.shape[-1], -1))
            groups.append(group)
        return groups

    # ---- energies

    def _with_repulsion(self, node_energy: Tensor, slope: Tensor, g: Arranged, length: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the screened nuclear repulsion of the model, if it has one."""
        if not self.tables.repulsion:
            return node_energy, slope
        zbl = self.module.pair_repulsion_fn
        radii = zbl.covalent_radii.to(self.device, self.dtype)
        za, zb = (z.to(self.dtype) for z in g.z)
        r = torch.gather(length, 1, g.half)
        with torch.no_grad():
            a = float(zbl.a_prefactor) * 0.529 / (za ** float(zbl.a_exp) + zb ** float(zbl.a_exp))
            terms = [(float(c), -b) for c, b in zip(zbl.c, (3.2, 0.9423, 0.4028, 0.2016), strict=True)]
            phi = sum(c * torch.exp(b * r / a) for c, b in terms)
            dphi = sum(c * b / a * torch.exp(b * r / a) for c, b in terms)
            cut, dcut = envelope(r, radii[g.z[0]] + radii[g.z[1]], int(zbl.p))
            front = 14.3996 * za * zb / r * g.bond[..., 0]
            value = front * phi * cut
            change = front * (dphi * cut + phi * dcut - phi * cut / r)
        factor = self.tables.scale if self.tables.scaled_repulsion else 1.0
        per_edge = 0.5 * factor * rows(value.unsqueeze(-1), g.pair)[..., 0]
        per_node = per_edge.view(len(per_edge), g.kind.numel(), -1).sum(dim=-1)
        return node_energy + per_node, slope + factor * change

    def _total(self, node_energy: Tensor, g: Arranged) -> Tensor:
        """(M, B) eV, float64."""
        a, b, _ = g.shape
        return node_energy.double().view(-1, a, b).sum(dim=1) + self._e0.index_select(0, g.kind).view(a, b).sum(dim=0)


def _width(layer: Layer, weights: Weights) -> int:
    part = layer.product.parts[layer.scalar]
    return 0 if part is None else part.columns
