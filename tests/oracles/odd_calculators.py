"""ASE calculators that do what real ones do: speak of convergence in their own way, raise their own errors, know two energies."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators import calculator as ase_base
from ase.calculators.calculator import all_changes
from ase.calculators.emt import EMT

BUILT: list[Candid] = []
"""Every Candid of this process."""


class Candid(EMT):
    """EMT that says afterwards, by an attribute and in a log, that it converged or, when told so, that it did not."""

    default_parameters = EMT.default_parameters | {"converges": True, "log": "", "rewrites": False, "says": "converged"}

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        BUILT.append(self)

    def calculate(self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        wanted = self.parameters
        self.converged = wanted.converges
        self.scf = {"converged": lambda: wanted.converges, "iterations": 7}
        if wanted.log:
            with Path(self.directory, wanted.log).open("w" if wanted.rewrites else "a") as log:
                log.write(f"SCF run {wanted.says if self.converged else 'NOT converged'}\n")


class Silent(Candid):
    """Speaks of convergence in its first calculation only."""

    def calculate(self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        before = getattr(self, "converged", None)
        super().calculate(atoms, properties, system_changes)
        if hasattr(self, "spoke"):
            self.converged = before
        self.spoke = True


class Idle(EMT):
    """Calculates once; from then on it returns without having done anything."""

    def calculate(self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        if not hasattr(self, "nl"):
            super().calculate(atoms, properties, system_changes)


class Smeared(EMT):
    """Two energies at a finite electronic temperature, of which the forces belong to the free one; a moment that went astray."""

    default_parameters = EMT.default_parameters | {"free": True, "moment": 0.0}

    def calculate(self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results["energy"] = self.results["free_energy"] + 1.0
        self.results["magmom"] = self.parameters.moment
        if not self.parameters.free:
            del self.results["free_energy"]


class Failing(EMT):
    """Raises the failure that its argument names."""

    FAILURES: dict[str, Exception] = {  # noqa: RUF012
        "scf": ase_base.SCFError("60 cycles"),
        "gpaw": type("KohnShamConvergenceError", (Exception,), {})("Did not converge!"),
        "failed": ase_base.CalculationFailed("SCF not converged in 2 cycles"),
        "input": ase_base.InputError("no pseudopotential"),
        "program": ase_base.EnvironmentError("no command"),
        "property": ase_base.PropertyNotImplementedError("stress"),
        "read": ase_base.ReadError("half an output"),
        "exit": subprocess.CalledProcessError(139, ["pw.x"]),
        "singular": np.linalg.LinAlgError("Singular matrix"),
        "memory": MemoryError("a large array"),
    }
    default_parameters = EMT.default_parameters | {"failure": ""}

    def calculate(self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        raise self.FAILURES[self.parameters.failure]


class Getters(ase_base.GetPropertiesMixin):
    """Has ASE's old interface only, as GPAW's new calculator has."""

    def __init__(self) -> None:
        self.inner = EMT()

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        return self.inner.get_property(name, atoms, allow_calculation)
