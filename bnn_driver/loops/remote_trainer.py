"""The trainer as a long task of Parsl, on a worker that sees one accelerator; the other drivers of a run stand by."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bnn_driver.errors import BnnError, EnvironmentProblem, LockedError
from bnn_driver.executors.remote import TELL_EVERY, Workers
from bnn_driver.loops.trainer_task import TrainerOrder, order_text
from bnn_driver.store.run import RunDirectory, read_json

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks for the mark of the task, or for the lock of the drivers; both may lie on a network file system."""
MARK = "trainer.began"
"""In the run directory: which attempt has begun, and where."""


class Deployed(Workers, Protocol):
    """A running Parsl whose workers run `trainer_task.run_trainer`."""

    @property
    def lifetime(self) -> float | None:
        """s for which a pool of workers takes tasks; None: for ever."""


@dataclass
class OnParsl:
    """Runs the trainer on Parsl's worker, for all walkers; a `trainer.Place`.

    Its driver holds LOCK.chains.  The drivers of other walkers have no job of their own, and take over when the lock is free.
    """

    run: RunDirectory
    threads: int
    deploy: Callable[[], Deployed]
    """Starts Parsl."""
    _owned: ExitStack | None = field(default=None, init=False)
    _deployed: Deployed | None = field(default=None, init=False)
    _task: Future[str] | None = field(default=None, init=False)
    _attempt: str = field(default="", init=False)
    _looked: float = field(default=float("-inf"), init=False)
    _waits: bool = field(default=True, init=False)
    _submitted: float = field(default=0.0, init=False)
    _told: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Submit the trainer, or stand by.  Raises: EnvironmentProblem, ConfigError, see `execution.make_trainer_place`."""
        if self._task is not None and not self._task.done():
            self.stop()  # it hangs: it ends with its job alone
        self._submit()

    def _submit(self) -> None:
        if not self._own():
            return
        if self._deployed is None:
            self._deployed = self.deploy()
        self._attempt, self._waits = uuid.uuid4().hex, True
        self._mark.unlink(missing_ok=True)
        order = TrainerOrder(
            str(self.run.path),
            str(self.run.log_dir / "trainer.log"),
            str(self._mark),
            self._attempt,
            self.threads,
            self._deployed.lifetime,
        )
        self._task = self._deployed.submit(order_text(order), 0)
        self._submitted = self._told = self._looked = time.monotonic()

    def _own(self) -> bool:
        if self._owned is None:
            owned = ExitStack()
            try:
                owned.enter_context(self.run.lock("chains"))
            except LockedError:
                return False
            self._owned = owned
        return True

    def ended(self) -> str:
        """How the task ended; empty while it runs, waits for its job, or is another driver's.  Raises: EnvironmentProblem."""
        self._look()
        if self._task is None or self._deployed is None:
            return ""
        if self._task.done():
            return self._how(self._deployed, self._task)
        if problem := self._deployed.problem():
            raise EnvironmentProblem(f"the trainer cannot go on: {problem}")
        if self._waits and (overdue := self._deployed.overdue(time.monotonic() - self._submitted)):
            raise EnvironmentProblem(f"the trainer still waits for a worker: {overdue}")
        return ""

    def waits(self) -> bool:
        """Whether it has not begun yet, for jobs of others run before its own."""
        return self._waits

    @staticmethod
    def _how(deployed: Deployed, task: Future[str]) -> str:
        try:
            return task.result()
        except Exception as error:  # whatever ended the worker or its way back
            failure = deployed.meaning(error)
            if isinstance(failure, EnvironmentProblem):
                raise failure from error
            return f"was lost: {failure}"

    def stop(self) -> None:
        """End the task with its job and Parsl."""
        deployed, owned = self._deployed, self._owned
        self._deployed = self._task = self._owned = None
        if deployed is not None:
            deployed.close()
        if owned is not None:
            owned.close()

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if self._task is None:
            self._submit()  # the driver that had it may be gone
        begun = self._begun()
        self._waits = not begun if self._task is None else begun != self._attempt
        if self._waits and self._task is not None and now - self._told > TELL_EVERY:
            self._told = now
            log.warning("the trainer has been waiting for a worker for %.0f min", (now - self._submitted) / 60)

    def _begun(self) -> str:
        """The attempt that has begun last; empty if none has."""
        try:
            os.listdir(self.run.path)  # opening a folder makes a network file system look at it again
            return str(read_json(self._mark)["attempt"])
        except (OSError, ValueError, KeyError, BnnError):
            return ""

    @property
    def _mark(self) -> Path:
        return self.run.path / MARK
