"""What VASP left of one single-point calculation: numbers from vasprun.xml, the end of the electronic loop from OUTCAR.

VASP does not fail when its SCF runs out of steps.  VASP 6 says why the loop ended; VASP 5 says "because EDIFF is reached" in either case.
So a result needs that line, and fewer steps than NELM.  The energy and the end of OUTCAR must fit vasprun.xml.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from ase.data import atomic_numbers

from bnn_driver.errors import OracleCrashed, OracleInconsistent, SCFNotConverged
from bnn_driver.records import Array
from bnn_driver.units import GPA
from oracles.scrutiny import numbers_of, text_of

REACHED, END = "aborting loop because EDIFF is reached", "General timing and accounting"
SCF_FAILURES = re.compile(
    r"Error EDDDAV|EDDDAV: Call to ZHEGV failed|Error EDDRMM|EDDRMM: Call to ZHEGV failed|BRMIX: very serious problems"
)
"""Last words of an electronic minimiser that broke down."""
ENERGY_TOLERANCE = 1e-6
"""eV, between two files that print eight decimals."""
_LOOP = re.compile(r"aborting loop.*")
_TOTEN = re.compile(r"free  energy   TOTEN  =\s*(\S+) eV")
_VERSION = re.compile(r"vasp\.(\d+\.\d+\.\d+)")
_RELEASE = re.compile(r"(\d+\.\d+\.\d+)\.?(\S*)")


@dataclass(frozen=True, eq=False)
class VaspResult:
    """One converged single-point calculation, as printed; atoms in the order of POSCAR."""

    energy: float
    """eV, the free energy F (TOTEN), to which the forces belong; not the one extrapolated to zero smearing."""
    forces: Array
    """(A, 3) eV/Å."""
    stress: Array | None
    """(3, 3) eV/Å^3 with ASE's sign, or None."""
    numbers: Array
    """(A,)."""
    positions: Array
    """(A, 3) Å."""
    cell: Array
    """(3, 3) Å."""
    version: str
    """Such as "6.3.0 20Jan22"."""
    steps: int
    """Of the electronic loop."""
    parameters: dict[str, str]
    """What VASP made of the INCAR: NELECT, ISPIN, NSW and so on."""

    @property
    def digits(self) -> float:
        """Å: how well fractional coordinates with eight decimals give the positions."""
        return 1e-8 * float(np.linalg.norm(self.cell, axis=1).sum())


def read_result(folder: Path) -> VaspResult:
    """The result in a work folder.

    Raises: SCFNotConverged; OracleCrashed when the output ends too early; OracleInconsistent when the files contradict each other or
        the request for one single-point calculation, or have a number that cannot be read.
    """
    outcar = text_of(folder / "OUTCAR")
    reason = loop_end(outcar)
    if reason and REACHED not in reason:
        raise SCFNotConverged(f"VASP says {reason!r}")
    if END not in outcar:
        said = SCF_FAILURES.search(outcar + text_of(folder / "vasp.out"))
        if said:
            raise SCFNotConverged(f"the electronic minimisation of VASP broke down: {said[0]!r}")
        raise OracleCrashed(f"OUTCAR of VASP ends before {END!r}" if outcar else "VASP wrote no OUTCAR")
    if not reason:
        raise OracleInconsistent("OUTCAR does not say why the electronic loop ended; without 'aborting loop' there is no label")
    return _checked(read_xml(folder / "vasprun.xml"), outcar)


def loop_end(outcar: str) -> str:
    """Why the last electronic loop ended, in VASP's words; empty when it does not say."""
    found = _LOOP.findall(outcar)
    return found[-1].strip(" -") if found else ""


def free_energy(outcar: str) -> float:
    """The last TOTEN, eV.  Raises: OracleInconsistent."""
    return float(numbers_of("VASP", _TOTEN.findall(outcar)[-1:], 1)[0])


