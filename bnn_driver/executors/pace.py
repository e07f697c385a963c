"""How many jobs may be submitted within an hour."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bnn_driver.errors import EnvironmentProblem

log = logging.getLogger(__name__)

HOUR = 3600.0
BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Linux's name of the time since a machine was started."""

Grants = Callable[[], AbstractContextManager[list[Any]]]
"""Opens the list of all grants, JSON-able, for one process and thread at a time; it is kept as the context leaves it."""


@dataclass(frozen=True)
class Instant:
    """A moment by all clocks; JSON-able by `dataclasses.asdict`."""

    wall: float
    """s since 1970, by a clock that may be set."""
    boot: str
    """Of the machine; empty where it does not say."""
    uptime: float
    """s, by a clock that nobody sets; comparable within one boot."""

    @staticmethod
    def now() -> Instant:
        """By this machine's clocks."""
        boot = ""
        with contextlib.suppress(OSError):
            boot = BOOT.read_text().strip()
        return Instant(time.time(), boot, time.monotonic())

    def since(self, facts: Any) -> float:
        """Seconds since a moment that was kept, on whatever machine; negative for clocks that disagree, infinite for what is none."""
        try:
            then = Instant(**facts)
            here = bool(self.boot) and then.boot == self.boot
            age = self.uptime - then.uptime if here else self.wall - then.wall
        except TypeError:
            return math.inf
        return math.inf if math.isnan(age) else age


class HourlyCap:
    """Grants jobs while fewer than `limit` were granted within the last hour by all who share the grants; safe between threads."""

    def __init__(self, limit: int, grants: Grants | None = None, clock: Callable[[], Instant] = Instant.now) -> None:
        """Args: grants: of all who share the limit; None: those of this object alone."""
        self.limit, self._grants, self._clock = limit, grants or _kept_here(), clock
        self._held = False

    def take(self, wanted: int) -> int:
        """How many of the wanted jobs may be submitted now.  Raises: EnvironmentProblem when the grants cannot be kept."""
        with self._grants() as grants:
            now = self._clock()
            self._ages(grants, now)
            number = max(0, min(wanted, self.limit - len(grants)))
            grants.extend([asdict(now)] * number)
            return number

    def next_in(self) -> float:
        """Seconds until the next job may be granted.  Raises: as `take`."""
        with self._grants() as grants:
            ages = self._ages(grants, self._clock())
            return HOUR - ages[self.limit - 1] if len(ages) >= self.limit else 0.0

    def grant(self, wanted: int) -> int:
        """As `take`, but what is held back, and why, is said, once for each time that it begins; nothing is raised."""
        granted, reason = 0, ""
        try:
            granted = self.take(wanted)
            if granted < wanted and not self._held:
                reason = f"{self.limit} were submitted within the hour (jobs_per_hour); the next one in {self.next_in():.0f} s"
        except EnvironmentProblem as error:
            reason = str(error)
        held = granted < wanted
        if held and not self._held:
            log.warning("%d more jobs are wanted, but %s", wanted - granted, reason)
        self._held = held
        return granted

    @staticmethod
    def _ages(grants: list[Any], now: Instant) -> list[float]:
        """s, of the grants of the last hour, youngest first; the others, and what is none, leave the list.

        One of the future, of a clock that has been set since, counts from now on: it must hold up nobody for longer than an hour.
        """
        aged = [(now.since(grant), grant) for grant in grants]
        grants[:] = [asdict(now) if age < 0 else grant for age, grant in aged if age < HOUR]
        return sorted(max(0.0, age) for age, _ in aged if age < HOUR)


def _kept_here() -> Grants:
    lock, kept = threading.Lock(), list[Any]()

    @contextlib.contextmanager
    def opened() -> Iterator[list[Any]]:
        with lock:
            yield kept

    return opened
