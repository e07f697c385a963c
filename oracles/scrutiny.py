"""Doubts that codes in processes of their own share: about the settings before, about the structure and the version after."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from bnn_driver.errors import OracleConfigError, OracleInconsistent
from bnn_driver.records import Array, Frames

ERRORS = "stderr.txt"
"""What a code writes to standard error, in its work folder."""
END = 1 << 16
"""Bytes of a log in which its last lines are looked for."""


def check_rungs(kind: str, ladder: Iterable[dict[str, Any]], allowed: frozenset[str]) -> None:
    """A rung may change how the SCF converges, never to what.  Raises: OracleConfigError."""
    for number, rung in enumerate(ladder, 1):
        foreign = [key for key in rung if key not in allowed]
        if not rung or foreign:
            what = f"{foreign[0]!r} is not among them" if foreign else "it is empty"
            raise OracleConfigError(
                f"[oracle.{kind}] ladder: rung {number} may change only what leads to convergence, and {what}; "
                f"allowed are {', '.join(sorted(allowed))}"
            )


def check_geometry(
    code: str, frame: Frames, numbers: Array, positions: Array, cell: Array | None, tolerance: float, cell_tolerance: float
) -> None:
    """The structure that the code printed must be the one that was asked for, atom by atom, up to lattice vectors.

    Args: numbers: (A,).   positions: (A, 3) Å.   cell: (3, 3) Å or None.   tolerances: Å, of the printed digits.
    Raises: OracleInconsistent.
    """
    if list(numbers) != frame.numbers.tolist():
        raise OracleInconsistent(
            f"{code} computed {_formula(numbers)}, but {_formula(frame.numbers)} was asked for (in this order of atoms)"
        )
    if (cell is None) != (frame.cell is None):
        raise OracleInconsistent(
            f"{code} computed a {'molecule' if cell is None else 'crystal'}, but the frame is "
            f"{'periodic' if frame.periodic else 'a molecule'}"
        )
    shift = positions - frame.positions[0]
    if frame.cell is not None and cell is not None:
        wanted = frame.cell[0]
        if not np.abs(cell - wanted).max() <= cell_tolerance:
            raise OracleInconsistent(f"{code} computed another cell: printed {cell.tolist()} Å, asked for {wanted.tolist()} Å")
        fractional = shift @ np.linalg.inv(wanted)
        shift = (fractional - np.rint(fractional)) @ wanted
    off = np.abs(shift).max(axis=1)
    if not off.max() <= tolerance:
        atom = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
        raise OracleInconsistent(
            f"{code} computed another structure: atom {atom} ({chemical_symbols[frame.numbers[atom]]}) is {off[atom]:.3g} Å away "
            f"from where it was asked for, more than the printed digits explain ({tolerance:.1g} Å)"
        )


def _formula(numbers: Array) -> str:
    symbols = [chemical_symbols[z] for z in numbers]
    return " ".join(symbols if len(symbols) <= 20 else [*symbols[:20], f"... ({len(symbols)} atoms)"])


def check_version(kind: str, fingerprint: str, wanted: str, seen: str) -> None:
    """One version for all labels: the one that the user named, or that of the first label of this worker, kept in its folder.

    Args: wanted: "6.4.2", or "" for any.   seen: what the output says, may be longer ("6.4.2 20Jul23"); "" if it does not say.
    Raises: OracleInconsistent when it has changed.
    """
    if wanted:
        if not _is_version(seen, wanted):
            raise OracleInconsistent(
                f'{kind}: the output says version "{seen or "nothing"}", but [oracle.{kind}] version = "{wanted}"; '
                "correct the command or the setting"
            )
        return
    if not seen:
        return
    memory = Path.cwd() / f"{kind}-version-{fingerprint[:12]}.txt"
    known = text_of(memory)
    if not known:
        memory.write_text(seen, encoding="utf-8")
    elif known != seen:
        raise OracleInconsistent(
            f'{kind}: the output says version "{seen}", but earlier labels came from "{known}" ({memory}); '
            f"bring that binary back, or start another run with [oracle.{kind}] version set"
        )


def _is_version(seen: str, wanted: str) -> bool:
    return bool(seen) and (seen == wanted or seen.startswith(f"{wanted} "))


def numbers_of(code: str, words: list[str], count: int) -> Array:
    """(count,) printed numbers.  Raises: OracleInconsistent for stars, words, and more or fewer of them."""
    try:
        values = np.array([float(word) for word in words])
    except ValueError:
        values = np.zeros(0)
    if len(values) != count:
        raise OracleInconsistent(f"expected {count} numbers, but {code} printed {' '.join(words)!r}")
    return values


def text_of(path: Path) -> str:
    """What a code wrote, or nothing; bytes that are no UTF-8 are replaced."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def last_words(folder: Path, *files: str, lines: int = 12) -> str:
    """The ends of the files that are not empty, for a message."""
    ends = []
    for name in (*files, ERRORS):
        text = _end_of(folder / name).rstrip()
        if text:
            end = "\n".join(f"    {line}" for line in text.splitlines()[-lines:])
            ends.append(f"  the end of {folder / name}:\n{end}")
    return "\n".join(ends) or f"  nothing was written to {folder}"


def _end_of(path: Path) -> str:
    """The last bytes: the log of a code that keeps running may be long."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - END))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def sha256(text: str) -> str:
    """64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()
