"""Around a frame that cannot be labelled: i-PI goes back to a checkpoint and takes another way from there.

The frame is in quarantine by then.  A structure that no setting of the oracle can label is met again and again where the simulation
has no choice (constant energy, no thermostat): after `limit` times in a row the run ends with the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from bnn_driver.errors import (
    GeometryRejected,
    OracleCrashed,
    OracleError,
    OracleTimeout,
    SCFNotConverged,
    UnstableState,
    WorkerLost,
)
from bnn_driver.loops.seeds import derive

log = logging.getLogger(__name__)

FRAME_FAILED = (GeometryRejected, OracleCrashed, OracleTimeout, SCFNotConverged, UnstableState)
"""Failures for which the structure may be to blame."""
NEAR = 10
"""Steps before the frame at least: from closer there is no other way."""


class Simulation(Protocol):
    """What `ipi.simulation.IpiProcess` can do."""

    def rewind(self, below: int, seed: int) -> int | None:
        """Have the next start begin at the furthest checkpoint before a step; returns its step, None when there is none."""
        ...


@dataclass
class Rewinding:
    """How often a simulation went back, and whether it may again."""

    limit: int
    """Times in a row without coming past the step of the failure."""
    seed: int
    """Of the run."""
    walker: str
    tell: Callable[[int, int, str], None]
    """(step of the frame, step gone back to, reason)"""
    times: int = 0
    """In all starts of the run, so that no random numbers come twice."""
    _failed_at: int = field(default=-1, init=False)
    _in_a_row: int = field(default=0, init=False)
    _below: int = field(default=0, init=False)

    def go_back(self, simulation: Simulation, step: int, error: OracleError) -> bool:
        """Have a simulation that has ended begin before the frame that could not be labelled.  Args: step: of the frame.

        Returns: False when it must not, or has no checkpoint to go back to.
        """
        if isinstance(error, WorkerLost):
            return False
        if step > self._failed_at:
            self._failed_at, self._in_a_row, self._below = step, 0, min(step, max(1, step - NEAR + 1))
        if self._in_a_row == self.limit:
            if self.limit:
                log.error("i-PI went back %d times before step %d and came to such frames again: the run ends", self.limit, step)
            return False
        target = simulation.rewind(self._below, derive(self.seed, "rewind", self.walker, self.times))
        if target is None:
            return False
        self._below = target  # the next time further back
        self._in_a_row += 1
        self.times += 1
        self.tell(step, target, f"{type(error).__name__}: {error}")
        return True
