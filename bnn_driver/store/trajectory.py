"""Frames kept along simulations: appended as they come, so that a kill loses none, and read as candidates for labels afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from bnn_driver.errors import EnvironmentProblem
from bnn_driver.records import Array, Frames
from bnn_driver.store.pool import Batch
from bnn_driver.store.xyz import blocks, parse


class TrajectoryFile:
    """Extended XYZ that grows; every step and bead stands in it once, whatever a simulation repeats after a restart."""

    def __init__(self, path: Path) -> None:
        """Open for appending; a torn last frame, as a kill leaves it, is cut off.  Raises: EnvironmentProblem."""
        self.path = path
        try:
            whole, self._held = _whole_frames(path.read_bytes()) if path.exists() else (0, set())
            self._file = open(path, "ab")  # noqa: SIM115 - lives as long as the simulation
            self._file.truncate(whole)
        except OSError as error:
            raise EnvironmentProblem(f"{path} cannot be written: {error}") from error

    def __len__(self) -> int:
        return len(self._held)

    def append(self, frame: Frames, step: int, bead: int, disagreement: float) -> None:
        """One frame (B = 1), unless it is there.  Args: disagreement: eV/Å, when it was met.   Raises: EnvironmentProblem."""
        if (step, bead) in self._held:
            return
        try:
            self._file.write(_encode(frame, step, bead, disagreement))
            self._file.flush()
        except OSError as error:
            raise EnvironmentProblem(f"{self.path} could not take a frame: {error}; free space and start again") from error
        self._held.add((step, bead))

    def close(self) -> None:
        """Closing twice is allowed."""
        self._file.close()


@dataclass(frozen=True, eq=False)
class Trajectories:
    """All frames of several files of the same atoms, numbered through in the order of the files."""

    frames: Frames
    """N frames."""
    walker: tuple[str, ...]
    """(N,) whose they are."""
    step: Array
    """(N,) int."""
    bead: Array
    """(N,) int."""
    disagreement: Array
    """(N,) eV/Å, when they were met."""

    def __len__(self) -> int:
        return len(self.frames)

    def of(self, walker: str) -> Array:
        """Numbers of the frames of one simulation."""
        return np.array([i for i, name in enumerate(self.walker) if name == walker], dtype=np.int64)

    def atoms(self) -> Array:
        """(N, Z) numbers of atoms of each element, by rising atomic number."""
        return np.tile(np.unique(self.frames.numbers, return_counts=True)[1], (len(self), 1))

    def one(self, index: int) -> Batch:
        """One frame."""
        return Batch(np.array([index]), self.frames[int(index)])

    def batches(self, index: Sequence[int] | Array, atoms: int = 2000) -> Iterator[Batch]:
        """These frames, in batches of about so many atoms."""
        wanted = np.asarray(index, dtype=np.int64)
        size = max(1, atoms // len(self.frames.numbers))
        for begin in range(0, len(wanted), size):
            rows = wanted[begin : begin + size]
            yield Batch(rows, self.frames[rows])


def read_trajectories(files: Mapping[str, Path], like: Frames) -> Trajectories:
    """Args: files: by name of the simulation; one that is not there has no frames.   like: has the atoms, charge and multiplicity.

    Raises: ConfigError, as `store.xyz.parse`; EnvironmentProblem for other atoms.
    """
    walker: list[str] = []
    facts: list[tuple[int, int, float]] = []
    positions: list[Array] = []
    cells: list[Array] = []
    for name, path in files.items():
        for _, line, lines in blocks(path) if path.exists() else ():
            raw = parse(lines, f"{path} (line {line})")
            if not np.array_equal(raw.numbers, like.numbers):
                raise EnvironmentProblem(f"{raw.where}: other atoms than those of the run; restore the file")
            walker.append(name)
            facts.append((int(raw.info["step"]), int(raw.info["bead"]), float(raw.info["disagreement"])))
            positions.append(raw.positions)
            if raw.cell is not None:
                cells.append(raw.cell)
    places = np.array(positions).reshape(len(positions), len(like.numbers), 3)
    frames = Frames(like.numbers, places, np.array(cells) if like.periodic else None, like.charge, like.multiplicity)
    table: Any = np.array(facts, dtype=float).reshape(-1, 3)
    return Trajectories(frames, tuple(walker), table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2])


def _encode(frame: Frames, step: int, bead: int, disagreement: float) -> bytes:
    lattice = "" if frame.cell is None else f'Lattice="{_floats(frame.cell)}" '
    comment = (
        f'{lattice}Properties=species:S:1:pos:R:3 pbc="{"T T T" if frame.periodic else "F F F"}" step={step} bead={bead} '
        f"disagreement={float(disagreement)!r} charge={frame.charge} multiplicity={frame.multiplicity}"
    )
    rows = [f"{chemical_symbols[z]} {_floats(x)}" for z, x in zip(frame.numbers, frame.positions[0], strict=True)]
    return ("\n".join([str(len(rows)), comment, *rows]) + "\n").encode()


def _floats(array: Array) -> str:
    return " ".join(repr(x) for x in np.asarray(array, dtype=np.float64).ravel().tolist())


def _whole_frames(content: bytes) -> tuple[int, set[tuple[int, int]]]:
    """Bytes of the frames that are complete, and their steps and beads."""
    held: set[tuple[int, int]] = set()
    lines = content.split(b"\n")[:-1]  # what follows the last line break is torn, or nothing
    offset = line = 0
    while line < len(lines) and lines[line].strip().isdigit() and line + 2 + int(lines[line]) <= len(lines):
        block = lines[line : line + 2 + int(lines[line])]
        words = dict(word.split(b"=", 1) for word in block[1].split() if b"=" in word)
        held.add((int(words[b"step"]), int(words[b"bead"])))
        offset += sum(len(x) + 1 for x in block)
        line += len(block)
    return offset, held
