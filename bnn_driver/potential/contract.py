"""The contract of a potential: what the sampler and the evaluator may use.

Axes: M members, B frames, A atoms.  Units: eV, Å, eV/Å.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bnn_driver.potential.compiling import Compiler
from bnn_driver.potential.graph import Graph


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What M members say about B frames."""

    energy: Tensor
    """(M, B) eV, float64, total (with the energies of the free atoms)."""
    forces: Tensor
    """(M, B, A, 3) eV/Å."""
    virial: Tensor
    """(M, B, 3, 3) eV, W = -dU/dε = Σ f⊗r (i-PI's sign)."""
    features: Tensor
    """(M, B, A, n_features), rotation-invariant node features of the last two layers, concatenated."""


class Potential(Protocol):
    """A network whose weights are an argument; it keeps the foundation weights θ_0 but no state.

    `weights` holds θ_0 without a member axis; `evaluate` takes weights of the same names with one in front.
    `prepare` may change and add entries that depend on the weights alone, so that frames can be evaluated many times
    with the same weights; what it returns is only good for `evaluate`, never for the sampler.  `prepare_frames` is its
    counterpart: frames that are evaluated many times while the weights change, which is training.
    """

    elements: tuple[int, ...]
    """Atomic numbers that `evaluate` accepts."""
    cutoff: float
    """Å."""
    weights: dict[str, Tensor]
    """θ_0: name -> tensor without member axis, every sampled weight."""
    never_sampled: tuple[str, ...]
    """"name: reason" of every number of the model that is not sampled."""
    n_features: int
    """Width of `Evaluation.features`."""
    dtype: torch.dtype
    device: torch.device
    path: str
    """Which code evaluates it, and why."""
    edge_width: int
    """Numbers per edge and member in the largest tensor of an evaluation."""
    compiler: Compiler
    """Runs functions built on `evaluate`, compiled where that was asked for."""
    last_layer: tuple[str, ...]
    """Names of the weights that make the energy of `Evaluation.features`; empty where that cannot be had."""

    @property
    def together(self) -> int:
        """Bytes of such tensors up to which members are better evaluated together on a CPU, see `planning`."""
        ...

    def energy_slopes(self, features: Tensor) -> Tensor:
        """Derivatives of energies by the weights of the last layer at θ_0.

        Args: features: (B, A, F) of `Evaluation` at θ_0.   Returns: (B, D), in the order of `last_layer`.
        """
        ...

    def prepare(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights with what follows from them alone.  Args: weights: name -> (M, ...)."""
        ...

    def prepare_frames(self, graph: Graph) -> Graph:
        """Frames with what does not depend on the weights that move.  Args: graph: leading axes (B,)."""
        ...

    def evaluate(self, weights: Mapping[str, Tensor], graph: Graph, *, create_graph: bool = False) -> Evaluation:
        """Energies, forces, virials and features of every member for every frame.

        Args: weights: name -> (M, ...).   graph: leading axes (B,), seen by all members, or (M, B), one batch per
            member.   create_graph: keep what a second derivative needs (training on forces).
        """
        ...
