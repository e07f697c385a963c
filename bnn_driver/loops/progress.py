"""The progress line: step, predictive sd, probability, labels, generation, steps/s, time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TextIO


@dataclass
class Progress:
    """A line that is rewritten on a terminal and repeated now and then elsewhere."""

    total_steps: int | None
    first_step: int
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    terminal_seconds: float = 0.2
    plain_seconds: float = 10.0

    def __post_init__(self) -> None:
        self._start = time.monotonic()
        self._last = float("-inf")
        self._width = 0
        self._terminal = self.stream.isatty()

    def show(self, step: int, facts: str, *, force: bool = False) -> None:
        """Print the line when it is time to.  Args: step: of the simulation.  facts: what the driver knows of it."""
        now = time.monotonic()
        if not force and now - self._last < (self.terminal_seconds if self._terminal else self.plain_seconds):
            return
        self._last = now
        line = f"{self._position(step, now)} | {facts}"
        if self._terminal:
            self.stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def finish(self) -> None:
        """End the line."""
        if self._terminal and self._width:
            self.stream.write("\n")
            self.stream.flush()

    def _position(self, step: int, now: float) -> str:
        done = step - self.first_step
        rate = done / max(now - self._start, 1e-9)
        if self.total_steps is None:
            return f"step {step} | {rate:.1f} steps/s"
        left = (self.total_steps - step) / rate if rate > 0 else float("inf")
        return f"step {step}/{self.total_steps} | {rate:.1f} steps/s | {_duration(left)} left"


class CommonProgress:
    """One line for simulations that move at the same time; its steps are the sum of theirs."""

    def __init__(self, totals: Mapping[str, int], reached: Mapping[str, int]) -> None:
        """Args: totals, reached: steps of each by name, at their end and now."""
        self._progress = Progress(sum(totals.values()), sum(reached.values()))
        self._totals, self._reached = dict(totals), dict(reached)
        self._lock = threading.Lock()

    def show(self, name: str, step: int, facts: str) -> None:
        """As `Progress.show`, from the thread of a simulation."""
        with self._lock:
            self._reached[name] = step
            at = f" at {step}/{self._totals[name]}" if len(self._totals) > 1 else ""
            self._progress.show(sum(self._reached.values()), f"{name}{at} | {facts}")

    def finish(self) -> None:
        """End the line."""
        self._progress.finish()


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
