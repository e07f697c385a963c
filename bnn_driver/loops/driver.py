"""The step: predict, decide, label where it must be, learn, reply."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from bnn_driver.active.criteria import Calibration
from bnn_driver.active.policy import Policy
from bnn_driver.active.sanity import check_sanity
from bnn_driver.bayes.calibration import Coverage
from bnn_driver.ipi.client import Reply, Request
from bnn_driver.loops.answering import belief, make_reply
from bnn_driver.loops.chain_update import energy_offset
from bnn_driver.loops.counting import StepCounter
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.seeds import uniform
from bnn_driver.records import Decision, Frames, Generation, LabelledFrame, Prediction
from bnn_driver.store.run import EventLog

log = logging.getLogger(__name__)


class Chains(Protocol):
    """What the driver sees of the trainer."""

    def newest(self) -> int:
        """Number of the newest published generation."""

    def load(self, number: int) -> Generation:
        """Its weights."""

    def wait_until_learnt(self, label_ids: set[str], allowed_lag: int) -> None:
        """Return when at most `allowed_lag` of the labels are not learnt yet."""


class Predictor(Protocol):
    """What the driver sees of the ensemble."""

    def predict(self, frames: Frames) -> Prediction:
        """Members' energies, forces and virials."""


@dataclass
class Clock:
    """Where the wall time went, in seconds."""

    ensemble: float = 0.0
    oracle: float = 0.0
    chains: float = 0.0
    ipi: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def facts(self) -> dict[str, float]:
        """For the events."""
        total = time.monotonic() - self.started
        return {"total": total, "ensemble": self.ensemble, "oracle": self.oracle, "chains": self.chains, "ipi": self.ipi}


@dataclass(frozen=True)
class DriverSettings:
    """What the step depends on beside its parts."""

    numbers: np.ndarray
    periodic: bool
    charge: int
    multiplicity: int
    min_distance: float
    max_force: float
    max_lag: int
    stride: int
    extras: str
    seed: int
    accuracy: float
    """eV, the promise on the energy, kept with every label: an audit is judged by the promise under which its frame was served."""
    walker: str = ""
    """Name among the simulations that share labels and weights; empty when there is one."""
    ask_at_once: int | None = None
    """Most frames of a request that are labelled before the others are judged again; None: all."""


