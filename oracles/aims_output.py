"""What FHI-aims says on its standard output about one single-point calculation, and whether that is a result.

An SCF that runs out of iterations ends with "*** scf_solver: SCF cycle not converged." instead of "Have a nice day."; but with
postprocess_anyway, and in old versions, an unconverged run says its farewell too.  So a result needs both "Self-consistency cycle
converged." and the farewell.  "...not yet converged - restarting mixer..." is a remark on the way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from bnn_driver.errors import OracleCrashed, OracleInconsistent, SCFNotConverged
from bnn_driver.records import Array
from oracles.scrutiny import numbers_of

DIGITS = 2e-8
"""Å: coordinates are printed with eight decimals."""
CONVERGED, FAREWELL = "Self-consistency cycle converged.", "Have a nice day."
BEGIN = "Begin self-consistency loop"
NOT_CONVERGED = re.compile(r"scf_solver: SCF cycle not converged|SELF-CONSISTENCY CYCLE DID NOT CONVERGE")
_ENERGY = re.compile(r"\|\s*Electronic free energy\s*:\s*(\S+)\s+eV")
WRAPPER = "Atomic structure that was used in the preceding time step of the wrapper"
"""Printed after each frame behind the i-PI socket, before the structure."""
_WRAPPED_ATOM = re.compile(r"^\s*atom\s+(\S+)\s+(\S+)\s+(\S+)\s+(\S+)\s*$", re.MULTILINE)
_ATOM = re.compile(r"\|\s*\S+:\s+Species\s+(\S+)\s+(\S+)\s+(\S+)\s+(\S+)\s*$")
_STRESS_ROW = re.compile(r"\s*\|\s+[xyz]\s+[-+.\dN*]")
_HARTREE = re.compile(r"value of 1 Hartree used in FHI-aims is\s*:\s*(\S+)\s+eV")
_VERSION = re.compile(r"FHI-aims version\s*:\s*(\S+)")
_COMMIT = re.compile(r"Commit number\s*:\s*(\S+)")
_CYCLE = re.compile(r"^\s*(?:SCF\s+\d+\s*:|Begin self-consistency iteration)", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class AimsResult:
    """One converged single-point calculation, as printed."""

    energy: float
    """eV, the electronic free energy, to which the forces belong."""
    forces: Array
    """(A, 3) eV/Å."""
    stress: Array | None
    """(3, 3) eV/Å^3 with ASE's sign, or None."""
    species: list[str]
    """Name of the species of each atom."""
    positions: Array
    """(A, 3) Å."""
    cell: Array | None
    """(3, 3) Å or None."""
    version: str
    """Version and commit; empty when not printed."""
    hartree: str
    """The value of the hartree in eV that the code used, as printed (27.211384500: CODATA 2002, 5.6e-8 below ASE's); or empty."""
    cycles: int
    """SCF iterations, of all loops."""


def read_result(text: str) -> AimsResult:
    """The result in a complete output.

    Raises: SCFNotConverged; OracleCrashed when the output ends too early; OracleInconsistent when it has more than one structure,
        lacks a number or has one that cannot be read.
    """
    lines = text.splitlines()
    begin, converged = _loops(text, lines)
    finished = any(line.strip() == FAREWELL for line in lines[begin:])
    if finished and not any(n > begin for n in converged):
        raise SCFNotConverged(f"FHI-aims ended without saying {CONVERGED!r} of its last SCF loop")
    if not finished:
        raise OracleCrashed(f"the output of FHI-aims ends before {FAREWELL!r}")
    if len(converged) != 1:
        raise OracleInconsistent(
            f"FHI-aims converged {len(converged)} structures, but one was asked for: something moves the atoms"
        )
    return _result(text, text, lines[converged[0] :], *_geometry(lines))


def is_whole_frame(text: str, atoms: int) -> bool:
    """Whether a run behind the i-PI socket has written all that it writes for one frame, up to the structure."""
    return len(_structure(text)) >= atoms


