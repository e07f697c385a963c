"""The step: predict, decide, label where it must be, learn, reply."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bnn_driver import units
from bnn_driver.active.criteria import Calibration
from bnn_driver.active.policy import Policy
from bnn_driver.active.sanity import check_sanity
from bnn_driver.bayes.calibration import Coverage
from bnn_driver.ipi.client import Reply, Request
from bnn_driver.loops.chain_update import energy_offset
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.seeds import generator
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
class StepCounter:
    """Turns frames seen into i-PI's steps: the protocol never sends the step number."""

    n_beads: int
    first_step: int

    def moment(self, frames_seen: int) -> tuple[int, int]:
        """Step and bead of the frame number `frames_seen` (from 0); the first step of a start is evaluated at rest."""
        return self.first_step + frames_seen // self.n_beads, frames_seen % self.n_beads


@dataclass(frozen=True)
class DriverSettings:
    """What the step depends on beside its parts."""

    numbers: np.ndarray
    periodic: bool
    charge: int
    multiplicity: int
    batched: bool
    """True when i-PI sends several beads in one message."""
    min_distance: float
    max_force: float
    max_lag: int
    stride: int
    extras: str
    seed: int


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
        self.frames_seen = 0
        self.calibrations = dict(calibrations)
        self.coverage = {criterion.name: Coverage() for criterion in policy.criteria}
        for item in labelling.store.all():
            self.calibrations = policy.observe(self.calibrations, item, self.offset)
            if item.context["audit"]:
                self._observe_audit(item)
        self._replied = time.monotonic()

    @property
    def step(self) -> int:
        """i-PI's step of the last frame seen."""
        return self.counter.moment(max(self.frames_seen - 1, 0))[0]

    def respond(self, request: Request) -> Reply:
        """Energy, forces, virial and extras of every frame of the request."""
        arrived = time.monotonic()
        self.clock.ipi += arrived - self._replied
        frames = self._frames(request)
        check_sanity(frames, self.settings.min_distance)
        self._take_audits()
        self._swap(self.chains.newest())
        if self.ensemble.generation == 0 and len(self.labelling.store) > 0:
            self._wait_for_chains(0)
        prediction = self._predict(frames)
        decisions = self._decide(prediction, frames)
        labelled = self._label(frames, prediction, decisions)
        reply = self._reply(prediction, decisions, labelled, frames)
        self._tell(decisions)
        self.frames_seen += self._frames_of(request)
        self._replied = time.monotonic()
        return reply

    # ------------------------------------------------------------------ the parts of a step
    def _frames(self, request: Request) -> Frames:
        s = self.settings
        return Frames(s.numbers, request.positions, request.cell if s.periodic else None, s.charge, s.multiplicity)

    def _frames_of(self, request: Request) -> int:
        """Frames that the request stands for: at the start all beads of a batch may be one structure."""
        count = len(request.positions)
        return self.counter.n_beads if count == 1 and self.settings.batched else count

    def _predict(self, frames: Frames) -> Prediction:
        begin = time.monotonic()
        prediction: Prediction = self.ensemble.predict(frames)
        self.clock.ensemble += time.monotonic() - begin
        return prediction

    def _decide(self, prediction: Prediction, frames: Frames) -> list[Decision]:
        check_sanity(frames, self.settings.min_distance, self.settings.max_force, prediction.mean_forces)
        moments = [self.counter.moment(self.frames_seen + b) for b in range(len(frames))]
        audit = np.array([generator(self.settings.seed, "audit", step, bead).random() for step, bead in moments])
        first = len(self.labelling.store) == 0
        return self.policy.judge(prediction, frames, self.calibrations, audit, first)

    def _label(self, frames: Frames, prediction: Prediction, decisions: Sequence[Decision]) -> dict[int, LabelledFrame]:
        """Labels of the asked frames, by index; audits are queued; calibration and chains learn what came."""
        labelled: dict[int, LabelledFrame] = {}
        asked: list[int] = []
        for b, decision in enumerate(decisions):
            known = self.labelling.known(frames[b]) if decision.ask or decision.criterion == "audit" else None
            if known is not None:
                if decision.ask:
                    labelled[b] = known
            elif decision.ask:
                asked.append(b)
            elif decision.criterion == "audit":
                self.labelling.audit(frames[b], self._context(frames, prediction, decision, b))
            self._record(decision, b)
        if asked:
            begin = time.monotonic()
            contexts = [self._context(frames, prediction, decisions[b], b) for b in asked]
            answers = self.labelling.ask([frames[b] for b in asked], contexts)
            self.clock.oracle += time.monotonic() - begin
            labelled.update(zip(asked, answers, strict=True))
            for answer in answers:
                self._learn(answer)
            self._wait_for_chains(self.settings.max_lag)
        return labelled

    def _learn(self, answer: LabelledFrame) -> None:
        """Take the calibration pair, before the chains see the label."""
        self.events.append(
            "label",
            frame_id=answer.label.frame_id,
            step=answer.context["step"],
            criterion=answer.context["criterion"],
            seconds=answer.label.seconds,
        )
        self.calibrations = self.policy.observe(self.calibrations, answer, self.offset)

    def _take_audits(self, timeout: float = 0.0) -> None:
        for answer in self.labelling.collect(self.warn, timeout):
            broken = self._broken()
            self._observe_audit(answer)
            self._learn(answer)
            for name in self._broken() - broken:
                counted = self.coverage[name]
                self.warn(
                    f"the promise on the {name} is broken: {counted.exceeded} of {counted.audits} audited frames were beyond the accuracy; "
                    "the audits enter the calibration, so more frames are asked from here on"
                )

    def _observe_audit(self, answer: LabelledFrame) -> None:
        for name, exceeded in self.policy.exceeded(answer, self.offset).items():
            self.coverage[name] = self.coverage[name].observe(exceeded)

    def _broken(self) -> set[str]:
        """Criteria whose promise the audits refute."""
        confidence = self.policy.confidence
        return {name for name, counted in self.coverage.items() if counted.is_broken(1 - confidence, confidence)}

    def _wait_for_chains(self, allowed_lag: int) -> None:
        begin = time.monotonic()
        asked = {item.label.frame_id for item in self.labelling.store.all() if not item.context["audit"]}
        self.on_step(self.step, f"the chains learn label {len(self.labelling.store)}")
        self.chains.wait_until_learnt(asked, allowed_lag)
        self._swap(self.chains.newest())
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

    def _reply(
        self, prediction: Prediction, decisions: Sequence[Decision], labelled: dict[int, LabelledFrame], frames: Frames
    ) -> Reply:
        energy, forces, virial = prediction.mean_energy.copy(), prediction.mean_forces.copy(), prediction.mean_virial.copy()
        for b, answer in labelled.items():
            energy[b] = answer.label.energy + self.offset
            forces[b] = answer.label.forces
            virial[b] = _label_virial(answer, frames[b], prediction.mean_virial[b])
        extras = [
            json.dumps(self._extras(prediction, decision, b, energy[b], forces[b], virial[b], b in labelled))
            for b, decision in enumerate(decisions)
        ]
        return Reply(energy, forces, virial, extras)

    def _extras(
        self, prediction: Prediction, decision: Decision, b: int, energy: float, forces: Any, virial: Any, from_oracle: bool
    ) -> dict[str, Any]:
        """Atomic units, as i-PI expects of extras; members are shifted so that their plain mean is what is served."""
        extras: dict[str, Any] = {
            "bnn_energy_sd": decision.energy_predictive_sd / units.HARTREE,
            "bnn_probability": decision.probability,
            "bnn_generation": prediction.generation,
            "bnn_source": int(from_oracle),
        }
        if self.settings.extras in ("energy", "forces"):
            members = prediction.energy[:, b] - prediction.energy[:, b].mean() + energy
            extras["committee_pot"] = (members / units.HARTREE).tolist()
        if self.settings.extras == "forces":
            f = prediction.forces[:, b] - prediction.mean_forces[b] + forces
            w = prediction.virial[:, b] - prediction.mean_virial[b] + virial
            extras["committee_force"] = (f.reshape(len(f), -1) / units.HARTREE_PER_BOHR).tolist()
            extras["committee_virial"] = (w.reshape(len(w), 9) / units.HARTREE).tolist()
        return extras

    def _context(self, frames: Frames, prediction: Prediction, decision: Decision, b: int) -> dict[str, Any]:
        """What was believed before the label came: everything that calibration and report need."""
        foundation = self.foundation.predict(frames[b])
        step, bead = self.counter.moment(self.frames_seen + b)
        return {
            "step": step,
            "bead": bead,
            "criterion": decision.criterion,
            "audit": not decision.ask,
            "generation": prediction.generation,
            "probability": decision.probability,
            "predicted_energy": float(prediction.mean_energy[b]),
            "energy_predictive_sd": decision.energy_predictive_sd,
            "foundation_energy": float(foundation.mean_energy[0]),
            "predicted_forces": prediction.mean_forces[b],
            "force_predictive_sd": prediction.force_predictive_sd[b],
            "foundation_forces": foundation.mean_forces[0],
        }

    def _record(self, decision: Decision, b: int) -> None:
        step, bead = self.counter.moment(self.frames_seen + b)
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
            generation=self.ensemble.generation,
        )

    def _tell(self, decisions: Sequence[Decision]) -> None:
        worst = max(decisions, key=lambda d: d.probability)
        if self.frames_seen % 200 < len(decisions):
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
        self._take_audits(audit_timeout)
        self.events.append("clock", steps=self.step, **self.clock.facts())


def _label_virial(answer: LabelledFrame, frame: Frames, predicted: np.ndarray) -> np.ndarray:
    """(3, 3) eV of a label; `predicted` stands in when a periodic oracle gives no stress.

    For a molecule it is Σ f⊗r, exact because the forces add up to zero.
    """
    if frame.cell is None:
        return answer.label.forces.T @ frame.positions[0]
    if answer.label.stress is None:
        return predicted
    return units.virial_from_stress(answer.label.stress, frame.cell[0])
