"""The process that moves the chains; it shares nothing with the driver but the run directory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from bnn_driver.errors import DivergedError, EnvironmentProblem
from bnn_driver.loops.chain_update import Learner, update
from bnn_driver.loops.distance import Distances
from bnn_driver.records import Generation, LabelledFrame
from bnn_driver.store import weights
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import EventLog, RunDirectory, write_atomic
from bnn_driver.threads import THREADS

log = logging.getLogger(__name__)

POLL_SECONDS = 0.02
PULSE_SECONDS = 1.0
FAILED = "failed.json"
"""In generations/: the labels whose update diverged, so that nobody waits for it."""


@dataclass
class Pulse:
    """A file that the trainer touches while it works; what does not move for long is taken for hung."""

    file: Path
    _touched: float = field(default=float("-inf"), init=False)

    def beat(self, *_: object) -> None:
        """Called after every step of the chains and between two looks for labels."""
        now = time.monotonic()
        if now - self._touched > PULSE_SECONDS:
            self._touched = now
            with contextlib.suppress(OSError):  # of a full disk the next label says more
                self.file.touch()


def serve_updates(
    run: RunDirectory, learner: Learner, retries: int, keep: int, audits_at_once: int | None, distances: Distances | None = None
) -> None:
    """Learn every label that appears, for ever; the parent process ends it.

    Args: audits_at_once: unlearnt audits that are worth an update of their own; None: they wait for an asked label, so that no
        update is under way when one comes.   distances: what adds the distance to the labels to every generation.
    """
    store = LabelStore(run.labels_dir)
    events = EventLog(run.events_dir)
    previous: Generation | None = None
    pulse = Pulse(pulse_file(run))
    while True:
        pulse.beat()
        store.refresh()
        if previous is None or weights.latest(run.generations_dir) != previous.number:
            previous = weights.settle(run.generations_dir)
        if previous is None:
            raise EnvironmentProblem(
                f"{run.generations_dir} holds no readable generation; remove the folder to begin from the labels"
            )
        labels = store.all()
        known = set(previous.label_ids) | failed_labels(run.generations_dir)
        new = [item for item in labels if item.label.frame_id not in known]
        if not _worth_an_update(new, audits_at_once):
            time.sleep(POLL_SECONDS)
            continue
        generation = _try_update(learner, previous, store, events, retries, pulse)
        if generation is None:
            ids = [item.label.frame_id for item in labels]
            write_atomic(run.generations_dir / FAILED, json.dumps(ids).encode())
        else:
            if distances is not None:
                generation = distances.added(generation, labels)
            weights.publish(run.generations_dir, generation)
            weights.prune(run.generations_dir, keep)


def _worth_an_update(new: list[LabelledFrame], audits_at_once: int | None) -> bool:
    """An asked label is learnt at once; audits, whose frames were predicted well, can wait."""
    return any(not item.context["audit"] for item in new) or (audits_at_once is not None and len(new) >= audits_at_once)


def _try_update(
    learner: Learner, previous: Generation, store: LabelStore, events: EventLog, retries: int, pulse: Pulse
) -> Generation | None:
    """The next generation, or None when every attempt diverged; each failure is said and recorded."""
    labels = store.all()
    for attempt in range(retries + 1):
        begin = time.monotonic()
        generation, report = update(learner, previous, labels, attempt, pulse.beat)
        seconds = time.monotonic() - begin
        facts = asdict(report) if report.finite else {"steps": report.steps, "reason": report.reason}
        events.append("update", generation=generation.number, labels=len(labels), seconds=seconds, attempt=attempt, **facts)
        if not report.diverged:
            return generation
        events.append("warning", message=f"update {generation.number} diverged and is discarded: {report.reason}")
        log.warning("update %d diverged and is discarded: %s", generation.number, report.reason)
    return None


def pulse_file(run: RunDirectory) -> Path:
    """What the one trainer of all walkers touches."""
    return run.generations_dir / "trainer.alive"


def failed_labels(folder: Path) -> set[str]:
    """Ids of the labels of the last update that diverged."""
    try:
        return set(json.loads((folder / FAILED).read_text()))
    except FileNotFoundError:  # also when another walker's trainer removes it now
        return set()


class Place(Protocol):
    """Where the trainer runs, and what is known of it there."""

    def start(self) -> None:
        """Start the trainer; one that still runs is ended.  Raises: EnvironmentProblem."""

    def ended(self) -> str:
        """How it ended, for a message; empty while it runs, or will.  Raises: EnvironmentProblem when it never will."""

    def waits(self) -> bool:
        """Whether it has yet to begin, which may take a batch system any time."""

    def stop(self) -> None:
        """End it, with whatever was started for it."""


@dataclass
class Here:
    """A child of the driver; a `Place`."""

    run: RunDirectory
    threads: int
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Start the process; its output goes to log/trainer.log."""
        self.stop()
        environment = os.environ | dict.fromkeys(THREADS, str(self.threads))
        with (self.run.log_dir / "trainer.log").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bnn_driver.loops.trainer_main", str(self.run.path)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
            )

    def ended(self) -> str:
        """As `Place`."""
        status = None if self._process is None else self._process.poll()
        return "" if status is None else f"ended with status {status}"

    def waits(self) -> bool:
        """As `Place`."""
        return False

    def stop(self) -> None:
        """As `Place`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process = None


@dataclass
class TrainerProcess:
    """The driver's view of the trainer: starts it, restarts it when it died, and waits for its generations.

    Of the trainers of several walkers one learns for all; the others wait for its lock, and the next takes over when it ends.
    """

    run: RunDirectory
    place: Place
    stall_timeout: float
    """s without a step of the chains after which it is taken for hung, killed and started again."""
    restarts: int = 3
    """How often in a row, without a generation in between, it may end or hang."""
    _started: bool = field(default=False, init=False)
    _ends: int = field(default=0, init=False)
    _ended_at: int = field(default=-1, init=False)
    """The newest generation when it ended last."""
    _pulse: tuple[int, float] = field(default=(0, 0.0), init=False)
    """When the file was touched last, by the clock of the file system, and when that was seen, by a clock that never jumps."""

    def begin(self) -> None:
        """Start the process of a new start: labels whose update diverged before are tried again, with the settings of now."""
        (self.run.generations_dir / FAILED).unlink(missing_ok=True)
        self.start()

    def start(self) -> None:
        """Start the process, for the first time or again."""
        self.place.start()
        self._started, self._pulse = True, (0, time.monotonic())

    def stop(self) -> None:
        """End the process; an update under way is repeated at the next start."""
        self._started = False
        self.place.stop()

    def newest(self) -> int:
        """Number of the newest published generation."""
        return weights.latest(self.run.generations_dir) or 0

    def load(self, number: int) -> Generation:
        """A published generation."""
        return weights.load(self.run.generations_dir, number)

    def wait_until_learnt(self, label_ids: set[str], allowed_lag: int) -> None:
        """Return when at most `allowed_lag` labels are neither learnt nor given up.

        Raises: DivergedError when no generation but the foundation model exists and its update diverged.
        """
        seen = -1
        learnt: frozenset[str] = frozenset()
        while True:
            number = self.newest()
            if number != seen:
                seen, learnt = number, weights.label_ids(self.run.generations_dir, number)
            failed = failed_labels(self.run.generations_dir)
            if len(label_ids - learnt - failed) <= allowed_lag:
                if number == 0 and label_ids and label_ids <= failed:
                    raise DivergedError(
                        f"the first update of the chains diverged; see {self.run.log_dir / 'trainer.log'} and lower [ensemble] step_size"
                    )
                return
            self._keep_alive()
            time.sleep(POLL_SECONDS)

    def _keep_alive(self) -> None:
        if not self._started:
            return
        how = self.place.ended()
        if not how and not self._hangs():
            return
        how = how or f"did nothing for {self.stall_timeout:g} s ([trainer] stall_timeout)"
        number = self.newest()
        self._ends, self._ended_at = self._ends if number == self._ended_at else 0, number
        if self._ends == self.restarts:
            self.stop()
            raise EnvironmentProblem(
                f"the trainer process {how}, after {self._ends} starts in vain; the end of its log:\n{self._log_tail()}"
            )
        log.warning("the trainer process %s; starting it again", how)
        self._ends += 1
        self.start()

    def _log_tail(self) -> str:
        file = self.run.log_dir / "trainer.log"
        return file.read_text(errors="replace")[-2000:] if file.exists() else "(there is none: another walker's driver starts it)"

    def _hangs(self) -> bool:
        """Whether it made no step for longer than allowed; only a change of the file's time counts, for clocks may jump."""
        if self.place.waits():
            self._pulse = (self._pulse[0], time.monotonic())
            return False
        try:
            touched = pulse_file(self.run).stat().st_mtime_ns
        except OSError:
            touched = 0
        if touched != self._pulse[0]:
            self._pulse = (touched, time.monotonic())
        return time.monotonic() - self._pulse[1] > self.stall_timeout
