"""Grimme's D3 and D4 of the package pyscf-dispersion, with gradient and, for crystals, virial.

PySCF adds them to the energy of molecules itself, but to no gradient or stress of a crystal; so both oracles add them here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bnn_driver.errors import OracleConfigError
from bnn_driver.records import Array
from bnn_driver.units import HARTREE, HARTREE_PER_BOHR
from oracles.pyscf_settings import version

PACKAGE = "pyscf-dispersion"


@dataclass(frozen=True, eq=False)
class Correction:
    """The share of dispersion in a label."""

    energy: float
    """eV."""
    gradient: Array
    """(A, 3) eV/Å."""
    virial: Array
    """(3, 3) eV, dE/dε; means nothing for molecules."""


def model(system: Any, functional: str, name: str) -> Any:
    """The dispersion model of a molecule or cell.

    Args: system: PySCF's Mole or Cell.   functional: as in xc; "hf" for Hartree-Fock.   name: "d3bj", "d4", "d3bj:pbe" ...
    Raises: OracleConfigError when a name is unknown; EnvironmentProblem without the package.
    """
    version(PACKAGE)
    from pyscf.dispersion import dftd3, dftd4
    from pyscf.scf.dispersion import DISP_VERSIONS, parse_disp

    try:
        method, kind, three_body = parse_disp(functional, name)
    except ValueError:
        kind = None
    if kind not in DISP_VERSIONS:
        raise OracleConfigError(f"dispersion = {name!r} is unknown; pyscf knows {', '.join(DISP_VERSIONS)}")
    try:
        if kind == "d4":
            return dftd4.DFTD4Dispersion(system, xc=method, atm=three_body)
        return dftd3.DFTD3Dispersion(system, xc=method, version=kind, atm=three_body)
    except RuntimeError as error:
        raise OracleConfigError(
            f"dispersion = {name!r} has no parameters for xc = {method!r}: {error}; name the functional that it knows it by, "
            f"for example dispersion = '{kind}:pbe'"
        ) from error


def correction(system: Any, functional: str, name: str) -> Correction:
    """Energy, gradient and virial of the dispersion.  Args and Raises: see `model`."""
    found = model(system, functional, name).get_dispersion(grad=True)
    gradient = np.asarray(found["gradient"]) * HARTREE_PER_BOHR
    return Correction(float(found["energy"]) * HARTREE, gradient, np.asarray(found["virial"]) * HARTREE)
