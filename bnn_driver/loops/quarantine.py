"""Frames that the oracle could not label: kept with the reason, and not tried again with the settings that failed.

RUN/oracle/quarantine/FRAME_ID.extxyz    the structure, Å, for the eye and for any program
RUN/oracle/quarantine/FRAME_ID.json      class, message, count, settings, step, bead; deleting it has the frame tried again
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from bnn_driver import errors
from bnn_driver.errors import EnvironmentProblem, GeometryRejected, OracleError, OracleTimeout, SCFNotConverged, UnstableState
from bnn_driver.records import Frames
from bnn_driver.store.files import plain, read_json
from bnn_driver.store.run import write_atomic

FINAL = (OracleTimeout, SCFNotConverged, UnstableState, GeometryRejected)
"""Failures that the same settings would only repeat; a process that died or a result that contradicts itself is tried again."""
RESTART_TOLERANCE = 1e-6
"""Å; i-PI's RESTART keeps 9 digits, so the first frame after a restart differs by about 1e-8."""
IN_A_ROW = 5
"""More failures than this, one after the other, and nothing more is asked."""
WINDOW, SHARE = 50, 0.3
"""More than this share of the last so many labels failed, and nothing more is asked."""


def settings_digest(*settings: Any) -> str:
    """Hash of all that a user can change about how a label is computed; JSON-able."""
    return hashlib.sha256(json.dumps(plain(settings), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Quarantine:
    """The folder of the frames without a label."""

    folder: Path
    settings: str
    """Digest of the settings in use."""

    def record(self, frame_id: str) -> Path:
        """Where the reason lies."""
        return self.folder / f"{frame_id}.json"

    def add(self, frame: Frames, frame_id: str, context: dict[str, Any], error: OracleError) -> Path:
        """Keep a frame with the reason; its failures in several starts are counted.  Returns: the file of the structure."""
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "class": type(error).__name__,
            "message": str(error),
            "count": 1 + (self._known(frame) or {}).get("count", 0),
            "settings": self.settings,
            "step": context["step"],
            "bead": context["bead"],
            "positions": frame.positions[0].tolist(),
        }
        self.release(frame)
        structure = self.record(frame_id).with_suffix(".extxyz")
        write_atomic(structure, _extxyz(frame, facts["class"]).encode())
        write_atomic(self.record(frame_id), json.dumps(facts, indent=1).encode())
        return structure

    def release(self, frame: Frames) -> None:
        """Forget a frame that has its label after all."""
        if known := self._known(frame):
            for file in (known["file"], known["file"].with_suffix(".extxyz")):
                file.unlink(missing_ok=True)

    def has(self, frame: Frames) -> bool:
        """Whether this structure could not be labelled, for whatever reason."""
        return self._known(frame) is not None

    def refusal(self, frame: Frames) -> OracleError | None:
        """The error that trying again would only repeat; None for a frame that may be tried."""
        known = self._known(frame)
        kind = getattr(errors, str((known or {}).get("class")), None)
        if known is None or known.get("settings") != self.settings or kind not in FINAL:
            return None
        error: OracleError = kind(
            f"the frame of step {known.get('step')} could not be labelled before and is not tried again with the same settings "
            f"({known.get('message')}). Change [oracle] or [sanity], or delete {known['file']}; then run the same command"
        )
        return error

    def _known(self, frame: Frames) -> dict[str, Any] | None:
        """The record of this structure, which after a restart of i-PI is the same to RESTART_TOLERANCE only."""
        for file in sorted(self.folder.glob("*.json")):
            facts = read_json(file)
            try:
                positions = np.array(facts["positions"], dtype=float)
                if (
                    positions.shape == frame.positions[0].shape
                    and np.abs(positions - frame.positions[0]).max() < RESTART_TOLERANCE
                ):
                    return facts | {"file": file}
            except (KeyError, TypeError, ValueError) as error:
                raise EnvironmentProblem(
                    f"{file} is no record of a frame ({error!r}): delete it to have the frame tried again"
                ) from error
        return None


@dataclass
class Breaker:
    """Counts the labels that failed: a code that fails again and again is not asked for ever."""

    _last: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _in_a_row: int = 0

    def count(self, failed: bool) -> None:
        """Take note of one outcome."""
        self._last.append(failed)
        self._in_a_row = self._in_a_row + 1 if failed else 0

    def check(self) -> None:
        """Raises: OracleError when too many have failed."""
        if self._in_a_row > IN_A_ROW:
            raise OracleError(
                f"the last {self._in_a_row} labels failed, one after the other: the oracle does not work as it is set up. "
                "The reasons are in oracle/quarantine; mend the oracle and run the same command"
            )
        if sum(self._last) > SHARE * WINDOW:
            raise OracleError(
                f"{sum(self._last)} of the last {len(self._last)} labels failed, more than {SHARE:.0%} of {WINDOW}. "
                "The reasons are in oracle/quarantine; mend the oracle and run the same command"
            )


def _extxyz(frame: Frames, reason: str) -> str:
    cell = "" if frame.cell is None else f'Lattice="{" ".join(map(repr, frame.cell[0].ravel().tolist()))}" '
    facts = (
        f'charge={frame.charge} multiplicity={frame.multiplicity} reason={reason} pbc="{"T T T" if frame.periodic else "F F F"}"'
    )
    rows = [
        f"{chemical_symbols[z]} {' '.join(map(repr, x))}" for z, x in zip(frame.numbers, frame.positions[0].tolist(), strict=True)
    ]
    return "\n".join([str(len(rows)), f"{cell}Properties=species:S:1:pos:R:3 {facts}", *rows]) + "\n"
