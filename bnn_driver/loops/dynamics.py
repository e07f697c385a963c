"""One walker in one round of an exploration: i-PI moves it with the mean of the members, frames are kept on the way."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bnn_driver.active import committee as qbc
from bnn_driver.active.criteria import Calibration
from bnn_driver.active.policy import Policy
from bnn_driver.active.sanity import check_disagreement, check_forces, check_sanity, check_whole
from bnn_driver.errors import CleanStop, GuardStop, IpiGone
from bnn_driver.explore_config import ExploreConfig
from bnn_driver.ipi.client import Client, Reply, Request
from bnn_driver.ipi.simulation import IpiInput, IpiProcess, read_input
from bnn_driver.loops.answering import make_reply
from bnn_driver.loops.assembly import STOP_SECONDS, make_client
from bnn_driver.loops.counting import StepCounter
from bnn_driver.loops.together import Halted
from bnn_driver.records import Array, Decision, Frames, Prediction
from bnn_driver.store.files import write_json
from bnn_driver.store.trajectory import TrajectoryFile

log = logging.getLogger(__name__)

INPUT = "input.xml"
TWICE = 2.0
"""A stopped walker goes back to where the disagreement was at most so many times its median on the way."""


@dataclass
class Watch:
    """Answers i-PI; keeps frames every few steps; refuses to go on outside the sanity window."""

    config: ExploreConfig
    like: Frames
    """Has the atoms, charge and multiplicity."""
    predict: Callable[[Frames], Prediction]
    policy: Policy
    calibrations: Mapping[str, Calibration]
    counter: StepCounter
    kept: TrajectoryFile
    on_step: Callable[[int, str], None]
    _last: deque[tuple[Frames, int, int, float]] = field(init=False)
    """Frames of the last step, as `TrajectoryFile.append` takes them."""

    def __post_init__(self) -> None:
        self._last = deque(maxlen=self.counter.per_step)

    def respond(self, request: Request) -> Reply:
        """Energy, forces, virial and extras of every frame of the request.

        Raises: GuardStop outside the sanity window, when the last step within it is kept too: it is nearest to where the walker was lost.
        """
        try:
            return self._answer(request)
        except GuardStop:
            for frame, step, bead, disagreement in self._last:
                with contextlib.suppress(GuardStop):
                    check_whole(frame, self.config.explore.max_gap)
                    self.kept.append(frame, step, bead, disagreement)
            raise

    def _answer(self, request: Request) -> Reply:
        like, sanity, limit = self.like, self.config.sanity, self.config.explore.max_disagreement
        cell = request.cell if like.periodic else None
        frames = Frames(like.numbers, request.positions, cell, like.charge, like.multiplicity)
        check_sanity(frames, sanity.min_distance)
        prediction = self.predict(frames)
        check_forces(prediction.mean_forces, sanity.max_force)
        disagreement = qbc.atom_disagreement(prediction.forces)
        above = limit is not None and not (disagreement <= limit).all()
        self._keep(frames, disagreement.mean(axis=-1), always=above)  # the frame that stops a walker is one worth a label
        if limit is not None:
            check_disagreement(disagreement, limit)
        decisions = self._judge(prediction, frames)
        worst = float(disagreement.mean(axis=-1).max())
        self.on_step(self.counter.moment()[0], f"disagreement {1e3 * worst:.1f} meV/Å | {len(self.kept)} frames")
        self.counter.advance(len(request.positions), request.rows, request.padding)
        return make_reply(prediction, decisions, {}, frames, 0.0, self.config.output.extras)

    def _keep(self, frames: Frames, disagreement: Array, always: bool) -> None:
        e = self.config.explore
        for b in range(len(frames)):
            step, bead = self.counter.moment(b)
            if always or step % e.stride == 0:
                check_whole(frames[b], e.max_gap)
                self.kept.append(frames[b], step, bead, float(disagreement[b]))
        for b in range(len(frames)):
            self._last.append((frames[b], *self.counter.moment(b), float(disagreement[b])))

    def _judge(self, prediction: Prediction, frames: Frames) -> list[Decision]:
        """What a run that asks on the fly would have decided, for the extras; nothing is asked here."""
        if prediction.generation == 0:
            return [Decision(False, "none", 1.0, float(sd)) for sd in prediction.energy_predictive_sd]
        return self.policy.judge(prediction, frames, self.calibrations, np.ones(len(frames)))


@dataclass
class Dynamics:
    """One walker in one round; what stands in its folder is not done again."""

    name: str
    folder: Path
    """i-PI's, with its input in it."""
    frames_file: Path
    facts_file: Path
    """Written when the walker has ended."""
    log_file: Path
    first: bool
    """It starts from the user's structure."""
    watch: Callable[[StepCounter, TrajectoryFile, Callable[[int, str], None]], Watch]
    show: Callable[[str, int, str], None] = field(default=lambda name, step, facts: None)
    """Hears of every step."""
    step: int = field(default=0, init=False)
    """Of the last frame that was answered."""
    _client: Client | None = field(default=None, init=False)
    _halted: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._simulation = IpiProcess(self.folder / INPUT, self.folder, self.log_file)
        self.input, self.reached = read_input(self.folder / INPUT), self._simulation.reached()

    def halt(self) -> None:
        """Have `run`, in another thread, end soon: i-PI is left where it can go on."""
        self._halted = True
        if self._client is not None:
            self._client.close()

    def run(self, config: ExploreConfig) -> dict[str, Any]:
        """Run i-PI to its last step, or to where the walker leaves the sanity window; returns what is written.

        Raises: GuardStop when not even the first frame is within the window; IpiGone; CleanStop when i-PI was told to stop;
            Halted after `halt`.
        """
        begin = time.monotonic()
        simulation, found = self._simulation, self.input
        kept = TrajectoryFile(self.frames_file)
        stopped = ""
        try:
            if not simulation.finished() and not self._halted:
                self._drive(config, simulation, found, kept)
        except GuardStop as error:
            stopped = str(error)
        finally:
            simulation.stop(STOP_SECONDS, STOP_SECONDS)
            kept.close()
        if not stopped and not simulation.finished():
            if self._halted:
                raise Halted(f"walker {self.name} was ended at step {simulation.reached()}")
            if simulation.stopped_on_request():
                raise CleanStop(f"i-PI was told to stop, at step {simulation.reached()}; the same command goes on")
            raise IpiGone(
                f"i-PI ended at step {simulation.reached()} of {found.total_steps}; see {self.log_file}. The same command goes on from "
                f"there. The end of its log:\n{simulation.tail(15)}"
            )
        if stopped and not len(kept) and self.first:
            raise GuardStop(f"walker {self.name}: the start structure is outside the sanity window: {stopped}")
        step = self.step if stopped else found.total_steps
        facts = {
            "walker": self.name, "frames": len(kept), "beads": found.n_beads, "step": step, "stopped": stopped,
            "seconds": time.monotonic() - begin,
        }  # fmt: skip
        write_json(self.facts_file, facts)
        return facts

    def _drive(self, config: ExploreConfig, simulation: IpiProcess, found: IpiInput, kept: TrajectoryFile) -> None:
        effective = simulation.start()
        per_step = found.n_beads * found.n_systems
        counter = StepCounter(per_step, effective.step, found.batch_size > 1)

        def on_step(step: int, text: str) -> None:
            self.step = step
            self.show(self.name, step, text)

        client = make_client(config, effective.endpoints, effective.shared_memory, self.watch(counter, kept, on_step).respond)
        self._client = client
        try:
            simulation.wait_until_listening(effective, config.ipi.connect_timeout, lambda: self._halted)
            if not self._halted:
                client.serve()
        finally:
            client.close()
        if not self._halted:  # else nobody has told i-PI to end
            simulation.wait(STOP_SECONDS)


def last_good(step: Array, disagreement: Array, stopped: bool) -> int | None:
    """The kept step from which a walker goes on in the next round; None: none is good.

    A walker that left the sanity window was lost before that was noticed: its last kept step is passed over, and so are steps at
    which the members disagreed much more than they used to on its way, or of which not all beads are kept.

    Args: step: (N,) of its frames.   disagreement: (N,) eV/Å.
    """
    steps, beads = np.unique(step, return_counts=True)
    if not stopped:
        return int(steps[-1]) if len(steps) else None
    each = np.array([disagreement[step == s].max() for s in steps])
    good = steps[:-1][(each <= TWICE * np.median(each))[:-1] & (beads == beads.max())[:-1]] if len(steps) else steps
    return int(good[-1]) if len(good) else None
