"""MACE for M members at once, in plain tensor operations: the same numbers as MACE's own modules, many times faster.

Layout: nodes are (atom, frame) with atoms sorted by element, N = A·B; node features and messages [M, N, 2l+1, C].
Three choices make it fast:
- the radial networks run once per bond, not per direction, on value and derivative dw/dr together (forward mode), and the
  harmonics come with their derivatives, so that reverse mode never enters the geometry: with gY = ∂E/∂Y and gw = ∂E/∂w
  the force on an edge is gY·dY/dr + (gw·dw/dr) r/|r|, and the second derivative of training is one reverse pass;
- messages are summed over the neighbours of a node where they are made, never stored per edge (`native`, on CPUs), or by one small
  matrix product per path;
- the symmetric contraction is the sparse polynomial of `contraction.py`, by `native` or by matrix products.
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
from bnn_driver.potential.contraction import Contraction, Monomials
from bnn_driver.potential.folding import EMBEDDING, fold, folding_factors
from bnn_driver.potential.graph import Graph
from bnn_driver.potential.layers import (
    Bonds,
    by_element,
    convolve,
    element_matrix,
    forward_mode,
    matrix,
    mix,
    product,
    read,
    slope_along_bonds,
)
from bnn_driver.potential.native.convolution import Convolution, layer_tables, refusal
from bnn_driver.potential.native.polynomial import PolynomialTables
from bnn_driver.potential.params import repeat_weights
from bnn_driver.potential.planning import CACHE, STREAMED
from bnn_driver.potential.pruning import SampledWeights

PLAIN_PATH = "stacked: all members at once"
_PAIRS = "pairs."
_MONOMIALS = "monomials."
_TERMS = "terms."
_FEW_NODES = 64
"""Nodes up to which a compiled contraction goes term by term."""
Weights = Mapping[str, Tensor]


class StackedPotential:
    """The fast path; see `Potential` for the contract."""

    def __init__(
        self, module: Any, elements: tuple[int, ...], head: int, dtype: torch.dtype, device: torch.device, kernels: bool = False
    ) -> None:
        """Args: kernels: use those of `native` where they can be had.   Raises: UnsupportedModel when a part of the model is not covered."""
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
        self.tables: Architecture = read_architecture(module, self.sampled, head, dtype, device)
        why = refusal(self.tables.layers, dtype, device) if kernels else "not asked for"
        self.native = [] if why else [layer_tables(layer, dtype) for layer in self.tables.layers]
        """Tables of the kernels, layer by layer; empty without them."""
        self.path = f"{PLAIN_PATH}; no kernels: {why}" if why else f"{PLAIN_PATH}, in kernels"
        self._factors = folding_factors(self.tables, self.weights)
        self.edge_width = max(len(layer.paths) * layer.channels for layer in self.tables.layers)
        seen = range(len(self.tables.layers))[-2:]
        self._seen = {t: _width(self.tables.layers[t], self.weights) for t in seen}
        """Layers whose scalars are the features, and how many each has."""
        self.n_features = sum(self._seen.values())
        self._last_readouts = [r for r in self.tables.readouts if r.layer in self._seen]
        self.last_layer = tuple(name for r in self._last_readouts for name in (r.first, r.second) if name is not None)
        e0 = torch.atleast_2d(module.atomic_energies_fn.atomic_energies).double()
        self._e0 = e0[head if len(e0) > 1 else 0].to(device)[self.sampled.element_index]
        self._z = torch.tensor(elements, device=device)
        self._sorted: tuple[Tensor, Sorting] | None = None
        self._sortings: dict[tuple[int, ...], Sorting] = {}

    @property
    def together(self) -> int:
        """See `Potential.together`."""
        return STREAMED if self.native else CACHE

    def prepare(self, weights: Weights) -> Weights:
        """Weights with all constant factors, and the coefficients of the contraction that follow from them.

        Args: weights: all of them, or those of some layers.
        """
        out = fold(weights, self._factors)
        for t, layer in enumerate(self.tables.layers):
            if layer.contraction.couplings[0].weights[0] not in weights:
                continue
            groups = self._contraction_weights(layer, weights)
            for name, contraction in self._contraction_forms(layer):
                out[f"{name}{t}"] = contraction.weights(groups)
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
        return Evaluation(*self.compiler("evaluation", (atoms.key, names, graph.cell is None), function, tensors))

    def energy_slopes(self, features: Tensor) -> Tensor:
        """See `Potential.energy_slopes`."""
        b = len(features)
        copies = repeat_weights({name: self.weights[name] for name in self.last_layer}, b)
        leaves = {name: x.requires_grad_(True) for name, x in copies.items()}
        parts = dict(zip(self._seen, features.detach().split(list(self._seen.values()), dim=2), strict=True))
        with torch.enable_grad():
            weights = fold(leaves, self._factors)
            energies = [read(r, weights, parts[r.layer]).sum() for r in self._last_readouts]
            gradients = torch.autograd.grad(torch.stack(energies).sum() * self.tables.scale, list(leaves.values()))
        return torch.cat([x.reshape(b, -1) for x in gradients], dim=1)

    def _sorting(self, numbers: Tensor) -> Sorting:
        """One for all graphs of the same atoms, found without a look at the values when they bring the same tensor.

        None is ever dropped: a recording knows the addresses of its tensors.
        """
        if self._sorted is None or self._sorted[0] is not numbers:
            key = tuple(numbers.tolist())
            if key not in self._sortings:
                self._sortings[key] = sort_atoms(numbers, self._z)
            self._sorted = numbers, self._sortings[key]
        return self._sorted[1]

    def _evaluate(self, weights: Weights, g: Arranged, create_graph: bool) -> Evaluation:
        if not any(f"{name}0" in weights for name, _ in self._contraction_forms(self.tables.layers[0])):
            weights = self.prepare(weights)
        members = len(next(iter(weights.values())))
        with torch.no_grad():
            length, harmonics, slopes, basis = self._geometry(g)
        with torch.set_grad_enabled(create_graph):
            radial = [self._radial(layer, weights, basis) for layer in self.tables.layers]
        with torch.enable_grad():
            y = harmonics.expand(members, *harmonics.shape[1:])
            y = (y.clone() if create_graph else y.detach()).requires_grad_(True)
            radial = [bonds.made_leaves(kernels=bool(self.native)) for bonds in radial] if not create_graph else radial
            node_energy, features = self._network(weights, y, radial, g)
            inputs = [y, *(leaf for bonds in radial for leaf in bonds.leaves)]
            gradient_y, *grads = torch.autograd.grad(node_energy.sum(), inputs, create_graph=create_graph)
        with torch.set_grad_enabled(create_graph):
            slope = slope_along_bonds(grads, radial)
            node_energy, slope = self._with_repulsion(node_energy, slope, g, length)
            forces, virial = edge_sums(gradient_y, slope, slopes, length, g)
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

    def _radial(self, layer: Layer, weights: Weights, basis: tuple[Tensor, ...]) -> Bonds:
        """What the radial networks make of every bond."""
        values, slopes, cut, cut_slopes = basis
        w, dw = forward_mode(layer.radial, weights, values, slopes)
        rho = drho = None
        if layer.density is not None:
            q, dq = forward_mode(layer.density, weights, values, slopes)
            rho = torch.tanh(q * q)
            drho = (1 - rho * rho) * 2 * q * dq
        if not self.tables.radial.inside:
            w, dw = w * cut, dw * cut + w * cut_slopes
            if rho is not None and drho is not None:
                rho, drho = rho * cut, drho * cut + rho * cut_slopes
        return Bonds(w, dw, rho, drho)

    # ---- network

    def _network(self, weights: Weights, y: Tensor, radial: list[Bonds], g: Arranged) -> tuple[Tensor, Tensor]:
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

    def _layer(self, t: int, weights: Weights, blocks: list[Tensor], y: Tensor, bonds: Bonds, g: Arranged) -> list[Tensor]:
        """Node features after layer t from those before it (none before the first): per block (M, N, 2l+1, C)."""
        layer = self.tables.layers[t]
        embedding = weights[EMBEDDING].view(len(y), len(self.elements), -1) if t == 0 else None
        message = self._messages(t, weights, embedding, blocks, y, bonds, g)
        contracted = self._contract(t, weights, message, g)
        skip = self._skip(layer, weights, embedding, blocks, g)
        return product(layer, weights, contracted, skip)

    def _messages(
        self,
        t: int,
        weights: Weights,
        embedding: Tensor | None,
        blocks: list[Tensor],
        y: Tensor,
        bonds: Bonds,
        g: Arranged,
    ) -> Tensor:
        """Summed, mixed messages (M, N, n, C)."""
        layer = self.tables.layers[t]
        m, n, k = len(y), g.kind.numel(), g.shape[2]
        up = self._up(layer, weights, embedding, blocks)
        if self.native:
            summed = self._convolved(t, up, y, bonds, g)
        else:
            index = g.source if embedding is None else g.source_kind
            sources = [None if x is None else rows(x.flatten(2), index).view(m, -1, *x.shape[2:]) for x in up]
            summed = convolve(layer, bonds.w, sources, y.view(m, n, k, -1), g.pair)
        density = None
        if bonds.rho is not None:
            density = 1.0 + rows(bonds.rho, g.pair).view(m, n, k).sum(dim=-1)  # (M, N)
        out = []
        for degree, x in zip(layer.degrees, mix(layer, weights, summed, g.slices), strict=True):
            d = 2 * degree + 1
            block = y.new_zeros(m, n, d, layer.mixed) if x is None else x.view(m, n, d, -1)
            out.append(block if density is None else block / density[:, :, None, None])
        return torch.cat(out, dim=2)

    def _up(self, layer: Layer, weights: Weights, embedding: Tensor | None, blocks: list[Tensor]) -> list[Tensor | None]:
        """Features that neighbours send, per block: of nodes (M, N, 2l+1, C), or of elements (M, elements, 1, C)."""
        if embedding is not None:
            (first,) = [part for part in layer.up.parts if part is not None]
            return [torch.bmm(embedding, matrix(weights[layer.up.weight], first)).unsqueeze(2)]
        out: list[Tensor | None] = []
        for part in layer.up.parts:
            if part is None:
                out.append(None)
                continue
            (i,) = part.inputs
            m, n, d, c = blocks[i].shape
            out.append(torch.bmm(blocks[i].reshape(m, n * d, c), matrix(weights[layer.up.weight], part)).view(m, n, d, -1))
        return out

    def _convolved(self, t: int, up: list[Tensor | None], y: Tensor, bonds: Bonds, g: Arranged) -> list[Tensor | None]:
        """The convolution by the kernels, see `layers.convolve`."""
        there = [x for x in up if x is not None]
        x = there[0] if len(there) == 1 else torch.cat(there, dim=2)
        convolution = Convolution.on(self.native[t], g, g.source_kind if t == 0 else g.source, inner_x=t > 0)
        r = bonds.r
        found = convolution(bonds.w, x, y) if r is None else convolution.along_bonds(r, bonds.w, bonds.dw, x, y)
        rest = iter(found)
        return [None if part is None else next(rest) for part in self.tables.layers[t].mid.parts]

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
        """Contracted messages (M, N, R, C)."""
        forms = dict(self._contraction_forms(self.tables.layers[t]))
        plain = self.compiler.tracing and g.kind.numel() <= _FEW_NODES and _MONOMIALS in forms
        name = _MONOMIALS if plain else next(iter(forms))
        return forms[name](message, weights[f"{name}{t}"], g.slices)

    def _contraction_forms(self, layer: Layer) -> list[tuple[str, Contraction | Monomials | PolynomialTables]]:
        """The forms of the contraction that may be used, by the name of their coefficients; the first unless few nodes are compiled."""
        if self.native:
            return [(_TERMS, layer.contraction.sparse)]
        forms: list[tuple[str, Contraction | Monomials | PolynomialTables]] = [(_PAIRS, layer.contraction)]
        return [*forms, (_MONOMIALS, layer.contraction.plain)] if self.compiler.active else forms

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
        if self.tables.repulsion is None:
            return node_energy, slope
        with torch.no_grad():
            value, change = (x * g.bond[..., 0] for x in self.tables.repulsion(torch.gather(length, 1, g.half), g.z))
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
