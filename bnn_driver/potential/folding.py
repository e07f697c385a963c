"""Every constant factor of a MACE network multiplied into its weights, once per generation instead of in every evaluation.

Each factor belongs to single numbers of a weight: the folded weight is the weight times a tensor of constants.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bnn_driver.potential.architecture import Architecture, Dense, ElementLinear, Layer, Linear

EMBEDDING = "node_embedding.linear.weight"


def folding_factors(tables: Architecture, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors of every weight that has any, flat (n,) or one number.  Args: weights: θ_0 without member axis."""
    one = next(iter(weights.values()))
    factors = {EMBEDDING: one.new_tensor(tables.embedding_scale)}
    for layer in tables.layers:
        for network in (layer.radial, layer.density):
            if network is not None:
                factors |= _of_network(network, one)
        factors[layer.up.weight] = _of_linear(layer.up, weights)
        factors[layer.product.weight] = _of_linear(layer.product, weights)
        factors[layer.mid.weight] = _of_linear(layer.mid, weights) * _of_paths(layer, weights)
        if layer.skip.weight in weights:
            factors[layer.skip.weight] = _of_elements(layer.skip, weights)
    for readout in tables.readouts:
        factors[readout.first] = one.new_tensor(readout.scale)
        if readout.second is not None:
            factors[readout.second] = one.new_tensor(readout.second_scale * readout.gain)
    return factors


def fold(weights: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights (M, ...) with their factors, of the same shapes; differentiable."""
    return {name: (x.flatten(1) * factors[name]).view(x.shape) if name in factors else x for name, x in weights.items()}


def _of_network(network: Dense, one: Tensor) -> dict[str, Tensor]:
    return {name: one.new_tensor(scale) for name, scale in zip(network.names, network.scales, strict=True)}


def _of_linear(linear: Linear, weights: Mapping[str, Tensor]) -> Tensor:
    out = torch.ones_like(weights[linear.weight]).flatten()
    for part in linear.parts:
        if part is not None:
            out[part.start : part.start + part.rows * part.columns] = part.scale
    return out


def _of_paths(layer: Layer, weights: Mapping[str, Tensor]) -> Tensor:
    """Of the tensor product's paths, on the rows of the map that takes its slots."""
    scale = {path.target: path.scale / layer.neighbours for path in layer.paths}
    out = torch.ones_like(weights[layer.mid.weight]).flatten()
    for part in layer.mid.parts:
        if part is not None:
            rows = out.new_tensor([scale[slot] for slot in part.inputs]).repeat_interleave(part.rows // len(part.inputs))
            out[part.start : part.start + part.rows * part.columns] = rows.repeat_interleave(part.columns)
    return out


def _of_elements(linear: ElementLinear, weights: Mapping[str, Tensor]) -> Tensor:
    out = torch.ones_like(weights[linear.weight]).flatten()
    for part in linear.parts:
        a, e, c = part.shape
        out[part.start : part.start + a * e * c] = part.scale
    return out
