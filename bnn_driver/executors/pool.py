"""Frames wait for a place in order of priority; every frame gets one future, whatever happens to the place that computes it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from bnn_driver.errors import BnnError, FrameBusy, OracleCrashed, OracleError, OracleInconsistent, OracleTimeout, WorkerLost
from bnn_driver.executors.children import START_LIMIT, Job
from bnn_driver.executors.claims import holder, is_claimed
from bnn_driver.executors.retries import LONGEST, Retries
from bnn_driver.oracle import read_done, write_failed
from bnn_driver.records import Frames, Label

log = logging.getLogger(__name__)


class Place(Protocol):
    """Where one frame at a time is computed; owned by one thread."""

    def label(self, frame: Frames, name: str, priority: int, stop: threading.Event, limit: float) -> BnnError | None:
        """Have the label in the spool within `limit` (s).  Returns or raises why there is none."""

    def interrupt(self) -> None:
        """End what is computed now; called from another thread after `stop` was set."""

    def close(self) -> None:
        """Free everything; called by its own thread."""


@dataclass(eq=False)
class _Task:
    frame: Frames
    name: str
    future: Future[Label]
    priority: int
    started: bool = False


class Pool:
    """Labels frames on its places; the order is priority (lower first), then submission.

    A label that lies in the spool is returned at once; frames of one content id in flight share one future; a frame that another
    process computes is waited for.  What is tried again after a failure, and how often, stands in `retries`.
    """

    def __init__(self, job: Job, places: Sequence[Place], pause: float, patience: float) -> None:
        """Args: pause, patience: see `Retries`."""
        self.fingerprint, self.spool = job.fingerprint, Path(job.spool)
        self._timeout, self._pause, self._patience, self._places = job.timeout, pause, patience, places
        self._queue: queue.PriorityQueue[tuple[float, int, _Task | None]] = queue.PriorityQueue()
        self._lock = threading.Lock()
        self._in_flight: dict[str, _Task] = {}
        self._submitted, self._closed, self._killed = 0, False, threading.Event()
        # a child dies with the thread that started it (PR_SET_PDEATHSIG), so each thread keeps its own place for life
        self._threads = [
            threading.Thread(target=self._serve, args=(place,), daemon=True, name=f"place-{n}") for n, place in enumerate(places)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def workers(self) -> int:
        """Labels at a time."""
        return len(self._places)

    def submit(self, frame: Frames, *, priority: int = 0) -> Future[Label]:
        """Label one frame.  A frame that waits already gets the more urgent of both priorities.

        Raises: OracleError after shutdown.   The future: OracleError, or EnvironmentProblem, when there is no label.
        """
        name = frame.content_id(self.fingerprint)
        with self._lock:
            if self._closed:
                raise OracleError(f"frame {name} was submitted after the executor was shut down")
            task = self._in_flight.get(name)
            if task is None or task.future.cancelled():
                known = read_done(self.spool, name)
                task = _Task(frame, name, Future(), priority)
                if known is not None:
                    task.future.set_result(known)
                    return task.future
                self._in_flight[name] = task
                self._put(task, priority)
            elif priority < task.priority:
                task.priority = priority
                self._put(task, priority)
            return task.future

    def shutdown(self, wait: bool = True) -> None:
        """Stop.  wait: finish everything that was submitted; otherwise waiting frames are cancelled and running ones killed."""
        with self._lock:
            already, self._closed = self._closed, True
            waiting = list(self._in_flight.values())
            if not already:
                for _ in self._threads:
                    self._put(None, float("inf"))
        if not wait:
            self._killed.set()
            for task in waiting:
                task.future.cancel()
            for place in self._places:
                place.interrupt()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown(wait=error is None)

    def _put(self, task: _Task | None, priority: float) -> None:
        self._submitted += 1
        self._queue.put((priority, self._submitted, task))

    def _serve(self, place: Place) -> None:
        try:
            while (task := self._queue.get()[2]) is not None:
                if self._take(task):
                    self._settle(task, place)
        finally:
            place.close()

    def _take(self, task: _Task) -> bool:
        """False when the frame was cancelled, or was taken before under its other priority."""
        with self._lock:
            if task.started:
                return False
            task.started = True
            if task.future.set_running_or_notify_cancel():
                return True
            self._forget(task)
            return False

    def _settle(self, task: _Task, place: Place) -> None:
        result: Label | BaseException
        try:
            result = self._compute(task, place)
        except BnnError as error:
            result = error
        except Exception as error:  # the border of a thread: the future must hear of it
            log.exception("labelling frame %s", task.name)
            result = OracleCrashed(f"frame {task.name}: {type(error).__name__}: {error}")
        with self._lock:
            self._forget(task)
        if isinstance(result, Label):
            task.future.set_result(result)
        else:
            task.future.set_exception(result)

    def _forget(self, task: _Task) -> None:
        if self._in_flight.get(task.name) is task:
            del self._in_flight[task.name]

    def _compute(self, task: _Task, place: Place) -> Label:
        retries = Retries(self._pause, self._patience)
        while True:
            failure = self._attempt(task, place, retries.limits * self._timeout)
            # looked for also after a failure: it may have been written in the moment before the end
            found = read_done(self.spool, task.name)
            if found is not None:
                return found
            if failure is None:
                failure = OracleInconsistent(
                    f"the oracle finished frame {task.name}, but {self.spool / 'done'} has no label of it"
                )
            pause = None if self._killed.is_set() else retries.after(failure)
            if pause is None:
                break
            log.warning("frame %s: %s; trying again%s", task.name, failure, f" in {pause:g} s" if pause else "")
            self._killed.wait(pause)
        if isinstance(failure, WorkerLost) and not self._killed.is_set():
            write_failed(self.spool, task.name, failure)  # the worker could not
        raise failure

    def _attempt(self, task: _Task, place: Place, limit: float) -> BnnError | None:
        """None when the label should be in the spool."""
        while not self._killed.is_set():
            if self._waited_until_free(task.name) and read_done(self.spool, task.name) is not None:
                return None
            if self._killed.is_set():
                break
            try:
                failure = place.label(task.frame, task.name, task.priority, self._killed, limit)
            except (OracleTimeout, OracleCrashed, FrameBusy) as error:
                failure = error
            if not isinstance(failure, FrameBusy):
                return failure
        return OracleCrashed("the executor was shut down")

    def _waited_until_free(self, name: str) -> bool:
        """Wait while another process computes the frame, and say so.  Returns: whether one did.

        Raises: OracleTimeout when the other process has had its time for the label and still holds the frame.
        """
        if not is_claimed(self.spool, name):
            return False
        other = holder(self.spool, name)
        log.warning(
            "waiting for the label of frame %s: pid %s on %s computes it", name, other.get("pid", "?"), other.get("host", "?")
        )
        limit, pause = START_LIMIT + 1.2 * LONGEST * self._timeout, 0.02
        end = time.monotonic() + limit
        while is_claimed(self.spool, name) and not self._killed.wait(pause):
            if time.monotonic() > end:
                other = holder(self.spool, name)
                raise OracleTimeout(
                    f"frame {name} has been computed for more than {limit:g} s by another process ({other.get('host', '?')}, "
                    f"pid {other.get('pid', '?')}); end it if it hangs"
                )
            pause = min(1.0, 1.5 * pause)
        return True
