"""GFN-xTB tight binding through tblite: real and fast, for continuous integration, tutorials and first runs."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bnn_driver.errors import EnvironmentProblem, OracleConfigError, OracleCrashed, SCFNotConverged
from bnn_driver.oracle import Capabilities, check_multiplicity, make_label
from bnn_driver.records import Frames, Label
from bnn_driver.units import BOHR, BOLTZMANN, HARTREE, HARTREE_PER_BOHR, volume

HEAVIEST = 86
"""The last element that GFN1-xTB and GFN2-xTB know (radon)."""


@dataclass(frozen=True)
class TightBinding:
    """GFN2-xTB or GFN1-xTB; energy, forces and, for periodic frames (Γ point), stress.

    Calling it raises SCFNotConverged (tblite itself raises), or OracleConfigError for charge, spin and elements that cannot be.
    """

    method: Literal["GFN2-xTB", "GFN1-xTB"] = "GFN2-xTB"
    accuracy: float = 0.1
    """tblite's factor on its thresholds; its own default 1 leaves force noise near 1e-4 eV/Å."""
    electronic_temperature: float = field(default=300.0, metadata={"quantity": "temperature"})
    """K; the energy is the free energy, consistent with the forces."""
    max_iterations: int = 250

    def __post_init__(self) -> None:
        if self.accuracy <= 0 or self.electronic_temperature < 0 or self.max_iterations < 1:
            raise OracleConfigError(
                "tblite: accuracy and max_iterations must be positive and electronic_temperature not negative, got "
                f"{self.accuracy}, {self.max_iterations}, {self.electronic_temperature} K"
            )

    @property
    def code(self) -> str:
        """Name and version of tblite."""
        return f"tblite {_version()}"

    @property
    def capabilities(self) -> Capabilities:
        """Everything."""
        return Capabilities(stress=True, periodic=True, charge=True, spin=True)

    def physics(self) -> dict[str, Any]:
        """All but the limit of iterations; the version as major.minor."""
        return {
            "code": "tblite " + ".".join(_version().split(".")[:2]),
            "method": self.method,
            "accuracy": self.accuracy,
            "electronic_temperature": self.electronic_temperature,
        }

    def check(self, frame: Frames) -> None:
        """Elements, and the parity of electrons and spin.  Raises: OracleConfigError, EnvironmentProblem without tblite."""
        _version()
        unknown = sorted({int(z) for z in frame.numbers if not 1 <= z <= HEAVIEST})
        if unknown:
            raise OracleConfigError(f"{self.method} knows elements 1 to {HEAVIEST}, but the frame has {unknown}")
        check_multiplicity(frame, int(frame.numbers.sum()) - frame.charge)

    def __call__(self, frame: Frames) -> Label:
        """Label one frame from a fresh start, so that a label depends on the structure only."""
        self.check(frame)
        from tblite.exceptions import TBLiteRuntimeError, TBLiteValueError
        from tblite.interface import Calculator

        lattice = None if frame.cell is None else frame.cell[0] / BOHR
        periodic = None if frame.cell is None else np.ones(3, dtype=bool)
        try:
            calculator = Calculator(
                self.method,
                frame.numbers,
                frame.positions[0] / BOHR,
                charge=float(frame.charge),
                uhf=frame.multiplicity - 1,
                lattice=lattice,
                periodic=periodic,
            )
            calculator.set("verbosity", 0)
            calculator.set("accuracy", self.accuracy)
            calculator.set("temperature", self.electronic_temperature * BOLTZMANN / HARTREE)
            calculator.set("max-iter", self.max_iterations)
            result = calculator.singlepoint()
        except TBLiteValueError as error:
            raise OracleConfigError(f"{self.code} refused the frame: {error}") from error
        except TBLiteRuntimeError as error:
            if "converge" in str(error).lower():
                raise SCFNotConverged(f"{self.code}: {error} (max_iterations = {self.max_iterations})") from error
            raise OracleCrashed(f"{self.code} failed: {error}") from error
        forces = -result.get("gradient") * HARTREE_PER_BOHR
        stress = None if frame.cell is None else result.get("virial") * HARTREE / volume(frame.cell[0])
        energy = float(result.get("energy")) * HARTREE
        return make_label(self, frame, energy, forces, stress, evidence="tblite raised no failure")


def _version() -> str:
    try:
        return importlib.metadata.version("tblite")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentProblem("the oracle tblite needs the package tblite: pip install 'bnn-driver[tblite]'") from None