def read_frame(head: str, text: str) -> AimsResult:
    """The result of one frame of a run behind the i-PI socket.

    Args: head: what was written before the first SCF loop.   text: what was written for this frame.
    Raises: SCFNotConverged, also when it does not say that it converged; OracleInconsistent as `read_result`.
    """
    lines = text.splitlines()
    begin, converged = _loops(text, lines)
    if not any(n > begin for n in converged):
        raise SCFNotConverged(f"FHI-aims sent forces without saying {CONVERGED!r} of the last SCF loop of this frame")
    if len(converged) != 1:
        raise OracleInconsistent(f"FHI-aims converged {len(converged)} structures, but one was asked for")
    rows = _structure(text)
    positions = np.array([_numbers(list(row[:3]), 3) for row in rows]).reshape(-1, 3)
    _, _, cell = _geometry(head.splitlines())
    return _result(head, text, lines[converged[0] :], [row[3] for row in rows], positions, cell)


def _loops(text: str, lines: list[str]) -> tuple[int, list[int]]:
    """Where the last SCF loop begins, and where one converged."""
    if NOT_CONVERGED.search(text):
        raise SCFNotConverged(f"FHI-aims says that its SCF did not converge in {len(_CYCLE.findall(text))} iterations")
    begin = max((n for n, line in enumerate(lines) if BEGIN in line), default=None)
    if begin is None:
        raise OracleCrashed("the output of FHI-aims ends before the first SCF loop")
    return begin, [n for n, line in enumerate(lines) if line.strip() == CONVERGED]


def _result(head: str, text: str, end: list[str], species: list[str], positions: Array, cell: Array | None) -> AimsResult:
    """Args: end: lines after the SCF has converged."""
    version, commit = _VERSION.search(head), _COMMIT.search(head)
    hartree = _HARTREE.search(head)
    return AimsResult(
        _energy(end),
        _forces(end, len(species)),
        _stress(end),
        species,
        positions,
        cell,
        " ".join(found[1] for found in (version, commit) if found),
        hartree[1] if hartree else "",
        len(_CYCLE.findall(text)),
    )


def _structure(text: str) -> list[tuple[str, ...]]:
    """x, y, z and species as printed after a frame."""
    _, found, block = text.partition(WRAPPER)
    return _WRAPPED_ATOM.findall(block) if found else []


def _energy(lines: list[str]) -> float:
    # the last one is that of the compact form, with fifteen digits
    found = [match[1] for line in lines if (match := _ENERGY.search(line))]
    if not found:
        raise OracleInconsistent("FHI-aims printed no electronic free energy after its SCF had converged")
    return float(_numbers(found[-1:], 1)[0])


def _forces(lines: list[str], atoms: int) -> Array:
    start = max((n for n, line in enumerate(lines) if "Total atomic forces" in line), default=None)
    if start is None:
        raise OracleInconsistent("FHI-aims printed no forces after its SCF had converged")
    rows = [line.split()[2:] for line in lines[start + 1 : start + 1 + atoms]]
    return np.array([_numbers(row, 3) for row in rows]).reshape(-1, 3)


def _stress(lines: list[str]) -> Array | None:
    start = max((n for n, line in enumerate(lines) if "Analytical stress tensor - Symmetrized" in line), default=None)
    if start is None:
        return None
    rows = {line.split()[1]: line.split()[2:5] for line in lines[start : start + 12] if _STRESS_ROW.match(line)}
    if list(rows) != ["x", "y", "z"]:
        raise OracleInconsistent(f"expected the rows x, y and z of the stress, got {list(rows)}")
    return np.array([_numbers(row, 3) for row in rows.values()])


def _geometry(lines: list[str]) -> tuple[list[str], Array, Array | None]:
    start = next((n for n, line in enumerate(lines) if line.strip() == "Input geometry:"), None)
    if start is None:
        raise OracleInconsistent("FHI-aims did not print its input geometry; leave output_level at its default")
    block = lines[start + 1 :]
    cell = None
    if "Unit cell:" in block[0]:
        cell = np.array([_numbers(line.replace("|", " ").split(), 3) for line in block[1:4]])
    species, positions = [], []
    for line in block:
        if match := _ATOM.search(line):
            species.append(match[1])
            positions.append(_numbers(list(match.groups()[1:]), 3))
        elif species:
            break
    return species, np.array(positions).reshape(-1, 3), cell


def _numbers(words: list[str], count: int) -> Array:
    """Also with Fortran's exponent D."""
    return numbers_of("FHI-aims", [word.replace("D", "E") for word in words], count)
