"""Which numbers of a MACE model are sampled: the weights of the elements and of the head in use, in MACE's own names.

Weights of absent elements and of other heads never enter an energy: they keep their foundation values and come back
unchanged in an exported model.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from bnn_driver.errors import ModelError

_FIXED = {
    "atomic_energies_fn.": "energies of the free atoms",
    "scale_shift.": "scale and shift of the interaction energy",
    "radial_embedding.": "frequencies of the radial basis",
    "pair_repulsion_fn.": "screened nuclear repulsion",
}


class SampledWeights:
    """θ_0 of a MACE module restricted to some elements and one head, and the way back to full parameters."""

    def __init__(self, module: Any, elements: tuple[int, ...], head: int, dtype: torch.dtype, device: torch.device) -> None:
        """Args: elements: ascending atomic numbers in use.   head: index of the head in use."""
        known = [int(z) for z in module.atomic_numbers]
        missing = [z for z in elements if z not in known]
        if missing:
            raise ModelError(f"the model knows the elements {known}, but the system also has {missing}: use another model")
        self.element_index = torch.tensor([known.index(z) for z in elements], device=device)
        self.full = {name: p.detach().to(device, dtype).clone() for name, p in module.named_parameters()}
        self.index: dict[str, Tensor | None] = {}
        never = {}
        for name, p in module.named_parameters():
            reason = _why_fixed(module, name)
            if reason is None:
                self.index[name] = self._kept(module, name, p, len(known), head)
            else:
                never[name] = reason
        buffers = ("atomic_energies_fn: energies of the free atoms", "scale_shift: scale and shift", "U_matrix_*: coupling")
        self.never_sampled = (*buffers, *(f"{name}: {reason}" for name, reason in never.items()))

    def only(self, names: Collection[str], why: str) -> SampledWeights:
        """Some of these weights; the others keep their foundation values.  Args: why: what the choice is called."""
        chosen = copy.copy(self)
        chosen.index = {name: index for name, index in self.index.items() if name in names}
        fixed = sorted({".".join(name.split(".")[:2]) for name in self.index if name not in names})
        chosen.never_sampled = (*self.never_sampled, *(f"{room}.*: sampled = {why}" for room in fixed))
        return chosen

    def theta(self) -> dict[str, Tensor]:
        """θ_0 without member axis."""
        return {name: self.pruned(name, self.full[name]) for name in self.index}

    def pruned(self, name: str, full: Tensor) -> Tensor:
        """The sampled part of one full parameter: itself, or a vector (n,) of the entries in use."""
        index = self.index[name]
        return full.clone() if index is None else full.reshape(-1).index_select(0, index)

    def expanded(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sampled weights of one member -> full parameters by MACE's names; differentiable."""
        out = dict(self.full)
        for name, index in self.index.items():
            x, full = weights[name], self.full[name]
            if index is None:
                out[name] = x
            else:
                out[name] = full.reshape(-1).index_copy(0, index, x.to(full)).view(full.shape)
        return out

    def _kept(self, module: Any, name: str, p: Tensor, n_known: int, head: int) -> Tensor | None:
        """Flat positions of the entries in use, or None when all are."""
        everything = torch.arange(p.numel(), device=self.element_index.device)
        owner = module.get_submodule(name.rsplit(".", 1)[0])
        if name == "node_embedding.linear.weight":
            kept = everything.view(n_known, -1)[self.element_index]
        elif name.endswith("skip_tp.weight") and hasattr(owner, "irreps_in2") and owner.irreps_in2.dim == n_known:
            kept = torch.cat(self._skip_parts(owner, everything))
        elif ".symmetric_contractions." in name and p.dim() == 3 and p.shape[0] == n_known:
            kept = everything.view(p.shape)[self.element_index]
        elif name.startswith("readouts."):
            kept = _of_head(module, name, everything, head)
        else:
            return None
        return None if kept.numel() == p.numel() else kept.reshape(-1)

    def _skip_parts(self, product: Any, everything: Tensor) -> list[Tensor]:
        """Blocks (mul_in, element, mul_out) of the tensor product with the element."""
        parts, offset = [], 0
        for instruction in product.instructions:
            a, b, c = instruction.path_shape
            block = everything[offset : offset + a * b * c].view(a, b, c)
            parts.append(block[:, self.element_index].reshape(-1))
            offset += a * b * c
        return parts


def _why_fixed(module: Any, name: str) -> str | None:
    """Reason why a parameter is not sampled, or None."""
    for prefix, reason in _FIXED.items():
        if name.startswith(prefix):
            return reason
    if ".symmetric_contractions." in name:
        place, entry = name.split(".weights", 1)
        flag = "weights_max_zeroed" if entry == "_max" else f"weights_{entry.lstrip('.')}_zeroed"
        if bool(getattr(module.get_submodule(place), flag, False)):
            return "path that symmetry forbids"
    return None


def _of_head(module: Any, name: str, everything: Tensor, head: int) -> Tensor:
    """Entries of a readout that act on one head (the columns of other heads are masked in MACE)."""
    heads = len(getattr(module, "heads", None) or ["Default"])
    if heads == 1:
        return everything
    _, number, layer, _ = name.split(".", 3)
    readout = module.readouts[int(number)]
    kind = type(readout).__name__
    if kind == "LinearReadoutBlock":
        return everything.view(-1, heads)[:, head]
    if kind != "NonLinearReadoutBlock" or int(getattr(readout, "num_heads", 1)) != heads:
        return everything
    if layer == "linear_1":
        width = readout.hidden_irreps.dim // heads
        return everything.view(-1, heads, width)[:, head]
    return everything.view(heads, -1, heads)[head, :, head]
