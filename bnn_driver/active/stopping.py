"""When enough has been selected: the disagreement has levelled off, the error is small, or the budget is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Plateau:
    """The selected frames have stopped to be worth more than the ones that remain.

    Both must hold: over the last `rounds` rounds the mean disagreement of the selected frames fell by less than `fall` per round (in the
    geometric mean), and it is at most `approach` times that of the remaining pool.
    """

    rounds: int
    fall: float
    """Share of the disagreement per round, 0 to 1."""
    approach: float
    """Disagreement of the selected over that of the remaining, at least 1."""

    def reached(self, selected: Sequence[float], remaining: Sequence[float]) -> bool:
        """Args: selected, remaining: mean disagreement in every round so far, any unit."""
        if len(selected) <= self.rounds or not remaining:
            return False
        before, now = selected[-1 - self.rounds], selected[-1]
        level = now >= before * (1.0 - self.fall) ** self.rounds
        return level and now <= self.approach * remaining[-1]


@dataclass(frozen=True)
class Stop:
    """All criteria of the section [pool]; None: not used."""

    rounds: int | None = None
    labels: int | None = None
    target: float | None = None
    """eV/Å, mean error of the forces on the test frames."""
    plateau: Plateau | None = None

    def reason(self, labels: int, errors: Sequence[float], selected: Sequence[float], remaining: Sequence[float]) -> str:
        """Why no further round is needed; empty: go on.

        Args: labels: learnt so far.   errors: eV/Å, on the test frames after every update so far, the last one of now.
            selected, remaining: mean disagreement in every round so far.
        """
        if self.target is not None and errors and errors[-1] <= self.target:
            return f"the target is reached: force error {errors[-1]:.4g} eV/Å on the test frames, wanted {self.target:.4g}"
        if self.plateau is not None and self.plateau.reached(selected, remaining):
            return f"the disagreement has levelled off: {selected[-1]:.4g} of the selected, {remaining[-1]:.4g} of the remaining frames"
        if self.labels is not None and labels >= self.labels:
            return f"the budget of {self.labels} labels is spent"
        if self.rounds is not None and len(selected) >= self.rounds:
            return f"all {self.rounds} rounds are done"
        return ""
