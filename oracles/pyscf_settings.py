"""What both PySCF oracles refuse before the first label: packages that are missing, functionals and elements that PySCF does not know."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from typing import Any

from bnn_driver.errors import EnvironmentProblem, OracleConfigError

_DISPERSION_SUFFIX = re.compile(r"[-_](d[34]\w*|3c|d)$", re.IGNORECASE)


def version(package: str) -> str:
    """Version of an installed package.  Raises: EnvironmentProblem naming what to install."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        extra = "'bnn-driver[pyscf]'" if package == "pyscf" else package
        raise EnvironmentProblem(f"the oracle pyscf needs the package {package}: pip install {extra}") from None


def release(package: str) -> str:
    """Version as major.minor: what belongs to the level of theory."""
    return ".".join(version(package).split(".")[:2])


def check_gpu() -> None:
    """gpu4pyscf and a device that it can use.  Raises: EnvironmentProblem."""
    if importlib.util.find_spec("gpu4pyscf") is None or importlib.util.find_spec("cupy") is None:
        raise EnvironmentProblem(
            'device = "gpu" needs the package gpu4pyscf: pip install gpu4pyscf-cuda12x, or set device = "cpu"'
        )
    import cupy

    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise EnvironmentProblem(f'device = "gpu", but CUDA finds no device: {error}; set device = "cpu"') from error
    if devices == 0:
        raise EnvironmentProblem('device = "gpu", but CUDA finds no device; set device = "cpu"')


def check_spelling_of_functional(xc: str) -> None:
    """Dispersion is a setting of its own.  Raises: OracleConfigError."""
    if _DISPERSION_SUFFIX.search(xc):
        raise OracleConfigError(f"pyscf: xc = {xc!r} carries a dispersion correction; write it as dispersion = 'd3bj' or such")


def check_functional(xc: str) -> None:
    """PySCF knows the functional.  Raises: OracleConfigError."""
    from pyscf import dft

    try:
        dft.libxc.parse_xc(xc)
    except (KeyError, ValueError, NotImplementedError) as error:
        raise OracleConfigError(f"pyscf does not know xc = {xc!r}: {error}") from error


def exact_exchange(xc: str) -> float:
    """Share of Hartree-Fock exchange, the larger of short and long range; 1 for Hartree-Fock itself (an empty name)."""
    if not xc:
        return 1.0
    from pyscf import dft

    _, long_range, change = dft.libxc.rsh_coeff(xc)
    return float(max(long_range, long_range + change, dft.libxc.hybrid_coeff(xc)))


def is_nonlocal(xc: str) -> bool:
    """The functional has VV10 correlation."""
    from pyscf import dft

    return bool(dft.libxc.is_nlc(xc))


def refused_state(charge: int, multiplicity: int, error: Exception) -> OracleConfigError:
    """PySCF's objection to a charge and a spin, as an error of the config."""
    text = " ".join(str(error).split())
    return OracleConfigError(f"charge {charge:+d}, multiplicity {multiplicity}: {text}; mend [system]")


def refused_basis(name: str, what: Any, symbols: list[str], error: Exception) -> OracleConfigError:
    """PySCF has no such basis or pseudopotential for these elements.  Args: name: of the setting.   what: its value."""
    return OracleConfigError(f"pyscf has no {name} = {what!r} for {', '.join(sorted(set(symbols)))}: {error}")
