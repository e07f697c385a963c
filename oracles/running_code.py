"""One code that runs, and when it is started anew: it died, it failed, it is old, or the frame is of another kind."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnn_driver.errors import BnnError, OracleConfigError, OracleCrashed, OracleTimeout, SCFNotConverged
from bnn_driver.ipi.server import ForceServer
from bnn_driver.ipi.transport import Endpoint
from bnn_driver.records import Array
from bnn_driver.units import volume
from oracles.guarded import Guarded
from oracles.input_files import content_hash, fill, lay_out
from oracles.log_evidence import Counter, Evidence, Mark
from oracles.scrutiny import ERRORS, last_words

log = logging.getLogger(__name__)

EXIT_SECONDS = 5.0
"""For a code to end by itself after EXIT."""
DEATH_SECONDS = 2.0
"""For the process of a code that hung up to end, so that its exit status and last words are known."""
KEPT = 3
"""Folders of failed codes that are kept to be looked at."""
VOLUME_CHANGE = 0.1
"""Relative change of the cell after which the code is started anew, so that its basis and grids belong to the cell."""
UNBUFFERED = {"GFORTRAN_UNBUFFERED_PRECONNECTED": "1", "PYTHONUNBUFFERED": "1"}
"""What makes codes write their standard output at once."""
FOLDER = re.compile(r"ipi-code-(\d+)-\w+")
"""Name of the folder of one start: process id of its driver, and what makes it unique."""
OUTPUT = "stdout.txt"
"""What the code writes to standard output."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What one start of a code needs; see the fields of `Socket`."""

    code: str
    words: Sequence[str]
    """Launcher, program and arguments, with placeholders."""
    source: Path
    files: str
    """`content_hash` of the source when the run began."""
    templates: Sequence[str]
    values: Mapping[str, str]
    """Those of the structure."""
    environment: Mapping[str, str]
    endpoint: Endpoint
    connect_timeout: float
    frame_timeout: float
    converged: Mark
    failed: Mark | None
    version: Mark | None
    lines_per_frame: int
    evidence_timeout: float
    restart_every: int
    cell: Array
    """(3, 3) Å."""

    def same_kind(self, other: Plan) -> bool:
        """Whether a code started by one plan can go on with frames of the other."""
        kind = ("elements", "types", "charge", "multiplicity", "periodic")
        change = float(volume(other.cell) / volume(self.cell))
        return all(self.values[name] == other.values[name] for name in kind) and abs(np.log(change)) < np.log1p(VOLUME_CHANGE)


