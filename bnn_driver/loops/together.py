"""Simulations that move at the same time, each in a thread; what they ask for at one moment is one prediction, in the calling thread."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from bnn_driver.errors import BnnError
from bnn_driver.records import Frames, Prediction

log = logging.getLogger(__name__)

T = TypeVar("T")

WINDOW = 0.02
"""s that a simulation waits for the others; i-PI makes a step in less, so that they soon move in time."""
WAKE_SECONDS = 0.2
"""A signal that comes just before a wait is handled after it."""


class Halted(BnnError):
    """A simulation was ended because another one failed, or the run stops."""


@dataclass(frozen=True, eq=False)
class _Asked:
    frames: Frames
    answer: Future[Prediction]


@dataclass(frozen=True, eq=False)
class _Ended(Generic[T]):
    result: T | None
    error: BaseException | None


class Together(Generic[T]):
    """Simulations of the same atoms, and the potential that moves them all."""

    def __init__(self, predict: Callable[[Frames], Prediction]) -> None:
        self._predict = predict
        self._inbox: queue.SimpleQueue[_Asked | _Ended[T]] = queue.SimpleQueue()
        self._open: set[Future[Prediction]] = set()
        self._lock = threading.Lock()
        self._halted = False

    def predict(self, frames: Frames) -> Prediction:
        """For the simulations.  Raises: Halted; what the potential raises for these frames."""
        answer: Future[Prediction] = Future()
        with self._lock:
            if self._halted:
                raise Halted("the simulations are being ended")
            self._open.add(answer)
        self._inbox.put(_Asked(frames, answer))
        try:
            return self._awaited(answer)
        finally:
            with self._lock:
                self._open.discard(answer)

    def _awaited(self, answer: Future[Prediction]) -> Prediction:
        """A signal can interrupt the other thread before it wakes this one."""
        while True:
            with contextlib.suppress(TimeoutError):
                return answer.result(WAKE_SECONDS)

    def run(self, simulations: Mapping[str, Callable[[], T]], halt: Callable[[], None], ended: Callable[[T], None]) -> None:
        """Run all to their end.

        Args: halt: has simulations return that wait for something else than a prediction.   ended: hears what each returns.
        Raises: what a simulation raises, or this thread while it waits; all of them have ended by then.
        """
        threads = [
            threading.Thread(target=partial(self._one, simulation), name=name, daemon=True)
            for name, simulation in simulations.items()
        ]
        try:
            for thread in threads:
                thread.start()
            live = len(threads)
            while live:
                asked, over = self._gather(live)
                live -= len(over)
                for item in over:
                    if item.error is not None:
                        raise item.error
                    if item.result is not None:
                        ended(item.result)
                if asked:
                    self._answer(asked)
            for thread in threads:
                thread.join()
        except BaseException:
            self._halt(halt, threads)
            raise

    def _one(self, simulation: Callable[[], T]) -> None:
        try:
            self._inbox.put(_Ended(simulation(), None))
        except BaseException as error:
            self._inbox.put(_Ended(None, error))

    def _gather(self, live: int) -> tuple[list[_Asked], list[_Ended[T]]]:
        """What is asked within the window, and who has ended."""
        asked: list[_Asked] = []
        over: list[_Ended[T]] = []
        end: float | None = None
        while len(asked) + len(over) < live:
            try:
                item = self._inbox.get(timeout=WAKE_SECONDS if end is None else max(0.0, end - time.monotonic()))
            except queue.Empty:
                if end is not None:
                    break
                continue
            if isinstance(item, _Asked):
                asked.append(item)
            else:
                over.append(item)
            end = end or time.monotonic() + WINDOW
        return asked, over

    def _answer(self, asked: Sequence[_Asked]) -> None:
        """One prediction for all; where it fails, one for each, so that only who is to blame hears of it."""
        try:
            found = self._predict(_joined([item.frames for item in asked]))
        except BnnError as error:
            if len(asked) == 1:
                asked[0].answer.set_exception(error)
                return
            for item in asked:
                self._answer([item])
            return
        start = 0
        for item in asked:
            stop = start + len(item.frames)
            item.answer.set_result(found[start:stop])
            start = stop

    def _halt(self, halt: Callable[[], None], threads: Sequence[threading.Thread]) -> None:
        """End all; those that wait for a prediction get none."""
        with self._lock:
            self._halted = True
            waiting = list(self._open)
        for answer in waiting:
            if not answer.done():
                answer.set_exception(Halted("the simulations are being ended"))
        halt()
        while any(thread.is_alive() for thread in threads) or not self._inbox.empty():
            with contextlib.suppress(queue.Empty):
                item = self._inbox.get(timeout=WAKE_SECONDS / 10)
                if isinstance(item, _Ended) and item.error is not None and not isinstance(item.error, Halted):
                    log.warning("one more ended with an error: %s", item.error)


def _joined(parts: Sequence[Frames]) -> Frames:
    if len(parts) == 1:
        return parts[0]
    cells = [part.cell for part in parts if part.cell is not None]
    return replace(
        parts[0], positions=np.concatenate([part.positions for part in parts]), cell=np.concatenate(cells) if cells else None
    )
