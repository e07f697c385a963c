"""VASP kept running in its interactive mode: it reads positions from standard input, and says for each what it found.

Between two labels its ranks wait, most MPI libraries with all their cores at work.  Never tried with the binary itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bnn_driver.errors import OracleCrashed, OracleInconsistent, SCFNotConverged
from bnn_driver.records import Array, Frames
from oracles.guarded import Guarded
from oracles.log_evidence import POLL_SECONDS, GrowingLog
from oracles.scrutiny import ERRORS
from oracles.sessions import DEATH_SECONDS, EXIT_SECONDS, LOG_SECONDS, UNBUFFERED, differ_in_positions_only
from oracles.vasp_frames import is_whole_frame, read_frame
from oracles.vasp_output import SCF_FAILURES, VaspResult

PROMPT = re.compile(r"^ *POSITIONS( AND LATTICE)?: reading from stdin *\n", re.MULTILINE)
TAGS = {"INTERACTIVE": ".TRUE.", "IBRION": "-1", "POTIM": "0", "EDIFFG": "0", "ISIF": "2"}
"""What makes VASP read positions, and nothing else, after each frame; it turns IBRION into 11."""


class RunningVasp:
    """One start of VASP, for frames that differ in their positions only."""

    def __init__(self, words: Sequence[str], folder: Path, output: str, frame: Frames, write: Callable[[Path], None]) -> None:
        """Start it with the first frame.

        Args: output: name of the file that gets its standard output.   write: puts the input into a folder.
        """
        self.folder, self.labels = folder, 0
        self._first, self._head = frame, ""
        self._printed, self._outcar = GrowingLog(folder / output), GrowingLog(folder / "OUTCAR")
        write(folder)
        source, self._feed = os.pipe()
        try:
            os.set_blocking(self._feed, False)
            environment = {**os.environ, **UNBUFFERED}
            self._process = Guarded("vasp", words, folder, output, ERRORS, environment=environment, reads=source)
        except BaseException:
            os.close(self._feed)
            raise
        finally:
            os.close(source)

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

    def compute(self, fractions: Array) -> VaspResult:
        """One frame; after an error the code has to be stopped.

        Args: fractions: (A, 3) of the lattice vectors, atoms as in POSCAR; the first ones are those of POSCAR.
        Raises: as `read_frame`; OracleCrashed.
        """
        if self.labels:
            self._write("".join(" ".join(f"{x:.16f}" for x in row) + "\n" for row in fractions))
        printed = self._until(self._printed, lambda text: PROMPT.search(text) is not None, None)
        if any(PROMPT.findall(printed)):
            raise OracleInconsistent('VASP asks for a lattice too; set [oracle.vasp] session = "file"')
        outcar = self._until(self._outcar, is_whole_frame, LOG_SECONDS)
        if not self._head:
            self._head = outcar.partition(" Iteration ")[0]
        result = read_frame(self._head, outcar, printed, self.labels + 1)
        self.labels += 1
        return result

    def _write(self, text: str) -> None:
        data = text.encode()
        while data:
            # a pipe is full while VASP is still busy with reading
            select.select([], [self._feed], [], POLL_SECONDS)
            try:
                data = data[os.write(self._feed, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise OracleCrashed("VASP ended without reading its positions") from None

    def _until(self, log: GrowingLog, done: Callable[[str], bool], seconds: float | None) -> str:
        """What was written since the last frame, when it is complete; None: the time limit of the label is enough."""
        text, end = "", None if seconds is None else time.monotonic() + seconds
        while True:
            ended = not self.is_running  # asked first: what it wrote before its end is then read below
            text += "".join(iter(log.read, ""))
            if done(text):
                return text
            if ended:
                raise self._death(text)
            if end is not None and time.monotonic() > end:
                raise OracleInconsistent(
                    f"VASP waits for positions, but {seconds:g} s later OUTCAR has not all of the frame: some builds write it in blocks "
                    'only.  Set [oracle.vasp] session = "file"'
                )
            time.sleep(POLL_SECONDS)

    def _death(self, text: str) -> OracleCrashed | SCFNotConverged:
        self._process.wait(DEATH_SECONDS)
        if said := SCF_FAILURES.search(text + "".join(iter(self._outcar.read, ""))):
            return SCFNotConverged(f"the electronic minimisation of VASP broke down: {said[0]!r}")
        return OracleCrashed("VASP ended before it asked for the next positions")

    def stop(self, failed: bool) -> None:
        """STOPCAR, the end of standard input, and the end of its processes."""
        if not failed:
            with contextlib.suppress(OSError):
                (self.folder / "STOPCAR").write_text("LABORT = .TRUE.\n", encoding="ascii")
        os.close(self._feed)
        if not failed:
            self._process.wait(EXIT_SECONDS)
        self._process.stop()
