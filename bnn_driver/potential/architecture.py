"""What a MACE module is made of, read into plain tables; what the fast path cannot do is refused with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from bnn_driver.potential.contraction import Contraction, Coupling, build_contraction
from bnn_driver.potential.geometry import Angular, Radial, angular
from bnn_driver.potential.mace import spherical_harmonics, wigner_3j
from bnn_driver.potential.pruning import SampledWeights
from bnn_driver.potential.repulsion import Repulsion, read_repulsion

_INTERACTIONS = {
    "RealAgnosticInteractionBlock": (False, False),
    "RealAgnosticResidualInteractionBlock": (True, False),
    "RealAgnosticDensityInteractionBlock": (False, True),
    "RealAgnosticDensityResidualInteractionBlock": (True, True),
}


class UnsupportedModel(Exception):
    """The fast path does not cover this architecture; the message says what."""


@dataclass(frozen=True)
class LinearPart:
    """Weights (rows, columns) that make one output block from input blocks laid side by side."""

    inputs: tuple[int, ...]
    start: int
    rows: int
    columns: int
    scale: float


@dataclass(frozen=True)
class Linear:
    """An e3nn linear map: per output block its part, or None where nothing reaches it."""

    weight: str
    parts: tuple[LinearPart | None, ...]


@dataclass(frozen=True)
class ElementPart:
    """Weights (in, element, out) from block `source` to block `target`."""

    source: int
    target: int
    start: int
    shape: tuple[int, int, int]
    scale: float


@dataclass(frozen=True)
class ElementLinear:
    """A tensor product with the one-hot element: a linear map per element."""

    weight: str
    parts: tuple[ElementPart, ...]


@dataclass(frozen=True, eq=False)
class Path:
    """One tensor product of a neighbour's block `source` with the harmonics of degree l2, into its own slot `target`."""

    source: int
    l1: int
    l2: int
    l3: int
    target: int
    coupling: torch.Tensor | None
    """(2 l3 + 1, (2 l2 + 1)(2 l1 + 1)); None when it is a multiple of one."""
    scale: float


@dataclass(frozen=True)
class Dense:
    """A radial network: names of its layers' weights, their scales, and the constant in front of SiLU."""

    names: tuple[str, ...]
    scales: tuple[float, ...]
    gain: float


@dataclass(frozen=True, eq=False)
class Layer:
    """One interaction with its product and readout."""

    residual: bool
    up: Linear
    radial: Dense
    density: Dense | None
    paths: tuple[Path, ...]
    channels: int
    """Of the neighbours' features, in the convolution."""
    mixed: int
    """Of the contracted features."""
    mid: Linear
    skip: ElementLinear
    neighbours: float
    degrees: tuple[int, ...]
    """l of the blocks that are contracted."""
    contraction: Contraction
    hidden: tuple[int, ...]
    """l of the blocks that come out."""
    scalar: int
    """Which block of `hidden` is 0e."""
    product: Linear
    use_skip: bool


@dataclass(frozen=True)
class Readout:
    """Energy per atom from the scalars of a layer: one linear map, or two with SiLU between."""

    layer: int
    first: str
    scale: float
    second: str | None
    second_scale: float
    gain: float


@dataclass(frozen=True, eq=False)
class Architecture:
    """All tables of a model."""

    embedding_scale: float
    angular: Angular
    radial: Radial
    layers: tuple[Layer, ...]
    readouts: tuple[Readout, ...]
    scale: float
    shift: float
    repulsion: Repulsion | None
    scaled_repulsion: bool


def read_architecture(module: Any, sampled: SampledWeights, head: int, dtype: torch.dtype, device: torch.device) -> Architecture:
    """Tables of a MACE or ScaleShiftMACE module.  Raises: UnsupportedModel with the part that is not covered."""
    _need(type(module).__name__ in ("MACE", "ScaleShiftMACE"), f"a {type(module).__name__}")
    radial = _radial(module, dtype, device)
    lmax = int(module.spherical_harmonics._lmax)
    layers = tuple(_layer(module, t, sampled, dtype, device) for t in range(len(module.interactions)))
    scaled = hasattr(module, "scale_shift")
    scale, shift = (_of_head(getattr(module.scale_shift, k), head) for k in ("scale", "shift")) if scaled else (1.0, 0.0)
    tables = angular(lmax, lambda v: _checked_harmonics(module, lmax, v)).to(device, dtype)
    embedding = module.node_embedding.linear.instructions
    _need(len(embedding) == 1, "an element embedding with several blocks")
    return Architecture(
        embedding_scale=float(embedding[0].path_weight),
        angular=tables,
        radial=radial,
        layers=layers,
        readouts=tuple(_readout(module, i) for i in range(len(module.readouts))),
        scale=scale,
        shift=shift,
        repulsion=read_repulsion(module, dtype, device),
        scaled_repulsion=scaled,
    )


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise UnsupportedModel(what)


def _of_head(x: torch.Tensor, head: int) -> float:
    values = torch.atleast_1d(x)
    return float(values[head if len(values) > 1 else 0])


