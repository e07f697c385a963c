"""Step sizes and temperatures as functions of the step k = 0, 1, ...; none of them is 0 where a step is still made."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Course:
    """The way through a schedule: a place for every step, and a short way to the end once `settle` is called."""

    steps: int
    """Steps of the whole schedule."""
    left_at: int | None = None
    """Steps made before the short way; None: there is none."""
    settling: int = 0
    """Steps of the short way, which passes through the rest of the schedule in order."""

    @property
    def length(self) -> int:
        """Steps to be made in all."""
        return self.steps if self.left_at is None else self.left_at + self.settling

    def place(self, step: int) -> float:
        """Step of the schedule whose step size and temperature hold at this step."""
        if self.left_at is None or step < self.left_at:
            return step
        return self.left_at + (step - self.left_at) * (self.steps - self.left_at) / self.settling

    def settle(self, step: int, settling: int) -> Course:
        """The course that passes through the rest of the schedule in `settling` steps, after `step` steps have been made."""
        return Course(self.steps, step, settling)


def cosine(step: float, steps: int, start: float, cycles: int = 1) -> float:
    """γ_k = γ_0/2 · (1 + cos(π k / steps)), falling from γ_0 to just above 0 at k = steps - 1.

    With `cycles` the schedule falls and jumps back so many times (Zhang et al. 2020, arXiv:1902.03932).
    """
    period = steps / cycles
    return 0.5 * start * (1.0 + math.cos(math.pi * (step % period) / period))


def temperature(step: float, steps: int, noiseless_fraction: float, ramp_fraction: float) -> float:
    """Temperature during an update: 0, then a ramp, then 1.

    The published noise amplitude rises linearly during the ramp; the amplitude is the root of the temperature, hence the square.

    Args: step: k.   steps: of the update.   noiseless_fraction: part of the steps without noise.   ramp_fraction: part of
    the steps over which the amplitude rises to 1.   Returns: T in 0..1.
    """
    first = noiseless_fraction * steps
    ramp = ramp_fraction * steps
    if step < first:
        return 0.0
    if step >= first + ramp:
        return 1.0
    return ((step - first) / ramp) ** 2


@dataclass(frozen=True)
class LongRun:
    """Sampling of a fixed set of labels: exponential burn-in, then cosine cycles with one sample at the end of each."""

    burn_in: int
    """Steps of the burn-in; its last step gives the first sample."""
    burn_in_start: float
    burn_in_end: float
    """Step sizes between which the burn-in falls."""
    mass_fraction: float
    """Part of the burn-in after which the mass is frozen."""
    cycle: int
    """Steps of a cycle."""
    cycle_start: float
    """Step size at the start of a cycle."""

    def step_size(self, step: int) -> float:
        """γ_k: γ_start (γ_end/γ_start)^(k/burn_in) in the burn-in, cosine in each cycle."""
        if step < self.burn_in:
            return self.burn_in_start * (self.burn_in_end / self.burn_in_start) ** (step / self.burn_in)
        return cosine((step - self.burn_in) % self.cycle, self.cycle, self.cycle_start)

    def adapts_mass(self, step: int) -> bool:
        """True while the mass still follows the gradients."""
        return step < self.mass_fraction * self.burn_in

    def takes_sample(self, step: int) -> bool:
        """True when the weights after this step are a sample."""
        done = step + 1 - self.burn_in
        return done >= 0 and done % self.cycle == 0
