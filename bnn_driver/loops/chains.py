"""A committee of posterior chains: one generation of weights per round, each learnt from all labels up to then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bnn_driver.config import Config
from bnn_driver.errors import DivergedError
from bnn_driver.loops.assembly import Model, foundation_generation, make_distances, make_ensemble, make_learner
from bnn_driver.loops.chain_update import update
from bnn_driver.loops.mixture import training_loss
from bnn_driver.potential.contract import Potential
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.graph import build_graph
from bnn_driver.potential.params import repeat_weights
from bnn_driver.records import Array, Frames, Generation, LabelledFrame, Prediction
from bnn_driver.store import weights

log = logging.getLogger(__name__)

#: (kind, **facts): writes an event
Note = Callable[..., None]
BASELINE = "baseline"
"""Folder of what is drawn by lot for comparison, and the first word of its events."""


def of_baseline(note: Note, number: int) -> Note:
    """Events of a baseline, told from those of the run by their kind."""

    def write(kind: str, **facts: Any) -> None:
        note(f"{BASELINE} {kind}", baseline=number, **facts)

    return write


@dataclass
class Chains:
    """Samples around a foundation potential, moved on from round to round."""

    model: Model
    config: Config
    folder: Path
    """Of the generations."""
    note: Note
    _ensemble: Ensemble | None = field(default=None, init=False)
    _generation: int = field(default=-1, init=False)

    def learn(self, rounds: Sequence[Sequence[LabelledFrame]]) -> None:
        """Make sure that the generation of these rounds is there, and use it; what a killed process had finished is not repeated.

        Args: rounds: the labels of every round so far; generation n has learnt the first n of them.
        Raises: DivergedError when an update diverged at every attempt.
        """
        generation = weights.settle(self.folder)
        if generation is None:
            generation = foundation_generation(self.model, self.config.ensemble.members)
            weights.publish(self.folder, generation)
        if generation.number > len(rounds):
            generation = weights.load(self.folder, len(rounds))
        for number in range(generation.number, len(rounds)):
            labels = [item for some in rounds[: number + 1] for item in some]
            generation = self._next(generation, labels)
            weights.publish(self.folder, generation)
            weights.prune(self.folder, self.config.output.keep_generations)
        self._use(generation)

    def newest(self) -> int:
        """Number of the last generation that was learnt, by this process or one before; 0 without any."""
        return weights.latest(self.folder) or 0

    def predict(self, frames: Frames) -> Prediction:
        """What the members of the generation in use say."""
        if self._ensemble is None:
            raise RuntimeError("no generation is in use: learn first")
        return self._ensemble.predict(frames)

    def describe(self, frames: Frames) -> Array:
        """Descriptors of frames in the foundation potential.  Returns: (B, D), see `described`."""
        return described(self.model.potential, frames)

    def foundation_energy(self, frames: Frames) -> Array:
        """(B,) eV, of the untouched foundation potential."""
        graph = build_graph(frames, self.model.potential.cutoff, self.model.potential.dtype, self.model.potential.device)
        found = self.model.potential.evaluate(repeat_weights(self.model.potential.weights, 1), graph)
        return found.energy[0].cpu().numpy()

    def _use(self, generation: Generation) -> None:
        if self._ensemble is None:
            self._ensemble = make_ensemble(self.model, generation, self.config)
        elif generation.number != self._generation:
            self._ensemble.swap(generation.weights, generation.number)
        self._generation = generation.number

    def _next(self, previous: Generation, labels: list[LabelledFrame]) -> Generation:
        """One update of the chains.  Raises: DivergedError."""
        model, ensemble = self.model, self.config.ensemble
        learner = make_learner(model.potential, model.noise, ensemble, self.config.run.seed)
        reason = ""
        for attempt in range(self.config.trainer.update_retries + 1):
            begin = time.monotonic()
            generation, report = update(learner, previous, labels, attempt, loss_of=training_loss)
            facts: dict[str, Any] = asdict(report) if report.finite else {"steps": report.steps, "reason": report.reason}
            seconds = time.monotonic() - begin
            self.note("update", generation=generation.number, labels=len(labels), seconds=seconds, attempt=attempt, **facts)
            if not report.diverged:
                distances = make_distances(model.potential, model.noise, ensemble)
                return generation if distances is None else distances.added(generation, labels)
            reason = report.reason
            log.warning("update %d diverged and is discarded: %s", generation.number, reason)
        raise DivergedError(
            f"update {previous.number + 1} of the chains diverged at every attempt ({reason}); lower [ensemble] step_size and run the "
            "same command again"
        )


def described(potential: Potential, frames: Frames) -> Array:
    """Mean over the atoms of each element of the potential's invariant features, one element after the other.

    Free of the order of the atoms and of how a structure lies; an element that a frame lacks has zeros.

    Returns: (B, elements of the potential · F).
    """
    graph = build_graph(frames, potential.cutoff, potential.dtype, potential.device)
    with torch.no_grad():
        features = potential.evaluate(repeat_weights(potential.weights, 1), graph).features[0].double()
    parts = []
    for z in potential.elements:
        own = torch.as_tensor(frames.numbers == z, device=features.device)
        total = (features * own[:, None]).sum(dim=1)
        parts.append(total / max(1, int(own.sum())))
    return torch.cat(parts, dim=1).cpu().numpy()