def _checked_harmonics(module: Any, lmax: int, v: torch.Tensor) -> torch.Tensor:
    _need(len(module.spherical_harmonics._ls_list) == lmax + 1, "edge harmonics that skip a degree")
    return spherical_harmonics(lmax, v)


def _radial(module: Any, dtype: torch.dtype, device: torch.device) -> Radial:
    block = module.radial_embedding
    basis, cut = block.bessel_fn, block.cutoff_fn
    _need(type(basis).__name__ == "BesselBasis", f"a radial basis of {type(basis).__name__}")
    transform = getattr(block, "distance_transform", None)
    _need(transform is None or type(transform).__name__ == "AgnesiTransform", f"the {type(transform).__name__}")
    _need(float(cut.p) == int(cut.p), f"a cutoff of power {float(cut.p)}")
    repulsion = getattr(module, "pair_repulsion_fn", None)
    radii = next((x.covalent_radii for x in (transform, repulsion) if x is not None), torch.zeros(1))
    return Radial(
        frequencies=basis.bessel_weights.detach().to(device, dtype),
        prefactor=float(basis.prefactor),
        cutoff=float(cut.r_max),
        power=int(cut.p),
        agnesi=None if transform is None else (float(transform.q), float(transform.p), float(transform.a)),
        radii=radii.to(device, dtype),
        inside=bool(getattr(block, "apply_cutoff", True)),
    )


def _layer(module: Any, t: int, sampled: SampledWeights, dtype: torch.dtype, device: torch.device) -> Layer:
    block, product = module.interactions[t], module.products[t]
    name = type(block).__name__
    _need(name in _INTERACTIONS, f"the {name}")
    residual, density = _INTERACTIONS[name]
    prefix = f"interactions.{t}"
    _need(not getattr(product, "use_agnostic_product", False), "an element-agnostic product")
    muls = {mul for mul, _ in block.conv_tp.irreps_in1}
    _need(len(muls) == 1, "neighbour features with several channel numbers")
    _need({i.connection_mode for i in block.conv_tp.instructions} == {"uvu"}, "a convolution that mixes channels")
    hidden = [ir for _, ir in product.linear.irreps_out]
    scalars = [i for i, ir in enumerate(hidden) if ir.l == 0 and ir.p == 1]
    _need(len(scalars) == 1, "a layer without exactly one block of scalars")
    if t == 0:
        _need([ir.l for _, ir in block.node_feats_irreps] == [0], "first-layer features that are not scalars")
    return Layer(
        residual=residual,
        up=_linear(block.linear_up, f"{prefix}.linear_up.weight"),
        radial=_dense(block.conv_tp_weights, f"{prefix}.conv_tp_weights"),
        density=_dense(block.density_fn, f"{prefix}.density_fn") if density else None,
        paths=_paths(block.conv_tp, dtype, device),
        channels=muls.pop(),
        mixed=int(block.target_irreps[0].mul),
        mid=_by_slots(_linear(block.linear, f"{prefix}.linear.weight"), block.linear.irreps_in, block.conv_tp.irreps_out),
        skip=_element_linear(block.skip_tp, f"{prefix}.skip_tp.weight", len(sampled.element_index)),
        neighbours=1.0 if density else float(block.avg_num_neighbors),
        degrees=tuple(ir.l for _, ir in block.target_irreps),
        contraction=build_contraction(_couplings(product, t, sampled), dtype, device),
        hidden=tuple(ir.l for ir in hidden),
        scalar=scalars[0],
        product=_linear(product.linear, f"products.{t}.linear.weight"),
        use_skip=bool(product.use_sc),
    )


def _linear(linear: Any, weight: str) -> Linear:
    _need(hasattr(linear, "instructions") and hasattr(linear, "irreps_out"), f"{weight}: not an e3nn linear map")
    _need(getattr(linear, "bias_numel", 0) == 0, f"{weight}: a linear map with a bias")
    parts: list[LinearPart | None] = [None] * len(linear.irreps_out)
    offset = 0
    for instruction in linear.instructions:
        rows, columns = instruction.path_shape
        before = parts[instruction.i_out]
        if before is None:
            parts[instruction.i_out] = LinearPart((instruction.i_in,), offset, rows, columns, float(instruction.path_weight))
        else:
            _need(before.start + before.rows * before.columns == offset, f"{weight}: blocks in an unusual order")
            _need(before.scale == float(instruction.path_weight), f"{weight}: blocks of unequal scale")
            parts[instruction.i_out] = LinearPart(
                (*before.inputs, instruction.i_in), before.start, before.rows + rows, columns, before.scale
            )
        offset += rows * columns
    return Linear(weight, tuple(parts))


