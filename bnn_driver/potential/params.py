"""Weights of many members: stacked by name, or as one flat row per member for the sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnn_driver.errors import ModelError


def stack_weights(members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One dict per member -> one dict with a leading member axis.

    Raises: ModelError when the members do not have the same names.
    """
    names = list(members[0])
    for m, weights in enumerate(members):
        if set(weights) != set(names):
            odd = sorted(set(weights) ^ set(names))
            raise ModelError(f"member {m} and member 0 differ in the weights {odd[:5]}: all members must have one architecture")
    return {name: torch.stack([weights[name] for weights in members]) for name in names}


def unstack_weights(weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The inverse of `stack_weights`; views, not copies."""
    members = len(next(iter(weights.values())))
    return [{name: x[m] for name, x in weights.items()} for m in range(members)]


def repeat_weights(weights: Mapping[str, Tensor], members: int) -> dict[str, Tensor]:
    """θ_0 for every one of M members.  Args: weights: name -> (...).  Returns: name -> (M, ...), a copy."""
    return {name: x.detach().expand(members, *x.shape).clone() for name, x in weights.items()}


@dataclass(frozen=True)
class Block:
    """Where one named weight lies in a row of θ."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of weights."""
        size = 1
        for n in self.shape:
            size *= n
        return size


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of all weights in a row of θ (M, D)."""

    blocks: tuple[Block, ...]

    @property
    def size(self) -> int:
        """D."""
        return sum(block.size for block in self.blocks)

    def views(self, theta: Tensor) -> dict[str, Tensor]:
        """θ (M, D) -> name -> (M, ...); views of θ, so that the gradient is one concatenation."""
        if theta.shape[-1] != self.size:
            raise ModelError(f"theta has {theta.shape[-1]} weights per member, the layout has {self.size}")
        parts = theta.split([block.size for block in self.blocks], dim=-1)
        return {b.name: x.reshape(*theta.shape[:-1], *b.shape) for b, x in zip(self.blocks, parts, strict=True)}

    def flat(self, weights: Mapping[str, Tensor]) -> Tensor:
        """name -> (M, ...) to θ (M, D); other names in `weights` are left out."""
        members = len(weights[self.blocks[0].name])
        return torch.cat([weights[b.name].reshape(members, b.size) for b in self.blocks], dim=1)


def layout(weights: Mapping[str, Tensor]) -> Layout:
    """Layout of weights without member axis, in the order of the dict."""
    blocks, offset = [], 0
    for name, x in weights.items():
        blocks.append(Block(name, tuple(x.shape), offset))
        offset += x.numel()
    return Layout(tuple(blocks))


def flatten(weights: Mapping[str, Tensor]) -> tuple[Tensor, Layout]:
    """name -> (M, ...) to θ (M, D) and its layout."""
    table = layout({name: x[0] for name, x in weights.items()})
    return table.flat(weights), table
