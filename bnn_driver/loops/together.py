"""Simulations that move at the same time, each in a thread; what they ask for at one moment is one prediction, in the calling thread.

A signal may interrupt the calling thread anywhere.  What it shares with the others are queues without a lock that it could leave held.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from bnn_driver.errors import BnnError
from bnn_driver.records import Frames, Prediction

log = logging.getLogger(__name__)

T = TypeVar("T")

WINDOW = 0.02
"""s that a simulation waits for those that moved with it the last time; i-PI makes a step in less."""
WAKE_SECONDS = 0.2
"""How often a waiting thread looks whether all is being ended; a signal that comes just before a wait is handled after it."""


class Halted(BnnError):
    """A simulation was ended because another one failed, or the run stops."""


@dataclass(frozen=True, eq=False)
class _Asked:
    name: str
    frames: Frames
    answer: queue.SimpleQueue[Prediction | BnnError]


@dataclass(frozen=True, eq=False)
class _Ended(Generic[T]):
    name: str
    result: T | None
    error: BaseException | None


class Together(Generic[T]):
    """Simulations of the same atoms, and the potential that moves them all."""

    def __init__(self, predict: Callable[[Frames], Prediction]) -> None:
        self._predict = predict
        self._inbox: queue.SimpleQueue[_Asked | _Ended[T]] = queue.SimpleQueue()
        self._in_step: set[str] = set()
        """Who was answered last, and is about to ask again."""
        self._order: list[str] = []
        self._halted = False

    def ask(self, name: str, frames: Frames) -> Prediction:
        """For the simulation of this name.  Raises: Halted; what the potential raises for these frames."""
        asked = _Asked(name, frames, queue.SimpleQueue())
        self._inbox.put(asked)
        while not self._halted:
            with contextlib.suppress(queue.Empty):
                answer = asked.answer.get(timeout=WAKE_SECONDS)
                if isinstance(answer, BnnError):
                    raise answer
                return answer
        raise Halted(f"{name} is being ended")

    def run(self, simulations: Mapping[str, Callable[[], T]], halt: Callable[[], None], ended: Callable[[T], None]) -> None:
        """Run all to their end.

        Args: halt: has simulations return that wait for something else than a prediction.   ended: hears what each returns.
        Raises: what a simulation raises, or this thread while it waits; all of them have ended by then.
        """
        self._order = list(simulations)
        threads = [
            threading.Thread(target=partial(self._one, name, simulation), name=name, daemon=True)
            for name, simulation in simulations.items()
        ]
        try:
            for thread in threads:
                thread.start()
            live = len(threads)
            while live:
                asked, over = self._gather()
                live -= len(over)
                for item in sorted(over, key=_failed):
                    self._report(item, ended)
                if asked:
                    self._answer(asked)
            for thread in threads:
                thread.join()
        except BaseException:
            self._halt(halt, ended, threads)
            raise

    def _one(self, name: str, simulation: Callable[[], T]) -> None:
        try:
            self._inbox.put(_Ended(name, simulation(), None))
        except BaseException as error:
            self._inbox.put(_Ended(name, None, error))

    def _report(self, item: _Ended[T], ended: Callable[[T], None]) -> None:
        if item.error is not None:
            raise item.error
        if item.result is not None:
            ended(item.result)

    def _gather(self) -> tuple[list[_Asked], list[_Ended[T]]]:
        """What is asked within the window, in the order of the simulations, and who has ended."""
        asked: list[_Asked] = []
        over: list[_Ended[T]] = []
        end: float | None = None
        while True:
            waiting = WAKE_SECONDS
            if end is not None:
                missing = self._in_step - {ask.name for ask in asked} - {one.name for one in over}
                waiting = max(0.0, end - time.monotonic()) if missing else 0.0
            try:
                item = self._inbox.get(timeout=waiting)
            except queue.Empty:
                if end is not None:
                    break
                continue
            if isinstance(item, _Asked):
                asked.append(item)
            else:
                over.append(item)
            end = end or time.monotonic() + WINDOW
        self._in_step = {ask.name for ask in asked}
        return sorted(asked, key=lambda ask: self._order.index(ask.name)), over

    def _answer(self, asked: Sequence[_Asked]) -> None:
        """One prediction for all; where it fails, one for each, so that only who is to blame hears of it."""
        try:
            found = self._predict(_joined([item.frames for item in asked]))
        except BnnError as error:
            if len(asked) == 1:
                asked[0].answer.put(error)
                return
            for item in asked:
                self._answer([item])
            return
        start = 0
        for item in asked:
            stop = start + len(item.frames)
            item.answer.put(found[start:stop])
            start = stop

    def _halt(self, halt: Callable[[], None], ended: Callable[[T], None], threads: Sequence[threading.Thread]) -> None:
        """End all; what a simulation brings to its end meanwhile is heard of too, and other errors than the first are told only."""
        self._halted = True
        halt()
        while any(thread.is_alive() for thread in threads) or not self._inbox.empty():
            with contextlib.suppress(queue.Empty):
                item = self._inbox.get(timeout=WAKE_SECONDS / 10)
                if isinstance(item, _Asked):
                    continue
                try:
                    self._report(item, ended)
                except Halted:
                    pass
                except Exception as error:
                    log.warning("%s ended with an error too: %s", item.name, error)


def _joined(parts: Sequence[Frames]) -> Frames:
    if len(parts) == 1:
        return parts[0]
    cells = [part.cell for part in parts if part.cell is not None]
    return replace(
        parts[0], positions=np.concatenate([part.positions for part in parts]), cell=np.concatenate(cells) if cells else None
    )


def _failed(item: _Ended[T]) -> bool:
    return item.error is not None
