"""Codes that keep running between labels: when one is started anew, and what becomes of its folder.

A code is started anew when it died, when it failed, and when it does not fit the frame; it starts each frame from the last one, so a
label depends, within the thresholds of the code, on what came before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from bnn_driver.errors import OracleConfigError, OracleError
from bnn_driver.records import Frames
from oracles.one_shot import Keep
from oracles.scrutiny import last_words

log = logging.getLogger(__name__)

EXIT_SECONDS = 5.0
"""For a code to end by itself when it was told to."""
DEATH_SECONDS = 2.0
"""For the process of a code that hung up to end, so that its exit status and last words are known."""
LOG_SECONDS = 30.0
"""For the log of a frame to be written out after the code is done with it."""
UNLIMITED = 1e6
"""Seconds, where nothing but the time limit of a label ([oracle] timeout) ends a calculation: it kills the worker, and so the code."""
UNBOUNDED = 100.0
"""Å, edge of the cell that the i-PI protocol demands where the code knows none."""
KEPT = 3
"""Folders of failed codes that are kept to be looked at."""
UNBUFFERED = {"GFORTRAN_UNBUFFERED_PRECONNECTED": "1", "PYTHONUNBUFFERED": "1"}
"""What makes codes write their standard output at once."""
FOLDER = re.compile(r"\w+-session-(\d+)-\w+")
"""Name of the folder of one start: kind of the oracle, process id of its driver, and what makes it unique."""


class Running(Protocol):
    """One start of a code."""

    folder: Path
    """Where it runs."""

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""

    @property
    def end(self) -> str:
        """How its process ended, in words."""

    def stop(self, failed: bool) -> None:
        """End it; `failed`: there is no use in asking it first."""


Code = TypeVar("Code", bound=Running)


class Session(Generic[Code]):
    """The code that runs now, if any."""

    def __init__(self, kind: str) -> None:
        """Args: kind: of the oracle, for the names of folders."""
        self._kind = kind
        self._running: Code | None = None
        self._failed: list[Path] = []
        self._keep: Keep = "failed"

    def code(self, fits: Callable[[Code], bool], start: Callable[[Path], Code], keep: Keep = "failed") -> Code:
        """The running code where it fits, else one that is started in a new folder.

        Args: keep: folders that stay, the last ones of codes that failed, or all, or none.
        """
        self._keep = keep
        if self._running is not None and not (self._running.is_running and fits(self._running)):
            if died := not self._running.is_running:
                log.warning("the code of [oracle.%s] ended between two labels; it is started again", self._kind)
            self.stop(failed=died)
        if self._running is None:
            if keep != "all":
                _clear_away()
            folder = Path(tempfile.mkdtemp(prefix=f"{self._kind}-session-{os.getpid()}-", dir=Path.cwd()))
            try:
                self._running = start(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return self._running

    def stop(self, failed: bool) -> None:
        """End it; the folder of one that failed is kept for a while."""
        running, self._running = self._running, None
        if running is None:
            return
        running.stop(failed)
        if self._keep == "none" or (self._keep == "failed" and not failed):
            shutil.rmtree(running.folder, ignore_errors=True)
        elif self._keep == "failed":
            self._failed.append(running.folder)
            while len(self._failed) > KEPT:
                shutil.rmtree(self._failed.pop(0), ignore_errors=True)


def check_session(kind: str, wanted: bool, restart: bool, restart_every: int) -> None:
    """Settings of a session that cannot be.  Raises: OracleConfigError."""
    if wanted and restart:
        raise OracleConfigError(
            f"[oracle.{kind}] restart has no meaning beside session: a running code starts from its last frame anyway"
        )
    if restart_every < 1:
        raise OracleConfigError(f"[oracle.{kind}] restart_every must be positive, got {restart_every}")


@contextlib.contextmanager
def explained(code: Running, *files: str) -> Iterator[None]:
    """Add to any error of the oracle how the code ended, and its last words in some files."""
    try:
        yield
    except OracleError as error:
        raise type(error)(f"{error} ({code.end})\n{last_words(code.folder, *files)}") from error


def differ_in_positions_only(one: Frames, other: Frames) -> bool:
    """Whether a code that was started with one frame may go on with the other; a cell has to be the same to the last bit."""
    same_cell = one.cell is other.cell or (
        one.cell is not None and other.cell is not None and np.array_equal(one.cell, other.cell)
    )
    return (
        np.array_equal(one.numbers, other.numbers)
        and (one.charge, one.multiplicity) == (other.charge, other.multiplicity)
        and same_cell
    )


def start_in_words(labels: int) -> str:
    """For the evidence of a label.  Args: labels: of this start, with this one."""
    return "cold start" if labels == 1 else f"warm, frame {labels} since its start"


def _clear_away() -> None:
    """Remove the folders of codes whose driver is gone, but for the last few."""
    ours = [(p, match[1]) for p in Path.cwd().iterdir() if (match := FOLDER.fullmatch(p.name))]
    ended = [p for p, process in ours if not Path(f"/proc/{process}").exists()]
    for folder in sorted(ended, key=lambda p: p.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)
