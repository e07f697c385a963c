"""When enough has been selected or explored: the disagreement is level or low, the promise holds, or the budget is spent."""

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


@dataclass(frozen=True)
class Explored:
    """The weights know the system that is explored."""

    approach: float
    """Mean disagreement on fresh dynamics over that on known frames; 0: never."""
    in_a_row: int
    """Rounds in which that must hold: more than one where only the labels of the run itself are known, of which the first ones
    are far from each other and disagree the most."""
    confidence: float
    """Promised share of frames within the accuracy."""
    rounds: int
    labels: int | None

    def reason(
        self,
        labels: int,
        fresh: Sequence[float],
        known: Sequence[float | None],
        complete: Sequence[bool],
        audits: int,
        beyond: float,
    ) -> str:
        """Why no further round is needed; empty: go on.

        Args: labels: computed so far.   fresh: eV/Å, mean disagreement on the dynamics of every round, the last one of now.
            known: eV/Å, that on known frames; None while there is none, or no spread.   complete: whether no walker left the
            sanity window, without which nothing has converged.   audits: of the last labelled round.   beyond: upper end of the
            interval of the share of frames beyond the accuracy that they leave, of the criterion that is worst.
        """
        low = [
            level is not None and whole and value <= self.approach * level
            for value, level, whole in zip(fresh, known, complete, strict=True)
        ]
        if len(low) >= self.in_a_row and all(low[-self.in_a_row :]):
            return (
                f"converged: the disagreement on fresh dynamics is {fresh[-1]:.4g} eV/Å, at most {self.approach:g} times that of what "
                f"is known, {known[-1]:.4g}"
            )
        if audits and all(complete[-2:]) and beyond <= 1.0 - self.confidence:
            return f"the promise holds: by {audits} audits at most {beyond:.2g} of all frames of fresh dynamics are beyond the accuracy"
        if self.labels is not None and labels >= self.labels:
            return f"the budget of {self.labels} labels is spent"
        if len(fresh) > self.rounds:
            return f"all {self.rounds} rounds are done"
        return ""
