"""From a mean field to a converged minimum, rung by rung, or an error; for molecules and crystals.

PySCF does not raise when an SCF fails: only `converged` says so.  A second solution can be converged and wrong by eV (water with one
O-H bond at 4 Å: -75.71 instead of -76.01 hartree), so whatever leaves the plain path, or has a small gap, is tested for stability.

    rung 0    plain DIIS, cold or from the density of the label before
    rung 1    Fermi-smeared SCF, its orbitals into second-order SCF without smearing
    2 to 4    internal instabilities followed downhill
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bnn_driver.errors import SCFNotConverged, UnstableState
from bnn_driver.records import Array, Frames
from bnn_driver.units import HARTREE

log = logging.getLogger(__name__)

SMEARING = 0.01
"""Hartree; width of the Fermi smearing that only finds orbitals for the second-order rung, never a label."""
FOLLOWS = 3
"""Times that an internal instability is followed downhill."""
EXCHANGE_GAP = 17.0
"""eV by which full Hartree-Fock exchange opens the gap at which a restricted state becomes unstable.

Water with one O-H bond stretched, def2-SVP: PBE unstable from a gap of 1.1 eV (stable at 1.9), B3LYP from 4.5 (5.6), PBE0 from 5.1
(6.3), Hartree-Fock from 15.4 (16.8)."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A converged mean field."""

    mean_field: Any
    """Without second-order wrapping."""
    rung: int
    evidence: str


@dataclass(frozen=True, eq=False)
class Ladder:
    """How one system is brought to convergence."""

    build: Callable[[], Any]
    """A fresh mean field on the CPU."""
    level: str
    """The level of theory, for errors."""
    restricted: bool
    tested: Literal["on_fallback", "always"]
    tested_below: float
    """Gap, eV, below which also a plain solution is tested for stability."""
    way_out: str
    """The method that knows what a restricted one cannot describe."""
    gpu: bool = False
    """The plain SCF runs with gpu4pyscf; the rungs above and the tests of stability on the CPU."""

    def climb(self, density: Array | None = None) -> Solution:
        """A converged solution that is a minimum.

        Args: density: where to begin; None: cold.   Raises: SCFNotConverged, UnstableState.
        """
        solution, start = self._plain(density)
        rung = 0
        if not solution.converged:
            log.warning(
                "plain SCF not converged in %d cycles; second-order SCF from smeared orbitals follows", solution.max_cycle
            )
            solution, rung = self._second_order(*self._smeared_orbitals()), 1
        elif self.tested == "on_fallback" and self._gap(solution) >= self.tested_below:
            return self._accepted(solution, 0, start)
        elif self.gpu:
            solution = solution.to_cpu()
        for follow in range(FOLLOWS + 1):
            if not solution.converged:
                raise SCFNotConverged(
                    f"{self.level}: no rung of the ladder converged (the last was {rung}); look at the structure, or raise max_cycle"
                )
            orbitals, stable = _downhill(solution)
            if stable:
                self._refuse_broken_symmetry(solution)
                return self._accepted(solution.undo_soscf() if rung else solution, rung, f"{start}, stable")
            if follow < FOLLOWS:
                solution, rung = self._second_order(orbitals, solution.mo_occ), 2 + follow
        raise UnstableState(f"{self.level}: still not a minimum after an instability was followed {FOLLOWS} times")

    def _plain(self, density: Array | None) -> tuple[Any, str]:
        """Plain SCF and how it began; where the lent density leads nowhere, once more and cold."""
        solution = self._on_device()
        if density is not None:
            solution.kernel(dm0=density)
            if solution.converged:
                return solution, "began with the density of the label before"
            solution = self._on_device()
        solution.kernel()
        return solution, "began cold"

    def _on_device(self) -> Any:
        return self.build().to_gpu() if self.gpu else self.build()

    def _accepted(self, solution: Any, rung: int, how: str) -> Solution:
        return Solution(solution, rung, f"mf.converged, rung {rung}, {how}, gap {self._gap(solution):.2f} eV")

    def _smeared_orbitals(self) -> tuple[Any, Any]:
        from pyscf.scf import addons

        smeared = addons.smearing(self.build(), sigma=SMEARING, method="fermi")
        smeared.kernel()
        return smeared.mo_coeff, self.build().get_occ(smeared.mo_energy, smeared.mo_coeff)

    def _second_order(self, orbitals: Any, occupation: Any) -> Any:
        solution = self.build().newton()
        solution.kernel(mo_coeff=orbitals, mo_occ=occupation)
        return solution

    def _refuse_broken_symmetry(self, solution: Any) -> None:
        if not self.restricted:
            return
        *_, stable = solution.stability(internal=False, external=True, return_status=True)
        if not stable:
            raise UnstableState(
                f"{self.level}: the restricted solution is unstable towards an unrestricted one (gap {self._gap(solution):.2f} eV): "
                f"a bond breaks or the state is a diradical; use method = {self.way_out!r} for the whole run, or keep off such structures"
            )

    def _gap(self, solution: Any) -> float:
        """Smallest gap between occupied and empty orbitals of one spin, over all k-points, eV; infinite when none is empty."""
        spins = [(solution.mo_energy, solution.mo_occ)]
        if not self.restricted:
            spins = list(zip(solution.mo_energy, solution.mo_occ, strict=True))
        gaps = [np.inf]
        for energies, occupations in spins:
            energy, occupied = np.hstack(on_host(energies)), np.hstack(on_host(occupations)) > 0
            if occupied.any() and not occupied.all():
                gaps.append(float(energy[~occupied].min() - energy[occupied].max()) * HARTREE)
        return min(gaps)


def _downhill(solution: Any) -> tuple[Any, bool]:
    """Orbitals that lead downhill, and whether there are none because the state is a minimum among its own kind."""
    if "return_status" in inspect.signature(solution.stability).parameters:
        orbitals, _, stable, _ = solution.stability(internal=True, external=False, return_status=True)
        return orbitals, bool(stable)
    orbitals, _ = solution.stability(internal=True, external=False)
    return orbitals, orbitals is solution.mo_coeff  # unrestricted crystals: PySCF hands back the very object when it is stable


def on_host(array: Any) -> Any:
    """An array of gpu4pyscf as NumPy's; others as they are."""
    return array.get() if hasattr(array, "get") else array


def without_checkpoint(mean_field: Any) -> Any:
    """The same without the temporary file that PySCF opens for every mean field; nothing here reads it."""
    mean_field.chkfile = None
    file = getattr(mean_field, "_chkfile", None)
    if file is not None:
        file.close()
    return mean_field


@dataclass
class LastDensity:
    """The density matrix of the label before, lent once to a frame of the same atoms and state."""

    key: tuple[object, ...] = ()
    density: Any = field(default=None, repr=False)

    def take(self, frame: Frames) -> Any:
        """None where there is nothing that fits; what is taken is gone, so that a failed label leaves none behind."""
        density, self.density = self.density, None
        return density if self.key == _kind_of(frame) else None

    def put(self, frame: Frames, density: Any) -> None:
        """Keep it for the next frame."""
        self.key, self.density = _kind_of(frame), density


def _kind_of(frame: Frames) -> tuple[object, ...]:
    return (tuple(frame.numbers.tolist()), frame.charge, frame.multiplicity, frame.periodic)
