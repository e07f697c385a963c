"""What VASP writes for each frame in its interactive mode: forces on standard output, everything else in OUTCAR.

The calculation in vasprun.xml is closed only when the next positions have come, so it cannot serve here.  OUTCAR prints positions with
five decimals; forces on standard output have seven.  The layout is that of VASP 5.4.4 and 6 as recorded by the authors of
vasp-interactive (https://github.com/ulissigroup/vasp-interactive) and described at https://vasp.at/wiki/INTERACTIVE.
"""

from __future__ import annotations

import re

import numpy as np
from ase.data import atomic_numbers

from bnn_driver.errors import OracleCrashed, OracleInconsistent, SCFNotConverged
from bnn_driver.records import Array
from bnn_driver.units import GPA
from oracles.scrutiny import numbers_of
from oracles.vasp_output import REACHED, VaspResult, free_energy, loop_end, release

DIGITS = 1e-5
"""Å: positions are printed with five decimals."""
FORCE_DIGITS = 2e-6
"""eV/Å, between six decimals in OUTCAR and seven on standard output."""
_END = re.compile(r"FREE ENERGIE OF THE ION-ELECTRON SYSTEM[\s\S]*?energy\(sigma->0\) =.*\n")
_ITERATION = re.compile(r"Iteration\s+(\d+)\(\s*(\d+)\)")
_PARAMETER = re.compile(r"^\s+(NELM|NELECT|NSW)\s*=\s*([-\d.]+)", re.MULTILINE)
_VECTORS = re.compile(r"VOLUME and BASIS-vectors are now[\s\S]*?direct lattice vectors.*\n((?:.*\n){3})")
_TABLE = re.compile(r" POSITION +TOTAL-FORCE .*\n -+\n((?:.*\n)*?) -+\n")
_KILOBAR = re.compile(r"^  in kB(.*)$", re.MULTILINE)
_FORCES = re.compile(r"^FORCES:\n((?: .*\n)*?)\s*(\d+) F=\s*(\S+)", re.MULTILINE)


def is_whole_frame(outcar: str) -> bool:
    """Whether OUTCAR has all of a frame."""
    return _END.search(outcar) is not None


def read_frame(head: str, outcar: str, printed: str, number: int) -> VaspResult:
    """The result of one frame.

    Args: head: OUTCAR before the first iteration.   outcar, printed: what was written for this frame, there and on standard output.
        number: of the frame since the start, from 1.
    Raises: SCFNotConverged; OracleInconsistent when the files contradict each other or the request, or have a number that cannot be read.
    """
    parameters = dict(_PARAMETER.findall(head))
    steps = _steps(outcar, number)
    reason = loop_end(outcar)
    if reason and REACHED not in reason:
        raise SCFNotConverged(f"VASP says {reason!r}")
    if not reason:
        raise OracleInconsistent("OUTCAR does not say why the electronic loop ended; without 'aborting loop' there is no label")
    if steps >= int(float(parameters.get("NELM", "0"))):
        raise SCFNotConverged(f"VASP used all of its {parameters.get('NELM', 0)} electronic steps (NELM)")
    positions, rough_forces = _table(outcar)
    energy = free_energy(outcar)
    version = re.search(r"^ vasp\.(\S+) +(.*)$", head, re.MULTILINE)
    return VaspResult(
        energy=energy,
        forces=_forces(printed, number, energy, rough_forces),
        stress=_stress(outcar),
        numbers=_numbers(head),
        positions=positions,
        cell=_cell(outcar),
        version=release(version[1], version[2]) if version else "",
        steps=steps,
        parameters=parameters,
    )


def _steps(outcar: str, number: int) -> int:
    found = [(int(frame), int(step)) for frame, step in _ITERATION.findall(outcar)]
    if not found:
        raise OracleCrashed("OUTCAR has no iteration of this frame")
    if {frame for frame, _ in found} != {number}:
        raise OracleInconsistent(
            f"OUTCAR is at frame {found[-1][0]}, but {number} were asked for: something else moves the atoms"
        )
    return max(step for _, step in found)


def _table(outcar: str) -> tuple[Array, Array]:
    found = _TABLE.findall(outcar)
    if len(found) != 1:
        raise OracleInconsistent(f"OUTCAR has {len(found)} tables of forces for one frame")
    rows = np.array([numbers_of("VASP", line.split(), 6) for line in found[0].splitlines()]).reshape(-1, 6)
    return rows[:, :3], rows[:, 3:]


def _forces(printed: str, number: int, energy: float, rough: Array) -> Array:
    """Those of standard output, which must be the ones of OUTCAR."""
    found = _FORCES.findall(printed)
    if len(found) != 1 or int(found[0][1]) != number:
        raise OracleInconsistent(f"VASP printed FORCES of frames {[int(x[1]) for x in found]}, expected frame {number}")
    rows, _, free = found[0]
    forces = np.array([numbers_of("VASP", line.split(), 3) for line in rows.splitlines()]).reshape(-1, 3)
    if forces.shape != rough.shape or not np.allclose(forces, rough, rtol=0, atol=FORCE_DIGITS, equal_nan=True):
        raise OracleInconsistent("VASP printed other forces on standard output than in OUTCAR")
    # eight significant digits
    if not abs(float(numbers_of("VASP", [free], 1)[0]) - energy) <= 1e-7 * abs(energy) + 1e-7:
        raise OracleInconsistent(f"OUTCAR says TOTEN = {energy} eV, but standard output F= {free}")
    return forces


def _stress(outcar: str) -> Array | None:
    found = _KILOBAR.findall(outcar)
    if not found:
        return None
    xx, yy, zz, xy, yz, zx = numbers_of("VASP", found[-1].split(), 6)
    # VASP prints what the cell exerts
    return -0.1 * GPA * np.array([[xx, xy, zx], [xy, yy, yz], [zx, yz, zz]])


def _cell(outcar: str) -> Array:
    found = _VECTORS.search(outcar)
    if found is None:
        raise OracleInconsistent("OUTCAR has no lattice vectors of this frame")
    return np.array([numbers_of("VASP", line.split()[:3], 3) for line in found[1].splitlines()])


def _numbers(head: str) -> Array:
    symbols = re.findall(r"VRHFIN =\s*([A-Z][a-z]?)", head)
    counts = re.search(r"ions per type =(.*)", head)
    if counts is None or len(counts[1].split()) != len(symbols):
        raise OracleInconsistent("OUTCAR does not say how many ions of which type there are")
    return np.repeat([atomic_numbers.get(symbol, 0) for symbol in symbols], [int(n) for n in counts[1].split()])
