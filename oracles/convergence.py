"""What says that a calculation converged, when the code that ran it does not say so in one way: its word, an attribute, its log.

`parse` makes a Watch of the text in the config; a Watch is called with the calculator before a frame and gives the function that
is called after it, which returns the evidence or raises.  Nothing that an earlier frame left behind counts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnn_driver.errors import OracleConfigError, SCFNotConverged

Verdict = Callable[[], str]
Watch = Callable[[Any], Verdict]

TAIL = 4096
"""Bytes before the end of a log by which text that was appended is told from a log written anew."""


def parse(text: str) -> Watch:
    """The watch that `convergence` asks for: "exception", "attribute:NAME" or "regex:FILE:PATTERN".

    Raises: OracleConfigError for anything else.
    """
    kind, _, rest = text.partition(":")
    if text == "exception":
        return _trusted
    if kind == "attribute" and all(part.isidentifier() for part in rest.split(".")):
        return _Attribute(tuple(rest.split(".")))
    file, _, pattern = rest.partition(":")
    if kind == "regex" and file and pattern:
        try:
            return _Log(file, re.compile(pattern, re.MULTILINE))
        except re.error as error:
            raise OracleConfigError(f"convergence = {text!r}: {pattern!r} is not a regular expression: {error}") from None
    raise OracleConfigError(
        f"convergence = {text!r} is unknown; write 'exception' if the calculator raises an error whenever it does not converge, "
        "'attribute:converged' for an attribute that is true then, or 'regex:FILE:PATTERN' for a line that its log has then"
    )


def _trusted(calculator: Any) -> Verdict:
    return lambda: f"{type(calculator).__name__} raised no failure"


@dataclass(frozen=True)
class _Attribute:
    path: tuple[str, ...]

    def __call__(self, calculator: Any) -> Verdict:
        self._forget(calculator)
        return lambda: self._verdict(calculator)

    def _forget(self, calculator: Any) -> None:
        """Take away the answer of an earlier frame; one that is computed on demand cannot be written to, and need not be."""
        owner, last = _reached(calculator, self.path[:-1]), self.path[-1]
        if isinstance(_reached(owner, (last,)), bool | np.bool_):
            with contextlib.suppress(AttributeError, TypeError):
                if isinstance(owner, Mapping):
                    owner[last] = None
                else:
                    setattr(owner, last, None)

    def _verdict(self, calculator: Any) -> str:
        value = _reached(calculator, self.path)
        value = value() if callable(value) else value
        name = f"{type(calculator).__name__}.{'.'.join(self.path)}"
        if isinstance(value, bool | np.bool_) and value:
            return f"{name} is true"
        if value is None or isinstance(value, bool | np.bool_):
            raise SCFNotConverged(f"the calculation ended, but {name} is {value}, expected true")
        raise OracleConfigError(f"{name} is {value!r}, expected true or false; see [oracle.ase] convergence")


def _reached(start: Any, path: tuple[str, ...]) -> Any:
    """What `start.a.b` holds, also through dictionaries; None where it ends early."""
    for name in path:
        start = start.get(name) if isinstance(start, Mapping) else getattr(start, name, None)
    return start


@dataclass(frozen=True)
class _Log:
    file: str
    pattern: re.Pattern[str]

    def __call__(self, calculator: Any) -> Verdict:
        path = Path(getattr(calculator, "directory", None) or ".") / self.file
        before = _Mark.of(path)
        return lambda: self._verdict(path, before)

    def _verdict(self, path: Path, before: _Mark | None) -> str:
        try:
            match = self.pattern.search(_written_since(path, before))
        except FileNotFoundError:
            raise OracleConfigError(
                f"the calculation ended, but there is no file {path.resolve()} to tell whether it converged; "
                "mend [oracle.ase] convergence, or have the code write its log there"
            ) from None
        if match is None:
            raise SCFNotConverged(
                f"the calculation ended, but what it wrote to {path.resolve()} does not match {self.pattern.pattern!r}"
            )
        return f"{path.name}: {match.group(0)[:80].strip()}"


@dataclass(frozen=True)
class _Mark:
    """A log as it was before a frame."""

    inode: int
    size: int
    modified: int
    tail: bytes

    @staticmethod
    def of(path: Path) -> _Mark | None:
        """None where there is no file yet."""
        try:
            with path.open("rb") as file:
                facts = path.stat()
                file.seek(max(0, facts.st_size - TAIL))
                return _Mark(facts.st_ino, facts.st_size, facts.st_mtime_ns, file.read(min(TAIL, facts.st_size)))
        except FileNotFoundError:
            return None


def _written_since(path: Path, before: _Mark | None) -> str:
    """What was appended to a log, or all of it when it was written anew (some codes do the one, some the other)."""
    with path.open("rb") as file:
        facts = path.stat()
        if before is not None and facts.st_ino == before.inode and facts.st_size >= before.size:
            file.seek(before.size - len(before.tail))
            goes_on = file.read(len(before.tail)) == before.tail
            same_text_again = facts.st_size == before.size and facts.st_mtime_ns != before.modified
            file.seek(before.size if goes_on and not same_text_again else 0)
        return file.read().decode("utf-8", errors="replace")