class Driver:
    """Answers i-PI's requests; the handler of `bnn_driver.ipi.client.Client`."""

    def __init__(
        self,
        settings: DriverSettings,
        ensemble: Any,
        foundation: Predictor,
        policy: Policy,
        calibrations: Mapping[str, Calibration],
        labelling: Labelling,
        chains: Chains,
        events: EventLog,
        counter: StepCounter,
        on_step: Callable[[int, str], None],
    ) -> None:
        self.settings = settings
        self.ensemble = ensemble
        self.foundation = foundation
        self.policy = policy
        self.labelling = labelling
        self.chains = chains
        self.events = events
        self.counter = counter
        self.on_step = on_step
        self.clock = Clock()
        self.calibrations = dict(calibrations)
        self._walker = (settings.walker,) if settings.walker else ()
        self.coverage = {criterion.name: Coverage() for criterion in policy.criteria}
        self._observed: set[str] = set()
        self._take_new_labels(told=False)
        self.before_asking: Callable[[int], None] = lambda count: None
        """Called with the number of labels about to be asked for; may raise instead."""
        self._replied = time.monotonic()

    @property
    def step(self) -> int:
        """i-PI's step of the last frame seen."""
        return self.counter.step

    def respond(self, request: Request) -> Reply:
        """Energy, forces, virial and extras of every frame of the request."""
        arrived = time.monotonic()
        self.clock.ipi += arrived - self._replied
        frames = self._frames(request)
        check_sanity(frames, self.settings.min_distance)
        self._take_audits()
        self._take_new_labels()
        if self.ensemble.generation == 0 and len(self.labelling.store) > 0:
            self._wait_for_chains(0)
        if self.counter.at_ring_start or self.ensemble.generation == 0:
            self._swap(self.chains.newest())
        prediction, decisions, labelled = self._settle(frames)
        reply = make_reply(prediction, decisions, labelled, frames, self.offset, self.settings.extras)
        self._tell(decisions)
        self.counter.advance(len(request.positions), request.rows, request.padding)
        self._replied = time.monotonic()
        return reply

    # ------------------------------------------------------------------ the parts of a step
    def _frames(self, request: Request) -> Frames:
        s = self.settings
        return Frames(s.numbers, request.positions, request.cell if s.periodic else None, s.charge, s.multiplicity)

    def _predict(self, frames: Frames) -> Prediction:
        begin = time.monotonic()
        prediction: Prediction = self.ensemble.predict(frames)
        self.clock.ensemble += time.monotonic() - begin
        return prediction

    def _decide(self, prediction: Prediction, frames: Frames) -> list[Decision]:
        moments = [self.counter.moment(b) for b in range(len(frames))]
        audit = np.array([uniform(self.settings.seed, "audit", *self._walker, step, bead) for step, bead in moments])
        first = len(self.labelling.store) == 0
        decisions = self.policy.judge(prediction, frames, self.calibrations, audit, first)
        squared = np.einsum("bac,bac->ba", prediction.mean_forces, prediction.mean_forces)
        absurd = ~(squared <= self.settings.max_force**2).all(axis=-1)  # also NaN
        return [
            replace(
                d, ask=True, criterion="force", probability=1.0, energy_predictive_sd=float(np.nan_to_num(d.energy_predictive_sd))
            )
            if is_absurd and not d.ask
            else d
            for d, is_absurd in zip(decisions, absurd, strict=True)
        ]

    def _settle(self, frames: Frames) -> tuple[Prediction, list[Decision], dict[int, LabelledFrame]]:
        """Judge the frames until each is certain or labelled.

        A second judgement comes when frames wait for a worker while new weights arrive, or when only the worst were to be labelled:
        then all frames are predicted by the new weights, and those that have become certain are not labelled.
        """
        labelled: dict[int, LabelledFrame] = {}
        first_decisions: list[Decision] | None = None
        while True:
            prediction = self._predict(frames)
            decisions = self._decide(prediction, frames)
            if first_decisions is not None:
                decisions = [first_decisions[b] if b in labelled else d for b, d in enumerate(decisions)]
                self._tell_of_dropped(first_decisions, decisions)
            first_decisions = decisions
            for b in (b for b in range(len(frames)) if b not in labelled):
                self._record(decisions[b], b, prediction.generation)
            labelled |= self._known(frames, decisions, labelled)
            asked = [b for b, d in enumerate(decisions) if d.ask and b not in labelled]
            labelled |= self._label(frames, prediction, decisions, asked)
            if all(b in labelled for b in asked):
                self._queue_audits(frames, prediction, decisions)
                return prediction, decisions, labelled
            if self.ensemble.generation == 0:  # members without a spread judge nothing
                self._wait_for_chains(0)
            self._swap(self.chains.newest())

    def _known(
        self, frames: Frames, decisions: Sequence[Decision], labelled: Mapping[int, LabelledFrame]
    ) -> dict[int, LabelledFrame]:
        """Asked frames that have a label already."""
        found = {b: self.labelling.known(frames[b]) for b, d in enumerate(decisions) if d.ask and b not in labelled}
        return {b: label for b, label in found.items() if label is not None}

    def _queue_audits(self, frames: Frames, prediction: Prediction, decisions: Sequence[Decision]) -> None:
        for b, decision in enumerate(decisions):
            if decision.criterion == "audit" and not self._was_labelled(frames[b], b):
                self.labelling.audit(frames[b], self._context(frames, prediction, decision, b), self.warn)

    def _tell_of_dropped(self, before: Sequence[Decision], after: Sequence[Decision]) -> None:
        """Frames that were to be labelled and are certain now."""
        for b, (then, now) in enumerate(zip(before, after, strict=True)):
            if then.ask and not now.ask:
                step, bead = self.counter.moment(b)
                self.events.append("dropped", step=step, bead=bead, was=then.probability, probability=now.probability)

    def _label(
        self, frames: Frames, prediction: Prediction, decisions: Sequence[Decision], asked: Sequence[int]
    ) -> dict[int, LabelledFrame]:
        """Labels of the asked frames, or of as many as may be asked at once, the most uncertain first; what came is learnt."""
        if not asked:
            return {}
        begin = time.monotonic()
        worst_first = sorted(asked, key=lambda b: (-decisions[b].probability, -decisions[b].energy_predictive_sd))
        # beads of one ring must not be served by different weights
        whole_ring = self.counter.at_ring_start
        chosen = worst_first[: self.settings.ask_at_once] if whole_ring else worst_first
        self.before_asking(len(chosen))
        contexts = [self._context(frames, prediction, decisions[b], b) for b in chosen]
        changed = partial(self._has_new_weights, prediction.generation) if whole_ring else None
        answers = self.labelling.ask([frames[b] for b in chosen], contexts, changed)
        self.clock.oracle += time.monotonic() - begin
        for answer in answers:
            if answer is not None:
                self._learn(answer)
        self._wait_for_chains(self.settings.max_lag)
        return {b: answer for b, answer in zip(chosen, answers, strict=True) if answer is not None}

    def _has_new_weights(self, generation: int) -> bool:
        return self.chains.newest() != generation

    def _was_labelled(self, frame: Frames, b: int) -> bool:
        """Whether an audit would be of a moment or of a structure that has its label: both come again when i-PI steps back."""
        return self.labelling.was_audited(*self.counter.moment(b)) or self.labelling.known(frame) is not None

    def _learn(self, answer: LabelledFrame) -> None:
        """Take the calibration pair, of what was believed before the label came."""
        if answer.label.frame_id in self._observed:
            return
        self._announce(answer)
        self._observe(answer)

    def _observe(self, item: LabelledFrame) -> None:
        self._observed.add(item.label.frame_id)
        self.calibrations = self.policy.observe(self.calibrations, item, self.offset)

    def _take_new_labels(self, told: bool = True) -> None:
        """Calibrate on labels of other walkers, or at the start on all.  Args: told: False when the events know of them."""
        if told and self.settings.walker:
            self.labelling.store.refresh()
        for item in self.labelling.store.all() if len(self.labelling.store) > len(self._observed) else ():
            if item.label.frame_id in self._observed:
                continue
            if item.context["audit"] and self._same_promise(item):
                self._observe_audit(item)
            self._observe(item)
            if told:
                self.events.append("shared", frame_id=item.label.frame_id, walker=item.context.get("walker", ""), step=self.step)

    def _announce(self, answer: LabelledFrame) -> None:
        known, label = answer.context, answer.label
        self.events.append(
            "label", frame_id=label.frame_id, step=known["step"], criterion=known["criterion"], seconds=label.seconds
        )

    def announce_missing(self, announced: set[str]) -> None:
        """Events of labels that a killed start had on disk but had not told of.  Args: announced: frame ids with an event."""
        for item in self.labelling.store.all():
            if self.labelling.is_own(item) and item.label.frame_id not in announced:
                self._announce(item)

    def begin_at(self, step: int) -> None:
        """i-PI starts, or goes back, at a step; what came beside a frame that could not be labelled is learnt now."""
        self.counter.first_step, self.counter.frames_seen = step, 0
        for item in self.labelling.store.all():
            if self.labelling.is_own(item) and not item.context["audit"]:
                self._learn(item)

    def _same_promise(self, item: LabelledFrame) -> bool:
        then = (item.context.get("accuracy"), item.context.get("confidence"))
        return then == (self.settings.accuracy, self.policy.confidence)

    def _take_audits(self, timeout: float = 0.0) -> None:
        for answer in self.labelling.collect(self.warn, timeout):
            if answer.label.frame_id not in self._observed:
                if answer.context["audit"]:
                    self._observe_audit(answer)
                self._learn(answer)

    def _observe_audit(self, answer: LabelledFrame) -> None:
        """Count an audit; said at the moment when the audits refute the promise."""
        broken = self._broken()
        for name, exceeded in self.policy.exceeded(answer, self.offset).items():
            self.coverage[name] = self.coverage[name].observe(exceeded)
        for name in self._broken() - broken:
            counted = self.coverage[name]
            self.warn(
                f"the promise on the {name} is broken: {counted.exceeded} of {counted.audits} audited frames were beyond the accuracy; "
                "the audits enter the calibration, so more frames are asked from here on"
            )

    def _broken(self) -> set[str]:
        """Criteria whose promise the audits refute."""
        confidence = self.policy.confidence
        return {name for name, counted in self.coverage.items() if counted.is_broken(1 - confidence, confidence)}

    def _wait_for_chains(self, allowed_lag: int) -> None:
        begin = time.monotonic()
        asked = {
            item.label.frame_id
            for item in self.labelling.store.all()
            if not item.context["audit"] and (self.labelling.is_own(item) or self.ensemble.generation == 0)
        }
        self.on_step(self.step, f"the chains learn label {len(self.labelling.store)}")
        self.chains.wait_until_learnt(asked, allowed_lag)
        self.clock.chains += time.monotonic() - begin

    def _swap(self, number: int) -> None:
        if number == self.ensemble.generation:
            return
        generation = self.chains.load(number)
        self.ensemble.swap(generation.weights, number)
        self.events.append("swap", generation=number, step=self.step, labels=len(generation.label_ids))

    # ------------------------------------------------------------------ what goes out
    @property
    def offset(self) -> float:
        """eV, E_foundation - E_oracle at the first label: added to every oracle energy."""
        return energy_offset(self.labelling.store.read(0))

    def _context(self, frames: Frames, prediction: Prediction, decision: Decision, b: int) -> dict[str, Any]:
        """What was believed before the label came: everything that calibration and report need."""
        foundation = self.foundation.predict(frames[b])
        step, bead = self.counter.moment(b)
        return {
            "step": step,
            "bead": bead,
            "criterion": decision.criterion,
            "audit": not decision.ask,
            "generation": prediction.generation,
            "accuracy": self.settings.accuracy,
            "confidence": self.policy.confidence,
            "probability": decision.probability,
            **belief(prediction, foundation, b),
            "energy_predictive_sd": decision.energy_predictive_sd,
        }

    def _record(self, decision: Decision, b: int, generation: int) -> None:
        step, bead = self.counter.moment(b)
        if decision.criterion == "none" and step % self.settings.stride:
            return
        self.events.append(
            "decision",
            step=step,
            bead=bead,
            criterion=decision.criterion,
            ask=decision.ask,
            probability=decision.probability,
            energy_predictive_sd=decision.energy_predictive_sd,
            generation=generation,
        )

    def _tell(self, decisions: Sequence[Decision]) -> None:
        worst = max(decisions, key=lambda d: d.probability)
        if self.counter.frames_seen % 200 < len(decisions):
            self.events.append("clock", steps=self.step, **self.clock.facts())
        facts = (
            f"sd {worst.energy_predictive_sd * 1000:.1f} meV | P(exceeded) {100 * worst.probability:.2g} % | "
            f"{len(self.labelling.store)} labels | generation {self.ensemble.generation}"
        )
        self.on_step(self.step, facts)

    def warn(self, message: str) -> None:
        """Say it and keep it."""
        log.warning("%s", message)
        self.events.append("warning", message=message, step=self.step)

    def finish(self, audit_timeout: float) -> None:
        """Take the audits still in flight, and write down where the time went."""
        begin = time.monotonic()
        self._take_audits(audit_timeout)
        self.clock.oracle += time.monotonic() - begin
        if audit_timeout > 0 and (left := self.labelling.in_flight):
            self.warn(f"{left} labels did not come back within {audit_timeout:g} s; run again to wait for them")
        self.events.append("clock", steps=self.step, **self.clock.facts())
