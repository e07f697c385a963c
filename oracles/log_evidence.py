"""What a code writes into its logs about convergence, frame by frame: the i-PI protocol itself says nothing.

Complete lines are counted, and none is skipped between two frames: a line that comes late, from a buffer, is counted with the next
frame, whose number is then wrong, and a wrong number is never evidence.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bnn_driver.errors import OracleConfigError, OracleInconsistent, SCFNotConverged

POLL_SECONDS = 0.02
MOST_AT_ONCE = 1 << 24  # bytes of a log read into memory at once


@dataclass(frozen=True)
class Mark:
    """A regular expression to be found in the lines of a file."""

    file: str
    pattern: re.Pattern[str]

    @classmethod
    def parse(cls, text: str, key: str) -> Mark:
        """Mark of "FILE: REGEX".  Raises: OracleConfigError naming the setting `key`."""
        file, colon, pattern = text.partition(":")
        try:
            if not (colon and file.strip() and pattern.strip()):
                raise ValueError("that is not a file, a colon and a regular expression")
            return cls(file.strip(), re.compile(pattern.strip()))
        except (re.error, ValueError) as error:
            raise OracleConfigError(
                f'[oracle.socket] {key} is "FILE: REGEX", for example "cp2k.out: SCF run converged in", but got {text!r}: {error}'
            ) from None


class GrowingLog:
    """A file to which a code appends, read line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0

    def read(self) -> str:
        """The lines that have become complete since the last call, at most MOST_AT_ONCE bytes of them.

        Raises: OracleInconsistent when the log has become shorter.
        """
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._position:
                    raise OracleInconsistent(
                        f"{self.path} became shorter than what was read of it ({size} of {self._position} bytes): "
                        "evidence of convergence can only be taken from a log that grows"
                    )
                file.seek(self._position)
                data = file.read(MOST_AT_ONCE)
        except FileNotFoundError:
            return ""
        complete = data[: data.rfind(b"\n") + 1] or (data if len(data) == MOST_AT_ONCE else b"")
        self._position += len(complete)
        return complete.decode(errors="replace")


class Counter:
    """The lines of one log that carry a mark, since the frame began."""

    def __init__(self, folder: Path, mark: Mark) -> None:
        self.count = 0
        self.last = ""
        """The last such line."""
        self.mark = mark
        self._log = GrowingLog(folder / mark.file)

    def begin(self) -> None:
        """A new frame: count from 0, from where reading stopped."""
        self.count, self.last = 0, ""

    def skip(self) -> None:
        """Leave out what is there already.  Raises: OracleInconsistent as `read`."""
        self.read()
        self.begin()

    def read(self) -> int:
        """Count the lines that are complete by now.  Raises: OracleInconsistent when the log has become shorter."""
        while text := self._log.read():
            for line in text.splitlines():
                if self.mark.pattern.search(line):
                    self.count, self.last = self.count + 1, line.strip()
        return self.count


class Evidence:
    """Whether the code itself says that a frame converged."""

    def __init__(self, folder: Path, converged: Mark, failed: Mark | None, lines: int, wait: float) -> None:
        """Args: lines: with the mark `converged`, written per frame.   wait: s after a result for a log to be written out."""
        self._converged = Counter(folder, converged)
        self._failed = None if failed is None else Counter(folder, failed)
        self._lines, self._wait = lines, wait

    def skip(self) -> None:
        """The code is up and idle: what it wrote so far belongs to no frame."""
        for counter in (self._converged, self._failed):
            if counter is not None:
                counter.skip()

    def begin(self) -> None:
        """A frame begins.  Raises: OracleInconsistent when the log has said more about the last one meanwhile."""
        if self._converged.read() > self._lines:
            raise OracleInconsistent(self._too_many())
        for counter in (self._converged, self._failed):
            if counter is not None:
                counter.begin()

    def _too_many(self) -> str:
        mark = self._converged.mark
        return (
            f"{self._converged.count} lines of {mark.file} match {mark.pattern.pattern!r} for one frame, expected {self._lines}: make "
            "the expression more precise, set lines_per_frame, or let the code write its log without a buffer"
        )

    def failure(self) -> str:
        """The line that says that the frame failed; empty when there is none so far."""
        return self._failed.last if self._failed is not None and self._failed.read() else ""

    def collect(self, alive: Callable[[], bool]) -> str:
        """The line that says that the frame converged, after a result has come.

        Raises: SCFNotConverged when the log says so; OracleInconsistent when it says nothing, or more than it should.
        """
        mark, end = self._converged.mark, time.monotonic() + self._wait
        while True:
            ended = not alive()  # asked first: what it wrote before its end is then read below
            count = self._converged.read()
            if failure := self.failure():
                raise SCFNotConverged(f"the log of the code says: {failure!r}")
            if count == self._lines:
                return f"{mark.file}: {self._converged.last}"
            if count > self._lines:
                raise OracleInconsistent(self._too_many())
            if ended or time.monotonic() > end:
                raise OracleInconsistent(
                    f"the code sent forces, but {self._wait:g} s later {count} of {self._lines} lines of {mark.file} match "
                    f"{mark.pattern.pattern!r}: without them nothing says that it converged.  Compare the expression with the "
                    "log, or let the code write its log without a buffer"
                )
            time.sleep(POLL_SECONDS)