class RunningCode:
    """A started code with its server, its folder and its logs."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        """Start it; it is still to connect.  Raises: OracleConfigError when the input files are not those of the run."""
        if content_hash(plan.source) != plan.files:
            raise OracleConfigError(
                f"the input files in {plan.source} were changed since the run began; restore them, or begin a new run with the new ones"
            )
        self.plan, self.folder, self.labels = plan, folder, 0
        self._server = ForceServer(
            plan.endpoint,
            parameters=" ",
            connect_timeout=plan.connect_timeout,
            frame_timeout=plan.frame_timeout,
            alive=lambda: self.is_running,
        )
        self._evidence = Evidence(folder, plan.converged, plan.failed, plan.lines_per_frame, plan.evidence_timeout)
        self._server.__enter__()
        try:
            self._process = self._start(self._server.endpoint)
        except BaseException:
            self._server.__exit__(None, None, None)
            raise

    def _start(self, endpoint: Endpoint) -> Guarded:
        unix = endpoint.kind == "unix"
        where = {"socket": endpoint.address, "host": endpoint.address, "path": endpoint.path, "port": str(endpoint.port)}
        values = {**self.plan.values, **where}
        lay_out(self.plan.source, self.plan.templates, values, self.folder)
        return Guarded(
            "socket",
            [fill(word, values) for word in self.plan.words],
            self.folder,
            OUTPUT,
            ERRORS,
            environment={**os.environ, **UNBUFFERED, **self.plan.environment},
            leftover=endpoint.path if unix else "",
        )

    @property
    def is_running(self) -> bool:
        """Whether the command still runs."""
        return self._process.is_running

    def fits(self, plan: Plan) -> bool:
        """Whether this start can label what the plan is for."""
        return self.is_running and self.labels < self.plan.restart_every and self.plan.same_kind(plan)

    def label(self, positions: Array, cell: Array) -> tuple[float, Array, Array, str]:
        """Energy eV, forces (A, 3) eV/Å, virial (3, 3) eV and evidence; after an error the code has to be stopped.

        Args: positions: (A, 3) Å.   cell: (3, 3) Å.
        Raises: SCFNotConverged, OracleCrashed, OracleTimeout, OracleInconsistent, OracleConfigError (another version).
        """
        try:
            if self.labels == 0:
                self._server.connect()
                self._evidence.skip()
            self._evidence.begin()
            energy, forces, virial, _ = self._server.compute(positions, cell)
            line = self._evidence.collect(lambda: self.is_running)
        except BnnError as error:
            raise self._explained(error) from error
        if self.labels == 0:
            self._check_version()
        self.labels += 1
        start = "cold start" if self.labels == 1 else f"warm, frame {self.labels} since its start"
        return energy, forces, virial, f"{line} ({start})"

    def _explained(self, error: BnnError) -> BnnError:
        """The error with what the code itself says about it."""
        if isinstance(error, OracleCrashed):
            self._process.wait(DEATH_SECONDS)
            if line := self._evidence.failure():
                return SCFNotConverged(f"{self.plan.code} left, and its log says {line!r}; its files are in {self.folder}")
            files = dict.fromkeys((self.plan.converged.file, OUTPUT))
            return OracleCrashed(f"{error} ({self._process.end})\n{last_words(self.folder, *files)}")
        if isinstance(error, OracleTimeout):
            return OracleTimeout(f"{error}; its files are in {self.folder}")
        return type(error)(f"{self.plan.code}: {error}; its files are in {self.folder}")

    def _check_version(self) -> None:
        mark = self.plan.version
        if mark is None:
            return
        counter = Counter(self.folder, mark)
        found = mark.pattern.search(counter.last) if counter.read() else None
        if found is None or (found[1] or "") not in self.plan.code:
            said = f"its log says {found[1]!r}" if found else f"no line of {mark.file} matches {mark.pattern.pattern!r}"
            raise OracleConfigError(f"[oracle.socket] code = {self.plan.code!r}, but {said}: give name and version as they are")

    def stop(self, failed: bool) -> None:
        """EXIT, and the end of its processes; the folder stays only after a failure."""
        self._server.__exit__(None, None, None)
        if not failed:
            self._process.wait(EXIT_SECONDS)
        self._process.stop()
        if not failed:
            shutil.rmtree(self.folder, ignore_errors=True)


class Holder:
    """The code that runs now, if any."""

    def __init__(self) -> None:
        self._running: RunningCode | None = None
        self._failed: list[Path] = []

    def label(self, plan: Plan, positions: Array, cell: Array) -> tuple[float, Array, Array, str]:
        """As `RunningCode.label`, by the running code where it fits, else by one that is started for the plan."""
        if self._running is not None and not self._running.fits(plan):
            if died := not self._running.is_running:
                log.warning("%s ended between two labels; it is started again", plan.code)
            self.stop(failed=died)
        if self._running is None:
            _clear_away()
            folder = tempfile.mkdtemp(prefix=f"ipi-code-{os.getpid()}-", dir=Path.cwd())
            self._running = RunningCode(plan, Path(folder))
        return self._running.label(positions, cell)

    def stop(self, failed: bool) -> None:
        """End it; the folder of one that failed is kept for a while."""
        running, self._running = self._running, None
        if running is None:
            return
        running.stop(failed)
        if failed:
            self._failed.append(running.folder)
            while len(self._failed) > KEPT:
                shutil.rmtree(self._failed.pop(0), ignore_errors=True)


def _clear_away() -> None:
    """Remove the folders of codes whose driver is gone, but for the last few."""
    ours = [(p, match[1]) for p in Path.cwd().iterdir() if (match := FOLDER.fullmatch(p.name))]
    ended = [p for p, process in ours if not Path(f"/proc/{process}").exists()]
    for folder in sorted(ended, key=lambda p: p.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)