def _checked(result: VaspResult, outcar: str) -> VaspResult:
    limit = int(float(result.parameters.get("NELM", "0")))
    if result.steps >= limit:
        raise SCFNotConverged(f"VASP used all of its {limit} electronic steps (NELM)")
    for name in ("NSW", "PSTRESS"):
        if float(result.parameters.get(name, "0")) != 0:
            raise OracleInconsistent(f"VASP ran with {name} = {result.parameters[name]}, though 0 was asked for")
    energy = free_energy(outcar)
    if not abs(energy - result.energy) <= ENERGY_TOLERANCE:
        raise OracleInconsistent(f"OUTCAR says TOTEN = {energy} eV, but vasprun.xml e_fr_energy = {result.energy} eV")
    version = _VERSION.search(outcar)
    if version and version[1] != result.version.split()[0]:
        raise OracleInconsistent(f"OUTCAR is from VASP {version[1]}, but vasprun.xml from {result.version}")
    return result


def read_xml(path: Path) -> VaspResult:
    """The one calculation in a vasprun.xml, converged or not.  Raises: as `read_result`."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, FileNotFoundError) as error:
        raise OracleCrashed(f"vasprun.xml of VASP is not complete: {error}") from error
    calculations = root.findall("calculation")
    if len(calculations) != 1:
        raise OracleInconsistent(f"vasprun.xml has {len(calculations)} calculations, but one structure was asked for")
    calculation = calculations[0]
    cell = _matrix(calculation, "structure/crystal/varray[@name='basis']")
    stress = calculation.find("varray[@name='stress']")
    symbols = [(row[0].text or "").strip() for row in root.findall("atominfo/array[@name='atoms']/set/rc")]
    generator = {item.get("name"): (item.text or "").strip() for item in root.findall("generator/i")}
    return VaspResult(
        energy=float(numbers_of("VASP", [_text(calculation, "energy/i[@name='e_fr_energy']")], 1)[0]),
        forces=_matrix(calculation, "varray[@name='forces']"),
        # VASP prints what the cell exerts, in kB
        stress=None if stress is None else -0.1 * GPA * _matrix(calculation, "varray[@name='stress']"),
        numbers=np.array([atomic_numbers.get(symbol, 0) for symbol in symbols]),
        positions=_matrix(calculation, "structure/varray[@name='positions']") @ cell,
        cell=cell,
        version=release(generator.get("version", ""), generator.get("subversion", "")),
        steps=_steps(calculation),
        parameters=_parameters(root),
    )


def _parameters(root: ElementTree.Element) -> dict[str, str]:
    """The first of each name: "response functions", at the end, have a NELM of their own (1, in VASP 5.4.4)."""
    found: dict[str, str] = {}
    for item in root.findall("parameters//i"):
        found.setdefault(item.get("name", ""), (item.text or "").strip())
    return found


def release(number: str, subversion: str) -> str:
    """Number and date of "6.3.0" and "20Jan22 (build ...", or "5.4.4.18Apr17-6-g9f103f2a35" and "(build ..."."""
    found = _RELEASE.match(number)
    if found is None:
        return number
    date = found[2] or next((word for word in subversion.split() if not word.startswith("(")), "")
    return f"{found[1]} {date}".rstrip()


def _steps(calculation: ElementTree.Element) -> int:
    """Of the loop for the ground state: responses are written after the structure."""
    tags = [child.tag for child in calculation]
    return tags[: tags.index("structure")].count("scstep")


def _text(calculation: ElementTree.Element, path: str) -> str:
    found = calculation.find(path)
    if found is None:
        raise OracleInconsistent(f"vasprun.xml has no {path}")
    return (found.text or "").strip()


def _matrix(calculation: ElementTree.Element, path: str) -> Array:
    """(N, 3)."""
    found = calculation.find(path)
    if found is None:
        raise OracleInconsistent(f"vasprun.xml has no {path}")
    return np.array([numbers_of("VASP", (row.text or "").split(), 3) for row in found]).reshape(-1, 3)
