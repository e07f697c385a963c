"""Which step and which bead a frame belongs to: the i-PI protocol never says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StepCounter:
    """Turns the structures that i-PI asks for into its steps.

    i-PI sends the beads of a step in order, in one or in several requests; with <batch_size> it fills a short request with copies of
    its last structure.
    """

    per_step: int
    """Structures of one step: beads times systems."""
    first_step: int
    """Step at which i-PI started; it is evaluated at rest first."""
    batched: bool
    """True when one request holds several structures of one connection."""
    frames_seen: int = 0

    def moment(self, ahead: int = 0) -> tuple[int, int]:
        """Step and bead of the next frame, or of the one `ahead` of it."""
        seen = self.frames_seen + ahead
        return self.first_step + seen // self.per_step, seen % self.per_step

    @property
    def step(self) -> int:
        """Step of the last frame seen."""
        return self.first_step + max(self.frames_seen - 1, 0) // self.per_step

    @property
    def at_ring_start(self) -> bool:
        """True between two steps: the next frame is the first bead."""
        return self.frames_seen % self.per_step == 0

    def advance(self, distinct: int, rows: int, padding: int) -> None:
        """Count a request.  Args: distinct: different structures.  rows: all.  padding: copies of the last one at the end."""
        if not self.batched:
            self.frames_seen += rows
            return
        if distinct == 1 and rows > 1:
            # at the very start all beads are equal; later one structure is one bead and its copies
            equal_beads = self.first_step == 0 and self.frames_seen < self.per_step
            missing = self.per_step - self.frames_seen % self.per_step
            self.frames_seen += min(rows, missing) if equal_beads else 1
            return
        count = rows - padding
        self.frames_seen += count
        if count == self.per_step:  # a whole ring at once tells where the steps begin
            self.frames_seen = round(self.frames_seen / self.per_step) * self.per_step
