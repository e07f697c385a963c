"""The user's input files of a code: what of them is physics, and how a copy of them is filled in for one structure."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols

from bnn_driver.errors import OracleConfigError
from bnn_driver.records import Array

ADDRESS = frozenset({"socket", "path", "host", "port"})
STRUCTURE = frozenset(
    {"atoms", "positions", "natoms", "ntypes", "elements", "types", "cell", "a", "b", "c", "periodic", "charge", "multiplicity"}
)
_PLACEHOLDER = re.compile(r"\{(" + "|".join(sorted(ADDRESS | STRUCTURE)) + r")\}")


def content_hash(folder: Path) -> str:
    """SHA-256 over names and contents, 64 hex digits; of a text blank lines and blanks at line ends do not count.

    Raises: OracleConfigError when there is no such folder, or a file cannot be read.
    """
    if not folder.is_dir():
        raise OracleConfigError(f"[oracle.socket] folder = {str(folder)!r} is no folder; it holds the input files of the code")
    digest = hashlib.sha256()
    try:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            data = _normalised(path.read_bytes())
            digest.update(f"{path.relative_to(folder).as_posix()} {len(data)}\n".encode() + data)
    except OSError as error:
        raise OracleConfigError(f"[oracle.socket] folder: {error}") from error
    return digest.hexdigest()


def _normalised(data: bytes) -> bytes:
    if b"\0" in data:
        return data
    return b"\n".join(line for line in map(bytes.rstrip, data.splitlines()) if line)


def placeholders(text: str) -> set[str]:
    """Names that `fill` would replace in a text."""
    return set(_PLACEHOLDER.findall(text))


def fill(text: str, values: Mapping[str, str]) -> str:
    """The text with every known {name} replaced; other braces stay as they are."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def structure_values(
    numbers: Array, positions: Array, cell: Array, periodic: bool, charge: int, multiplicity: int
) -> dict[str, str]:
    """name -> text for STRUCTURE.  Args: positions: (A, 3) Å.   cell: (3, 3) Å, vectors in rows."""
    elements = sorted(set(numbers.tolist()))
    rows, vectors = _rows(positions), _rows(cell)
    return {
        "atoms": "\n".join(f"{chemical_symbols[z]} {row}" for z, row in zip(numbers, rows, strict=True)),
        "positions": "\n".join(rows),
        "natoms": str(len(numbers)),
        "ntypes": str(len(elements)),
        "elements": " ".join(map(str, elements)),
        "types": " ".join(str(elements.index(z) + 1) for z in numbers),
        "cell": "\n".join(vectors),
        "a": vectors[0],
        "b": vectors[1],
        "c": vectors[2],
        "periodic": str(periodic).lower(),
        "charge": str(charge),
        "multiplicity": str(multiplicity),
    }


def _rows(x: Array) -> list[str]:
    return [" ".join(f"{value:.12f}" for value in row) for row in np.asarray(x, float)]


def lay_out(source: Path, templates: Sequence[str], values: Mapping[str, str], target: Path) -> None:
    """Copy what is in `source` to the folder `target` and fill in the templates."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    for name in templates:
        path = target / name
        text = fill(path.read_text(encoding="utf-8"), values)
        path.unlink()  # the copy of a read-only file is read-only
        path.write_text(text, encoding="utf-8")
