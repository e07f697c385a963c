"""FHI-aims kept running behind its i-PI socket: positions go in there, and everything else is read from its log.

So a label has the numbers that FHI-aims prints, with its own hartree, as one that was run by itself, and its own words about its
convergence.  The forces that come through the socket must be those of the log.  Written from a recorded run (FHI-aims 2021, six frames)
and from ASE's way to start it; never tried with the binary itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bnn_driver.errors import OracleCrashed, OracleInconsistent
from bnn_driver.ipi.server import ForceServer, unique_endpoint
from bnn_driver.ipi.transport import Endpoint
from bnn_driver.records import Array, Frames
from oracles.aims_output import BEGIN, NOT_CONVERGED, AimsResult, is_whole_frame, read_frame
from oracles.guarded import Guarded
from oracles.log_evidence import POLL_SECONDS, GrowingLog
from oracles.scrutiny import ERRORS
from oracles.sessions import DEATH_SECONDS, EXIT_SECONDS, LOG_SECONDS, UNBOUNDED, UNBUFFERED, UNLIMITED, differ_in_positions_only

PREFIX, NO_PORT = "/tmp/ipi_", 31415
"""What FHI-aims puts before the name of a Unix socket, and the port that it wants to read and does not use then."""
FORCE_TOLERANCE = 1e-5
"""eV/Å, between the socket and the log: their hartree and bohr differ in the eighth digit; and relative to the largest force."""


class RunningAims:
    """One start of FHI-aims, for frames that differ in their positions only."""

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        output: str,
        frame: Frames,
        host: str,
        write: Callable[[Path, dict[str, str]], None],
    ) -> None:
        """Start it; it is still to connect.

        Args: output: name of the file that gets its standard output.   host: where this process listens, as FHI-aims calls it;
            empty for a Unix socket.   write: puts the input into a folder, with more keywords.
        """
        self.folder, self.labels = folder, 0
        self._first, self._head = frame, ""
        self._log = GrowingLog(folder / output)
        endpoint = Endpoint("inet", host, 0) if host else unique_endpoint(PREFIX)
        self._server = ForceServer(
            endpoint,
            parameters=" ",
            connect_timeout=UNLIMITED,
            frame_timeout=UNLIMITED,
            alive=lambda: self.is_running,
        )
        self._server.__enter__()
        try:
            endpoint = self._server.endpoint
            where = f"{host} {endpoint.port}" if host else f"UNIX:{endpoint.address} {NO_PORT}"
            write(folder, {"use_pimd_wrapper": where})
            leftover = "" if host else endpoint.path
            environment = {**os.environ, **UNBUFFERED}
            self._process = Guarded("aims", words, folder, output, ERRORS, environment=environment, leftover=leftover)
        except BaseException:
            self._server.__exit__(None, None, None)
            raise

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self._process.is_running

    @property
    def end(self) -> str:
        """How its process ended, in words."""
        return self._process.end

    def fits(self, frame: Frames, restart_every: int) -> bool:
        """Whether the frame differs in its positions only from the first one."""
        return self.labels < restart_every and differ_in_positions_only(self._first, frame)

    def compute(self, frame: Frames) -> AimsResult:
        """One frame; after an error the code has to be stopped.  Raises: as `read_frame`; OracleCrashed, OracleInconsistent."""
        cell = UNBOUNDED * np.eye(3) if frame.cell is None else frame.cell[0]
        text = ""
        try:
            _, forces, _, _ = self._server.compute(frame.positions[0], cell)
            text = self._frame_text(len(frame.numbers))
        except OracleCrashed:
            self._process.wait(DEATH_SECONDS)
            text += self._new_text()
            if NOT_CONVERGED.search(text):  # it leaves then
                read_frame(self._head, text)
            raise
        if not self._head:
            self._head, _, _ = text.partition(BEGIN)
        result = read_frame(self._head, text)
        _check_same(forces, result.forces)
        self.labels += 1
        return result

    def _frame_text(self, atoms: int) -> str:
        """What it wrote since the last frame, when the structure is there: it is the last thing of a frame."""
        text, end = "", time.monotonic() + LOG_SECONDS
        while True:
            ended = not self.is_running  # asked first: what it wrote before its end is then read below
            text += self._new_text()
            if is_whole_frame(text, atoms):
                return text
            if ended:
                raise OracleCrashed("FHI-aims sent forces and ended before its log had the frame")
            if time.monotonic() > end:
                raise OracleInconsistent(
                    f"FHI-aims sent forces, but {LOG_SECONDS:g} s later its log has not all of the frame: without it nothing says "
                    'that it converged.  Let it write without a buffer, or set [oracle.aims] session = "file"'
                )
            time.sleep(POLL_SECONDS)

    def _new_text(self) -> str:
        return "".join(iter(self._log.read, ""))

    def stop(self, failed: bool) -> None:
        """EXIT, and the end of its processes."""
        self._server.__exit__(None, None, None)
        if not failed:
            self._process.wait(EXIT_SECONDS)
        self._process.stop()


def _check_same(sent: Array, printed: Array) -> None:
    """Raises: OracleInconsistent unless the log is that of the forces which came through the socket."""
    if sent.shape != printed.shape or not np.allclose(
        sent, printed, rtol=0, atol=FORCE_TOLERANCE * max(1.0, np.abs(printed).max())
    ):
        raise OracleInconsistent(f"FHI-aims sent other forces than it printed, {sent.tolist()} and {printed.tolist()} eV/Å")
