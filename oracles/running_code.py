"""One code that was started from a user's files and is an i-PI client, with its server and its logs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnn_driver.errors import OracleConfigError, OracleCrashed, SCFNotConverged
from bnn_driver.ipi.server import ForceServer
from bnn_driver.ipi.transport import Endpoint
from bnn_driver.records import Array
from bnn_driver.units import volume
from oracles.guarded import Guarded
from oracles.input_files import content_hash, fill, lay_out
from oracles.log_evidence import Counter, Evidence, Mark
from oracles.scrutiny import ERRORS
from oracles.sessions import DEATH_SECONDS, EXIT_SECONDS, UNBUFFERED, start_in_words

VOLUME_CHANGE = 0.1
"""Relative change of the cell after which the code is started anew, so that its basis and grids belong to the cell."""
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

    @property
    def end(self) -> str:
        """How the command ended, in words."""
        return self._process.end

    def fits(self, plan: Plan) -> bool:
        """Whether this start can label what the plan is for."""
        return self.labels < self.plan.restart_every and self.plan.same_kind(plan)

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
        except OracleCrashed as error:
            self._process.wait(DEATH_SECONDS)
            if said := self._evidence.failure():
                raise SCFNotConverged(f"{self.plan.code} left, and its log says {said!r}") from error
            raise
        if self.labels == 0:
            self._check_version()
        self.labels += 1
        return energy, forces, virial, f"{line} ({start_in_words(self.labels)})"

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
        """EXIT, and the end of its processes."""
        self._server.__exit__(None, None, None)
        if not failed:
            self._process.wait(EXIT_SECONDS)
        self._process.stop()
