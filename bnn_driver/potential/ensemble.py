"""The evaluator: M members on B frames at a time, neighbour lists kept while they are valid."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnn_driver.errors import ModelError
from bnn_driver.potential.contract import Evaluation, Potential
from bnn_driver.potential.graph import Graph, build_graph
from bnn_driver.potential.planning import Plan, plan
from bnn_driver.potential.transfer import to_host
from bnn_driver.records import Array, Frames, Prediction

logger = logging.getLogger(__name__)

NOISE_PREFIX = "noise."
DISTANCE_PREFIX = "distance."
GPU_SKIN = 0.5
"""Å."""
_QUANTITIES = "energy", "forces", "virial", "energy_noise_sd", "force_noise_sd"
"""Of a `Prediction`, in the order in which they are computed."""
Noise = Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]
Distance = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Weights of some members, ready for evaluation."""

    network: Mapping[str, Tensor]
    head: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Listed:
    """Where the neighbour list was built, and the list."""

    frames: Frames
    graph: Graph


class Ensemble:
    """M members of one potential; `swap` replaces all of them between two predictions."""

    def __init__(
        self,
        potential: Potential,
        weights: Mapping[str, Tensor | Array],
        generation: int,
        noise: Noise | None,
        member_chunk: int | None = None,
        skin: float | None = None,
        distance: Distance | None = None,
    ) -> None:
        """Args: weights: name -> (M, ...), with the weights of the noise head under "noise.".
        noise: (features (M, B, A, F), noise weights) -> energy sd (M, B) eV and force sd (M, B, A) eV/Å; None: 0.
        member_chunk: members evaluated together; None: as `planning.plan` finds.
        skin: Å beyond the cutoff; a list serves until an atom has moved by half of it.  0: a list per call.  None: 0.5 on a GPU,
            0 on a CPU, where a new list costs less than the edges that a skin adds.
        distance: (derivatives of energies by the last layer's weights (B, D), what stands under "distance.") -> sd (B,) eV.
        """
        if (member_chunk is not None and member_chunk < 1) or (skin is not None and skin < 0):
            raise ModelError(f"member_chunk must be at least 1 and skin at least 0, but got {member_chunk} and {skin}")
        self.potential = potential
        self.noise = noise
        self.distance = distance
        self.skin = (GPU_SKIN if potential.device.type == "cuda" else 0.0) if skin is None else skin
        self.member_chunk = member_chunk
        self._listed: _Listed | None = None
        self._plans: dict[tuple[int, ...], Plan] = {}
        self.swap(weights, generation)

    def swap(self, weights: Mapping[str, Tensor | Array], generation: int) -> None:
        """Take other weights for all members.

        Weights under "distance." are the posterior of the last layer (`bayes.laplace`): with them the foundation model is evaluated as one
        more member, and what its features say of the distance to the labels is added to the noise of the energies.

        Raises: ModelError when a name is missing or unknown, or a shape is wrong.
        """
        self._distance = _distance(weights, self.potential.device) if self.distance is not None else {}
        tensors = {name: self._tensor(x) for name, x in weights.items() if not name.startswith(DISTANCE_PREFIX)}
        self._network = {name: x for name, x in tensors.items() if not name.startswith(NOISE_PREFIX)}
        self._head = {name: x for name, x in tensors.items() if name.startswith(NOISE_PREFIX)}
        self.members = _check(self._network, self.potential.weights, generation)
        if self._distance:
            self._network = {name: torch.cat([x, self.potential.weights[name][None].to(x)]) for name, x in self._network.items()}
            self._head = {name: torch.cat([x, torch.zeros_like(x[:1])]) for name, x in self._head.items()}
        self._evaluated = self.members + (1 if self._distance else 0)
        self._prepared: dict[int, list[_Chunk]] = {}
        self.generation = generation
        logger.info("generation %d: %d members", generation, self.members)

    def predict(self, frames: Frames) -> Prediction:
        """What every member says about every frame.

        Raises: ModelError when the frames have an element that the potential does not know.
        """
        graph = self._graph(frames)
        split = self._plan(graph)
        graphs = [graph]
        if split.frames < len(frames):
            every = torch.arange(len(frames), device=self.potential.device)
            graphs = [graph.take(rows) for rows in every.split(split.frames)]
        distances: list[Tensor] = []
        found = [quantity for some in graphs for quantity in self._quantities(some, split.members, distances)]
        host = to_host(found + distances)  # the only wait for a GPU
        each = len(_QUANTITIES)
        joined = {name: _joined(host[i : len(found) : each], len(graphs)) for i, name in enumerate(_QUANTITIES)}
        if distances:
            joined["energy_noise_sd"] = np.hypot(joined["energy_noise_sd"], np.concatenate(host[len(found) :]))
        return Prediction(**joined, generation=self.generation)

    def together(self, frames: Frames) -> int:
        """Members that are evaluated at a time on these frames."""
        return min(self._evaluated, self._plan(self._graph(frames)).members)

    def _quantities(self, graph: Graph, members: int, distances: list[Tensor]) -> Iterator[Tensor]:
        """`_QUANTITIES` of some frames, members chunk by chunk; the sd that the distance to the labels brings is appended."""
        first = 0
        for chunk in self._chunks(members):
            evaluation = self.potential.evaluate(chunk.network, graph)
            quantities = evaluation.energy, evaluation.forces, evaluation.virial, *self._noise_sd(evaluation, chunk.head)
            last = self.members - first
            yield from (x[:last] for x in quantities)
            if last < len(evaluation.energy) and self.distance is not None:
                distances.append(self.distance(self.potential.energy_slopes(evaluation.features[last]), self._distance))
            first += len(evaluation.energy)

    def _chunks(self, size: int) -> list[_Chunk]:
        """All members in groups, with what follows from their weights; kept until the next swap."""
        if size not in self._prepared:
            chunks = []
            for first in range(0, self._evaluated, size):
                rows = slice(first, first + size)
                with torch.no_grad():
                    prepared = self.potential.prepare({name: x[rows] for name, x in self._network.items()})
                chunks.append(_Chunk(prepared, {name: x[rows] for name, x in self._head.items()}))
            self._prepared[size] = chunks
        return self._prepared[size]

    def _plan(self, graph: Graph) -> Plan:
        """How the members and these frames are split; said when it is new."""
        shape = (self._evaluated, *graph.source.shape)
        if shape not in self._plans:
            per_frame = graph.source[0].numel() * self.potential.edge_width * self.potential.dtype.itemsize
            found = plan(self._evaluated, graph.lead[0], per_frame, self.potential.device, together=self.potential.together)
            if self.member_chunk is not None:
                found = Plan(self.member_chunk, found.frames)
            if found not in self._plans.values():
                logger.info("evaluating %d members and %d frames at a time", found.members, found.frames)
            self._plans[shape] = found
        return self._plans[shape]

    def _noise_sd(self, evaluation: Evaluation, head: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.noise is None:
            return torch.zeros_like(evaluation.energy), evaluation.forces.new_zeros(evaluation.forces.shape[:-1])
        with torch.no_grad():
            return self.noise(evaluation.features, head)

    def _tensor(self, x: Tensor | Array) -> Tensor:
        return torch.as_tensor(x).detach().to(self.potential.device, self.potential.dtype)

    def _graph(self, frames: Frames) -> Graph:
        unknown = sorted({int(z) for z in frames.numbers} - set(self.potential.elements))
        if unknown:
            raise ModelError(f"the potential knows the elements {self.potential.elements}, the frames also have {unknown}")
        if self._listed is not None and _still_valid(self._listed.frames, frames, self.skin):
            return self._listed.graph.with_positions(torch.as_tensor(frames.positions))
        cutoff = self.potential.cutoff + self.skin
        rounded = self.potential.compiler.active
        graph = build_graph(frames, cutoff, self.potential.dtype, self.potential.device, rounded=rounded)
        self._listed = _Listed(frames, graph)
        return graph


def _distance(weights: Mapping[str, Tensor | Array], device: torch.device) -> dict[str, Tensor]:
    """What stands under "distance.", without the prefix."""
    return {
        k.removeprefix(DISTANCE_PREFIX): torch.as_tensor(x).to(device)
        for k, x in weights.items()
        if k.startswith(DISTANCE_PREFIX)
    }


def _still_valid(listed: Frames, frames: Frames, skin: float) -> bool:
    """True when no atom has moved by half the skin since the list was made, so that no neighbour is missed."""
    same = listed.positions.shape == frames.positions.shape and np.array_equal(listed.numbers, frames.numbers)
    if not same or not _same_cell(listed.cell, frames.cell):
        return False
    moved = ((frames.positions - listed.positions) ** 2).sum(axis=-1)
    return bool(moved.max(initial=0.0) < (0.5 * skin) ** 2)


def _same_cell(a: Array | None, b: Array | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)


def _check(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], generation: int) -> int:
    """Number of members, after names and shapes were compared with θ_0."""
    odd = sorted(set(weights) ^ set(expected))
    if odd:
        raise ModelError(
            f"the weights of generation {generation} do not fit the potential: {len(odd)} names differ, such as {odd[:3]}. "
            "They were made with another model, other elements or another head."
        )
    members = len(next(iter(weights.values())))
    for name, x in weights.items():
        if tuple(x.shape) != (members, *expected[name].shape):
            raise ModelError(
                f"weight {name} of generation {generation} has shape {tuple(x.shape)}, "
                f"expected ({members}, {', '.join(str(n) for n in expected[name].shape)})"
            )
    return members


def _joined(parts: Sequence[Array], frames: int) -> Array:
    """(M, B, ...) from the parts of one quantity.  Args: parts: by groups of frames, then by chunks of members.   frames: groups."""
    each = len(parts) // frames
    rows = [np.concatenate(parts[i * each : (i + 1) * each]) for i in range(frames)]
    return rows[0] if frames == 1 else np.concatenate(rows, axis=1)