def _by_slots(linear: Linear, merged: Any, slots: Any) -> Linear:
    """The same map with its inputs counted as slots of the tensor product, of which e3nn merges equal neighbours."""
    members: list[list[int]] = [[] for _ in merged]
    place, filled = 0, 0
    for slot, (mul, _) in enumerate(slots):
        members[place].append(slot)
        filled += mul
        if filled == merged[place].mul:
            place, filled = place + 1, 0
    _need(place == len(merged), f"{linear.weight}: inputs that do not line up with the tensor product")

    def expanded(part: LinearPart | None) -> LinearPart | None:
        return None if part is None else replace(part, inputs=tuple(slot for i in part.inputs for slot in members[i]))

    return Linear(linear.weight, tuple(expanded(part) for part in linear.parts))


def _element_linear(product: Any, weight: str, elements: int) -> ElementLinear:
    parts, offset = [], 0
    for instruction in product.instructions:
        a, _, c = instruction.path_shape
        ir = product.irreps_in1[instruction.i_in1].ir
        scale = float(instruction.path_weight) / math.sqrt(2 * ir.l + 1)
        parts.append(ElementPart(instruction.i_in1, instruction.i_out, offset, (a, elements, c), scale))
        offset += a * elements * c
    _need(len({p.target for p in parts}) == len(parts), f"{weight}: two blocks into one")
    return ElementLinear(weight, tuple(parts))


def _dense(network: Any, prefix: str) -> Dense:
    _need(hasattr(network, "hs"), f"{prefix}: not an e3nn fully connected network")
    names, scales, gain, variance = [], [], 1.0, 1.0
    layers = list(network.children())
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        act = getattr(layer, "act", None)
        _need((act is None) == last, f"{prefix}: an unusual placing of activations")
        names.append(f"{prefix}.layer{i}.weight")
        out = math.sqrt(layer.var_out) if last else 1.0
        scales.append(variance * out / math.sqrt(layer.h_in * layer.var_in))
        if act is not None:
            _need(act.f is torch.nn.functional.silu, f"{prefix}: an activation that is not SiLU")
            gain = float(act.cst)
            variance = gain * math.sqrt(layer.var_out)
    return Dense(tuple(names), tuple(scales), gain)


def _paths(product: Any, dtype: torch.dtype, device: torch.device) -> tuple[Path, ...]:
    out = []
    for instruction in product.instructions:
        l1 = product.irreps_in1[instruction.i_in1].ir.l
        l2 = product.irreps_in2[instruction.i_in2].ir.l
        l3 = product.irreps_out[instruction.i_out].ir.l
        table = torch.as_tensor(wigner_3j(l1, l2, l3)) * float(instruction.path_weight)  # (i, j, k)
        _need(instruction.i_in2 == l2, "edge harmonics in an unusual order")
        simple = l1 == 0 or l2 == 0  # then the coefficients are a multiple of one
        scale = float(table[0, 0, 0]) if simple else 1.0
        coupling = None if simple else table.permute(2, 1, 0).reshape(2 * l3 + 1, -1).to(device, dtype)
        out.append(Path(instruction.i_in1, l1, l2, l3, instruction.i_out, coupling, scale))
    return tuple(out)


def _couplings(product: Any, t: int, sampled: SampledWeights) -> list[Coupling]:
    out = []
    contractions = product.symmetric_contractions
    _need(hasattr(contractions, "contractions"), "a symmetric contraction of another library")
    for i, contraction in enumerate(contractions.contractions):
        _need(int(contraction.correlation) <= 3, f"correlation {contraction.correlation}")
        names, tensors = [], []
        for nu in range(1, int(contraction.correlation) + 1):
            entry = "weights_max" if nu == contraction.correlation else f"weights.{contraction.correlation - 1 - nu}"
            name = f"products.{t}.symmetric_contractions.contractions.{i}.{entry}"
            if name not in sampled.index:
                _need(not bool(sampled.full[name].any()), f"{name}: fixed weights that are not zero")
                continue
            u = contraction.U_tensors(nu).detach().double().cpu().numpy()
            tensors.append(u if u.ndim == nu + 2 else u[None])
            names.append(name)
        _need(bool(names), "a product with an output that symmetry forbids")
        out.append(Coupling(tuple(names), tuple(tensors)))
    return out


def _readout(module: Any, i: int) -> Readout:
    block = module.readouts[i]
    kind = type(block).__name__
    layer = len(module.interactions) - 1 if len(module.readouts) == 1 else i
    prefix = f"readouts.{i}"
    if kind == "LinearReadoutBlock":
        (instruction,) = block.linear.instructions
        return Readout(layer, f"{prefix}.linear.weight", float(instruction.path_weight), None, 1.0, 1.0)
    _need(kind == "NonLinearReadoutBlock", f"the {kind}")
    first, second = block.linear_1.instructions, block.linear_2.instructions
    _need(len(first) == 1 and len(second) == 1, "a readout with several blocks")
    (act,) = block.non_linearity.acts
    _need(act.f is torch.nn.functional.silu, "a readout that does not use SiLU")
    return Readout(
        layer,
        f"{prefix}.linear_1.weight",
        float(first[0].path_weight),
        f"{prefix}.linear_2.weight",
        float(second[0].path_weight),
        float(act.cst),
    )
