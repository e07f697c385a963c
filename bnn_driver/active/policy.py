"""Prediction -> Decision: serve the frame, or ask the oracle.  Pure: the same arguments give the same decisions.

Rensmeyer, Kramer, Niggemann, DOI 10.1039/d5dd00392j: ask when the calibrated P(|error| >= accuracy) exceeds 1 - confidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bnn_driver.active.criteria import Calibration, EnergyCriterion, ErrorCriterion
from bnn_driver.errors import BnnError, ConfigError
from bnn_driver.records import Array, Criterion, Decision, Frames, LabelledFrame, Prediction


@dataclass(frozen=True)
class Policy:
    """When the oracle is asked: any criterion that cannot be promised (logical or), and audits of frames that were served."""

    criteria: tuple[ErrorCriterion, ...]
    confidence: float
    """Such as 0.95: ask when P(|error| >= accuracy) > 1 - confidence."""
    audit_probability: float
    """Part of the served frames that are labelled afterwards."""

    def __post_init__(self) -> None:
        names = [criterion.name for criterion in self.criteria]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"a policy needs criteria with different names, but got {names}")
        if not (0 < self.confidence < 1 and 0 <= self.audit_probability <= 1):
            chances = self.confidence, self.audit_probability
            raise ConfigError(f"confidence and audit_probability must lie between 0 and 1, but are {chances}")

    def judge(
        self,
        prediction: Prediction,
        frames: Frames,
        calibrations: Mapping[str, Calibration],
        audit: Array,
        first: bool = False,
    ) -> list[Decision]:
        """One decision per frame.

        Args:
            prediction: of the frames.   frames: B frames.   calibrations: criterion's name -> calibration.
            audit: (B,) uniform numbers, a function of (root seed, step, bead) alone so that a replay decides the same; a served
                frame whose number is below the audit probability is audited.
            first: True as long as nothing has been learnt: every frame is asked, for neither offset nor spread exist.
        Returns: B decisions.    Raises: BnnError when M < 2 (no spread) or a criterion has no calibration.
        """
        if first:
            sd = np.sqrt(np.mean(prediction.energy_noise_sd**2, axis=0))
            return [Decision(True, "first", 1.0, float(s)) for s in sd]
        if prediction.members < 2:
            raise BnnError(f"a decision needs the spread of at least 2 members, but the ensemble has {prediction.members}")
        missing = [c.name for c in self.criteria if c.name not in calibrations]
        if missing:
            raise BnnError(f"criterion {missing[0]!r} has no calibration; there are {sorted(calibrations)}")
        tables = [self._probabilities(c, prediction, frames.numbers, calibrations[c.name]) for c in self.criteria]
        sds = prediction.energy_predictive_sd
        return [
            self._decide([table[b] for table in tables], float(sds[b]), frames.numbers, float(audit[b]))
            for b in range(len(frames))
        ]

    def _probabilities(
        self, criterion: ErrorCriterion, prediction: Prediction, numbers: Array, calibration: Calibration
    ) -> Array:
        """P per frame and atom of the group, 1 where the model's mean is not finite.  Returns: (B, G)."""
        probability = criterion.probabilities(prediction, numbers, calibration)
        energy, forces = prediction.mean_energy, prediction.mean_forces
        if np.isfinite(energy).all() and np.isfinite(forces).all():
            return probability
        finite = np.isfinite(energy) & np.isfinite(forces).all(axis=(1, 2))
        return np.where(finite[:, None], probability, 1.0)

    def _decide(self, rows: list[Array], sd: float, numbers: Array, audit: float) -> Decision:
        """Decision on one frame.  Args: rows: per criterion (G,) probabilities.   sd: of the energy.   audit: the draw."""
        totals = [criterion.combine(row) for criterion, row in zip(self.criteria, rows, strict=True)]
        worst = int(np.argmax(totals))
        if totals[worst] <= 1.0 - self.confidence:
            kind: Criterion = "audit" if audit < self.audit_probability else "none"
            return Decision(False, kind, totals[worst], sd)
        fired = self.criteria[worst]
        if isinstance(fired, EnergyCriterion):
            return Decision(True, "energy", totals[worst], sd)
        return Decision(True, "force", totals[worst], sd, atom=int(fired.members(numbers)[np.argmax(rows[worst])]))

    def pairs(self, labelled: LabelledFrame, offset: float) -> dict[str, tuple[float, float]]:
        """Calibration pair (error, sd) of every criterion, from what was believed before the label came.

        Args: labelled: with the facts of the decision in its context.   offset: eV, added to the label's energy.
        Returns: criterion's name -> (error, sd); empty for a label that does not count: that of the first frame (it fixes the
        offset) and those predicted by generation 0 (the members are still one model and have no spread).
        """
        if labelled.context["criterion"] == "first" or labelled.context["generation"] == 0:
            return {}
        return {criterion.name: criterion.pair(labelled, offset) for criterion in self.criteria}

    def observe(self, calibrations: Mapping[str, Calibration], labelled: LabelledFrame, offset: float) -> dict[str, Calibration]:
        """The calibrations after one more label, to be called before the label is trained on.  Arguments as in `pairs`."""
        pairs = self.pairs(labelled, offset)
        return {name: c.observe(*pairs[name]) if name in pairs else c for name, c in calibrations.items()}

    def exceeded(self, labelled: LabelledFrame, offset: float) -> dict[str, bool]:
        """Which promises a served and audited frame broke.  Returns: criterion's name -> True when broken."""
        return {criterion.name: criterion.exceeded(labelled, offset) for criterion in self.criteria}
