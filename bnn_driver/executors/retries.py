"""Which failures are tried again, how often, and after which pause."""

from __future__ import annotations

from dataclasses import dataclass, field

from bnn_driver.errors import BnnError, OracleCrashed, OracleTimeout, WorkerLost

COSTS: tuple[tuple[type[BnnError], float], ...] = ((WorkerLost, 0.25), (OracleCrashed, 0.5))
"""First class that fits; a lost node says little about the frame, a dead code more.  All other failures are final, for they would
recur, but for one time limit where there is patience."""
BUDGET = 1.0
PATIENCE = 2.0
"""Factor on the time limit when a frame is tried again after a timeout."""
LONGEST = 1 + PATIENCE
"""Time limits that a frame whose code hangs may take."""
LONGEST_PAUSE = 120.0
"""Seconds."""


@dataclass
class Retries:
    """The retries of one frame."""

    pause: float
    """s before the first retry; doubled for each further one."""
    patience: float = 1.0
    """Factor on the time limit of one retry after a timeout; 1: a timeout is final."""
    limits: float = field(default=1.0, init=False)
    """Time limits that the next attempt may take."""
    spent: float = field(default=0.0, init=False)
    _next: float = field(default=0.0, init=False)

    def after(self, failure: BnnError) -> float | None:
        """Seconds to wait before the next attempt; None if there is none."""
        if isinstance(failure, OracleTimeout) and self.limits < self.patience:
            self.limits = self.patience
            return 0.0
        self.spent += next((cost for kind, cost in COSTS if isinstance(failure, kind)), BUDGET + 1)
        if self.spent > BUDGET:
            return None
        self._next = min(max(self.pause, 2 * self._next), LONGEST_PAUSE)
        return self._next
