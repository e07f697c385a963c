"""Extended XYZ of anybody's making, one frame at a time: the place of every frame, what it holds, and its numbers on demand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase.data import atomic_numbers
from ase.io.extxyz import key_val_str_to_dict

from bnn_driver.errors import ConfigError
from bnn_driver.records import Array

_VALUE = re.compile(r"""\s*=\s*(?:"(?:\\.|[^"\\])*"|'[^']*'|\{[^}]*\}|\[[^\]]*\]|[^\s"]*)""")
_KEY = re.compile(r"""[^\s"']+(?=\0)""")
"""What a comment line says of a key, and a key before the mark that stands for it."""
#: columns and facts that are never labels
_STRUCTURE = {"pos", "species", "Z", "Lattice", "Properties", "pbc"}


@dataclass(frozen=True, eq=False)
class RawFrame:
    """What stands in the file of one frame."""

    numbers: Array
    """(A,) int, atomic numbers."""
    positions: Array
    """(A, 3) Å."""
    cell: Array | None
    """(3, 3) Å, vectors in rows; None where the frame is not periodic."""
    info: dict[str, Any]
    """Everything in the comment line but the structure."""
    columns: dict[str, Array]
    """Every further column of numbers, (A,) or (A, n)."""
    where: str
    """File and line, for messages."""

    def scalars(self) -> list[str]:
        """Names in the comment line that hold a single number: what could be an energy."""
        return sorted(k for k, v in self.info.items() if isinstance(v, (float, int, np.number)) and not isinstance(v, bool))

    def vectors(self) -> list[str]:
        """Names of columns with three numbers: what could be forces."""
        return sorted(name for name, x in self.columns.items() if x.ndim == 2 and x.shape[1] == 3)


def blocks(file: Path) -> Iterator[tuple[int, int, list[bytes]]]:
    """Byte offset, line number (from 1) and lines of every frame, read as it is asked for.

    Raises: ConfigError naming file and line where the file is none or is cut short.
    """
    try:
        with file.open("rb") as stream:
            yield from _blocks(stream, file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from None


def _blocks(stream: IO[bytes], file: Path) -> Iterator[tuple[int, int, list[bytes]]]:
    offset, line = 0, 1
    while first := stream.readline():
        if first.strip():
            atoms = _atoms(first, file, line)
            rest = [stream.readline() for _ in range(atoms + 1)]
            if not rest[-1].strip():
                raise ConfigError(
                    f"{file}: the frame that begins in line {line} has fewer than its {atoms} atoms; the file is cut short"
                )
            yield offset, line, [first, *rest]
            offset, line = offset + len(first) + sum(len(x) for x in rest), line + atoms + 2
        else:
            offset, line = offset + len(first), line + 1


def block_at(stream: IO[bytes], offset: int, where: str) -> list[bytes]:
    """The lines of the frame at a byte offset that `blocks` gave."""
    stream.seek(offset)
    first = stream.readline()
    if not first.strip().isdigit():
        raise ConfigError(f"{where}: no frame begins there any more; the file has changed while it was in use")
    return [first, *(stream.readline() for _ in range(int(first) + 1))]


def parse(lines: list[bytes], where: str) -> RawFrame:
    """One frame.  Args: where: file and line, for messages.   Raises: ConfigError when it is not extended XYZ."""
    try:
        text = lines[1].decode("utf-8")
        _once(_KEY.findall(_VALUE.sub("\0 ", text)), "the comment line")
        comment = key_val_str_to_dict(text)
        words = [line.split() for line in lines[2:]]
        columns = _columns(str(comment.get("Properties", "species:S:1:pos:R:3")), words)
        positions = columns.pop("pos").astype(float)
        numbers = columns.pop("Z") if "Z" in columns else np.array([atomic_numbers[str(s)] for s in columns["species"]])
        columns.pop("species", None)
        cell = _cell(comment)
    except (ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not a frame of extended XYZ: {type(error).__name__}: {error}") from None
    info = {key: value for key, value in comment.items() if key not in _STRUCTURE}
    kept = {key: x for key, x in columns.items() if x.dtype.kind in "fi"}
    return RawFrame(numbers.astype(np.int64), positions, cell, info, kept, where)


def _atoms(first: bytes, file: Path, line: int) -> int:
    if not first.strip().isdigit() or int(first) < 1:
        raise ConfigError(
            f"{file}, line {line}: expected the number of atoms of a frame, but got {first[:60]!r}; is this extended XYZ?"
        )
    return int(first)


def _columns(properties: str, words: list[list[bytes]]) -> dict[str, Array]:
    parts = properties.split(":")
    names = list(zip(parts[::3], parts[1::3], (int(n) for n in parts[2::3]), strict=True))
    _once([name for name, _, _ in names], "Properties")
    width = sum(n for _, _, n in names)
    if wrong := [row for row in words if len(row) != width]:
        raise ValueError(f"{len(wrong[0])} entries in a row, expected {width} for {properties}")
    columns, start = {}, 0
    for name, kind, n in names:
        block = [row[start : start + n] for row in words]
        start += n
        if kind == "R":
            table = np.array(block, dtype=float)
        elif kind == "I":
            table = np.array(block, dtype=np.int64)
        else:
            table = np.array([[x.decode() for x in row] for row in block])
        columns[name] = table[:, 0] if n == 1 else table
    return columns


def _once(names: list[str], where: str) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]} stands twice in {where}; keep one of them")


def _cell(comment: dict[str, Any]) -> Array | None:
    """The cell where the frame is periodic; with a lattice and nothing else said it is (as ASE reads it)."""
    lattice = comment.get("Lattice")
    given = comment.get("pbc", lattice is not None)
    periodic = [bool(x) for x in (given if isinstance(given, list) else np.atleast_1d(given))]
    if not any(periodic):
        return None
    if not all(periodic):
        raise ValueError(f"pbc is {given}: structures that are periodic in some directions only are not supported")
    if lattice is None or abs(np.linalg.det(lattice)) < 1e-6:
        raise ValueError('pbc is true, but there is no cell with a volume; write pbc="F F F" for a molecule')
    return np.asarray(lattice, dtype=float).T
