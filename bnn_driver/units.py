"""Conversion factors, once: eV, Å, fs, K inside; everything else only at the edges.

Values are CODATA 2014 as in `ase.units`; i-PI rounds its own (1 hartree = 27.2113834 eV there, a relative 1e-7 lower).
"""

from __future__ import annotations

import re

import numpy as np

from bnn_driver.errors import ConfigError

HARTREE = 27.211386024367243  # eV
BOHR = 0.5291772105638411  # Å
HARTREE_PER_BOHR = HARTREE / BOHR  # eV/Å
KCAL_PER_MOL = 0.04336410390059322  # eV
KJ_PER_MOL = KCAL_PER_MOL / 4.184  # eV
GPA = 0.006241509125883258  # eV/Å^3
BOLTZMANN = 8.617330337217213e-05  # eV/K

_ENERGY = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": KCAL_PER_MOL,
    "kJ/mol": KJ_PER_MOL,
    "hartree": HARTREE,
    "Ha": HARTREE,
}
_LENGTH = {"Å": 1.0, "A": 1.0, "angstrom": 1.0, "nm": 10.0, "bohr": BOHR}
_FORCE = {f"{e}/{x}": ve / vx for e, ve in _ENERGY.items() for x, vx in _LENGTH.items()}
_STRESS = {f"{e}/{x}^3": ve / vx**3 for e, ve in _ENERGY.items() for x, vx in _LENGTH.items()} | {"GPa": GPA, "kbar": GPA / 10}
_TIME = {"s": 1.0, "ms": 1e-3, "min": 60.0, "h": 3600.0, "d": 86400.0}

#: kind of quantity -> unit -> factor to the unit used inside (wall time: seconds)
UNITS: dict[str, dict[str, float]] = {
    "energy": _ENERGY,
    "length": _LENGTH,
    "force": _FORCE,
    "stress": _STRESS,
    "temperature": {"K": 1.0},
    "time": {"fs": 1.0, "ps": 1e3},
    "wall time": _TIME,
}

_QUANTITY = re.compile(r"^\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S.*?)?\s*$")


def parse_quantity(text: object, kind: str) -> float:
    """Number with unit, such as "0.5 kcal/mol", in the unit used inside the program.

    Args: text: what the user wrote.   kind: a key of UNITS.
    Raises: ConfigError when the unit is missing or unknown, or the number is not one.
    """
    table = UNITS[kind]
    known = ", ".join(table) if len(table) < 10 else ", ".join(list(table)[:10]) + ", ..."
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        raise ConfigError(
            f'the unit is missing in {text!r}: write for example "{text} {next(iter(table))}"; known units: {known}'
        )
    match = _QUANTITY.match(text) if isinstance(text, str) else None
    if match is None:
        unit = next(iter(table))
        raise ConfigError(f'expected {kind} as "number unit", for example "0.5 {unit}", but got {text!r}; known units: {known}')
    number, unit = match.groups()
    if unit is None:
        raise ConfigError(
            f'the unit is missing in {text!r}: write for example "{number} {next(iter(table))}"; known units: {known}'
        )
    if unit not in table:
        raise ConfigError(f"unknown unit {unit!r} in {text!r}; a {kind} can be given in {known}")
    return float(number) * table[unit]


def volume(cell: np.ndarray) -> np.ndarray:
    """Volume of cells.  Args: cell: (..., 3, 3) Å, vectors in rows.  Returns: (...) Å^3, never negative."""
    return np.abs(np.linalg.det(cell))


def stress_from_virial(virial: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Stress with ASE's sign, σ = -W/V, where W = -dU/dε is i-PI's virial.

    Args: virial: (..., 3, 3) eV.   cell: (..., 3, 3) Å.   Returns: (..., 3, 3) eV/Å^3.
    """
    return -virial / volume(cell)[..., None, None]


def virial_from_stress(stress: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """i-PI's virial W = -V σ.  Args: stress: (..., 3, 3) eV/Å^3.  cell: (..., 3, 3) Å.  Returns: (..., 3, 3) eV."""
    return -stress * volume(cell)[..., None, None]
