"""Which failures are tried again, how often, and after which pause."""

from __future__ import annotations

from dataclasses import dataclass, field

from bnn_driver.errors import BnnError, OracleCrashed, WorkerLost

COSTS: tuple[tuple[type[BnnError], float], ...] = ((WorkerLost, 0.25), (OracleCrashed, 1.0))
"""First class that fits; a lost node says little about the frame, a dead code much.  All other failures are final: they would recur."""
BUDGET = 1.0
LONGEST_PAUSE = 120.0
"""Seconds."""


@dataclass
class Retries:
    """The retries of one frame."""

    pause: float
    """s before the first retry; doubled for each further one."""
    spent: float = field(default=0.0, init=False)
    _next: float = field(default=0.0, init=False)

    def after(self, failure: BnnError) -> float | None:
        """Seconds to wait before the next attempt; None if there is none."""
        self.spent += next((cost for kind, cost in COSTS if isinstance(failure, kind)), BUDGET + 1)
        if self.spent > BUDGET:
            return None
        self._next = min(max(self.pause, 2 * self._next), LONGEST_PAUSE)
        return self._next
