"""Density matrices or wavefunctions of the last label, lent to the next one of the same settings and atoms; only when asked for."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from bnn_driver.records import Frames
from oracles.scrutiny import text_of

ORIGIN = "origin.txt"


@dataclass(frozen=True, eq=False)
class Restart:
    """The files that one label leaves for the next, in the folder KIND-restart of the current directory."""

    kind: str
    fingerprint: str
    frame: Frames
    """B = 1."""
    patterns: tuple[str, ...]
    """Names of the files, as for Path.glob."""

    @property
    def _folder(self) -> Path:
        return Path.cwd() / f"{self.kind}-restart"

    @property
    def _key(self) -> str:
        frame = self.frame
        facts = (self.fingerprint, frame.numbers.tolist(), frame.charge, frame.multiplicity, frame.periodic)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @property
    def origin(self) -> str:
        """Id of the frame whose files fit this one; empty when there are none."""
        key, _, name = text_of(self._folder / ORIGIN).partition(" ")
        return name if key == self._key else ""

    def lend(self, work: Path) -> None:
        """Copy the files into a work folder."""
        for file in self._files(self._folder):
            shutil.copy(file, work)

    def take(self, work: Path, frame_id: str) -> None:
        """Keep the files of a work folder, with the name of their label, instead of those that were kept before."""
        self.forget()
        files = self._files(work)
        if not files:
            return
        self._folder.mkdir()
        for file in files:
            shutil.copy(file, self._folder)
        # written last: without it the files fit nothing
        (self._folder / ORIGIN).write_text(f"{self._key} {frame_id}", encoding="utf-8")

    def forget(self) -> None:
        """After a failure nothing is lent on."""
        if self._folder.is_dir():
            (self._folder / ORIGIN).unlink(missing_ok=True)
            shutil.rmtree(self._folder)

    def _files(self, folder: Path) -> list[Path]:
        return sorted(file for pattern in self.patterns for file in folder.glob(pattern))
