"""Labels by workers that somebody else starts and may lose: on other nodes, in jobs of a batch system."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from concurrent.futures import Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from bnn_driver.errors import BnnError, EnvironmentProblem, OracleCrashed, WorkerLost
from bnn_driver.executors.children import START_LIMIT, Job
from bnn_driver.executors.claims import holder
from bnn_driver.executors.pool import Pool
from bnn_driver.executors.task import answer, order
from bnn_driver.oracle import read_done
from bnn_driver.records import Frames

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
GRACE = 60.0
"""Seconds beyond its time limit after which a task that has begun counts as lost with its worker."""
FILE_PATIENCE = 60.0
"""Seconds for which a shared file system may hide what another node has written."""
TELL_EVERY = 600.0
"""Seconds between messages that a label still waits for a worker."""
RETRY_PAUSE = 2.0
"""Seconds before the first retry."""


class Workers(Protocol):
    """Whatever brings `task.label_task` to a worker."""

    def submit(self, text: str, priority: int) -> Future[str]:
        """Have a worker run `label_task(text)`.  Raises: EnvironmentProblem."""

    def problem(self) -> str:
        """Why no task will ever be finished any more; empty while all is well."""

    def overdue(self, waited: float) -> str:
        """What to look at when a task has waited for a worker for so long (s); empty while that is nothing unusual."""

    def meaning(self, error: Exception) -> BnnError:
        """What the exception of a future says about the frame."""

    def close(self) -> None:
        """End all jobs and processes; what runs is lost."""


def overdue(waited: float, queue_timeout: float | None, logs: str) -> str:
    """For `Workers.overdue`.  Args: waited: s.   queue_timeout: s; None: workers of this machine, which only have to start."""
    limit = START_LIMIT if queue_timeout is None else queue_timeout
    if waited <= limit:
        return ""
    if queue_timeout is None:
        return f"no worker on this machine has taken it within {limit:g} s; see {logs} and give the same command again"
    return (
        f"no job has taken it within {limit / 86400:.3g} days (queue_timeout); look whether its jobs wait, are held or were refused "
        "(squeue, or what your scheduler has), whether workers start in those that run, and whether jobs_per_hour holds them back; "
        f"see {logs} and give the same command again"
    )


class RemoteExecutor(Pool):
    """Labels as many frames at a time as there may be workers; a timeout is final, for a job ends before twice the limit."""

    def __init__(self, job: Job, workers: Workers, places: int, work_directory: Path) -> None:
        """Args: work_directory: scratch and logs of the workers."""
        self._remote = workers
        super().__init__(
            job, [_RemotePlace(job, workers, work_directory.resolve()) for _ in range(places)], RETRY_PAUSE, patience=1.0
        )

    def shutdown(self, wait: bool = True) -> None:
        """As `Pool`; afterwards all jobs and processes are ended."""
        try:
            super().shutdown(wait)
        finally:
            self._remote.close()


class _RemotePlace:
    def __init__(self, job: Job, workers: Workers, work: Path) -> None:
        self._job, self._facts, self._workers, self._work = job, asdict(job), workers, work
        self._spool = Path(job.spool)

    def interrupt(self) -> None:
        """Nothing to do: `label` looks at `stop`, and the worker ends with its job."""

    def close(self) -> None:
        """Nothing to do: the workers belong to the executor."""

    def label(self, frame: Frames, name: str, priority: int, stop: threading.Event, limit: float) -> BnnError | None:
        attempt = uuid.uuid4().hex
        future = self._workers.submit(order(self._facts, self._work, frame, name, attempt), priority)
        if not self._wait(future, name, attempt, stop):
            return None
        try:
            failure = answer(future.result())
        except Exception as error:  # whatever ended the worker or its way back
            failure = self._workers.meaning(error)
        if failure is None:
            self._wait_for_file(name, stop)
        return failure

    def _wait(self, future: Future[str], name: str, attempt: str, stop: threading.Event) -> bool:
        """True when the future is done; False when the label is in the spool, for an answer may be lost.

        Raises: WorkerLost when the task has begun and is long overdue; EnvironmentProblem, also when no worker takes it;
            OracleCrashed after `stop`.
        """
        limit = START_LIMIT + self._job.timeout + GRACE
        submitted = told = time.monotonic()
        begun: float | None = None
        while not wait([future], POLL_SECONDS).done:
            now = time.monotonic()
            if stop.is_set():
                raise OracleCrashed("the executor was shut down")
            if read_done(self._spool, name) is not None:
                return False
            if problem := self._workers.problem():
                raise EnvironmentProblem(problem)
            if begun is None and holder(self._spool, name).get("attempt") == attempt:
                begun = now  # by our clock, whatever that of the node says
            if begun is not None and now - begun > limit:
                raise WorkerLost(
                    f"nothing was heard of a worker for {limit:g} s after it began, which is longer than a label may take"
                )
            if begun is None and (overdue := self._workers.overdue(now - submitted)):
                raise EnvironmentProblem(f"frame {name} still waits for its label: {overdue}")
            if begun is None and now - told > TELL_EVERY:
                told = now
                log.warning("frame %s has been waiting for a worker for %.0f min", name, (now - submitted) / 60)
        return True

    def _wait_for_file(self, name: str, stop: threading.Event) -> None:
        end = time.monotonic() + FILE_PATIENCE
        while read_done(self._spool, name) is None and time.monotonic() < end and not stop.wait(POLL_SECONDS):
            # opening a folder makes a network file system look at it again
            with contextlib.suppress(FileNotFoundError):
                os.listdir(self._spool / "done")
