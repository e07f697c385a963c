"""How many jobs may be submitted within an hour."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

HOUR = 3600.0


class HourlyCap:
    """Grants jobs while fewer than `limit` were granted within the last hour; safe to share between threads."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: clock: s."""
        self.limit, self._clock = limit, clock
        self._granted: deque[float] = deque()
        self._lock = threading.Lock()

    def take(self, wanted: int) -> int:
        """How many of the wanted jobs may be submitted now."""
        with self._lock:
            now = self._clock()
            while self._granted and now - self._granted[0] >= HOUR:
                self._granted.popleft()
            number = max(0, min(wanted, self.limit - len(self._granted)))
            self._granted.extend([now] * number)
            return number

    def next_in(self) -> float:
        """Seconds until the next job may be granted."""
        with self._lock:
            if len(self._granted) < self.limit:
                return 0.0
            return max(0.0, self._granted[0] + HOUR - self._clock())
