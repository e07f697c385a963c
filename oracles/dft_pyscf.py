"""Hartree-Fock and density functional theory of molecules with PySCF, one thread per process.

PySCF does not raise when an SCF fails: only `converged` says so.  A second solution can be converged and wrong by eV (water with one
O-H bond at 4 Å: -75.71 instead of -76.01 hartree), so whatever leaves the plain path, or has a small gap, is tested for stability.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import re
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from ase.data import chemical_symbols

from bnn_driver.errors import EnvironmentProblem, OracleConfigError, SCFNotConverged, UnstableState
from bnn_driver.oracle import Capabilities, check_capabilities, make_label
from bnn_driver.records import Array, Frames, Label
from bnn_driver.units import BOHR, HARTREE, HARTREE_PER_BOHR

log = logging.getLogger(__name__)

SMEARING = 0.01
"""Hartree; width of the Fermi smearing that only finds orbitals for the second-order rung, never a label."""
FOLLOWS = 3
"""Times that an internal instability is followed downhill."""
_DISPERSION_SUFFIX = re.compile(r"[-_](d[34]\w*|3c|d)$", re.IGNORECASE)


@dataclass(frozen=True)
class PySCF:
    """One level of theory for a whole campaign; charge and multiplicity come with the frame.

    The ladder: plain DIIS (rung 0) -> Fermi-smeared SCF, its orbitals into second-order SCF without smearing (1) -> internal
    instabilities followed (2 to 4).  A restricted solution that would lower its energy by becoming unrestricted is refused: one
    spin-polarised label in a restricted data set makes the surface inconsistent.  For radicals use method = "uks" throughout.
    """

    method: Literal["rhf", "uhf", "rks", "uks"]
    basis: str
    xc: str = ""
    """Functional in PySCF's notation, without dispersion; for rks and uks."""
    dispersion: str = ""
    """"d3bj", "d3zero", "d4" ...: needs the package pyscf-dispersion."""
    density_fit: bool = True
    auxiliary_basis: str = ""
    """Basis of the density fit; PySCF's choice when empty."""
    grid_level: int = 2
    """PySCF's integration grid, 0 to 9; take 4 for meta-GGAs (level 2: 2 meV and 1.4 meV/Å off the limit for r2SCAN)."""
    grid_response: bool = True
    """Forces include the motion of the grid: exact derivatives at every level, at no measurable cost."""
    conv_tol: float = field(default=1e-10 * HARTREE, metadata={"quantity": "energy"})
    conv_tol_grad: float = 1e-6
    """Norm of the orbital gradient, PySCF's unit."""
    max_cycle: int = 60
    stability: Literal["on_fallback", "always"] = "on_fallback"
    """"on_fallback": after any rung but the first, and below `small_gap`; an analysis costs about four SCFs."""
    small_gap: float = field(default=1.5, metadata={"quantity": "energy"})
    """Gap between occupied and empty orbitals, eV, below which also a plain solution is tested."""
    max_memory: int = 4000
    """MB that PySCF aims at."""

    def __post_init__(self) -> None:
        if self._density_functional == (not self.xc):
            wanted = "xc is missing, for example 'pbe'" if self._density_functional else f"xc = {self.xc!r} has no meaning"
            raise OracleConfigError(f"pyscf: with method = {self.method!r} {wanted}")
        if _DISPERSION_SUFFIX.search(self.xc):
            raise OracleConfigError(
                f"pyscf: xc = {self.xc!r} carries a dispersion correction; write it as dispersion = 'd3bj' or such"
            )
        if self.basis.lower().startswith("gth"):
            raise OracleConfigError(
                f"pyscf: basis = {self.basis!r} needs pseudopotentials of periodic codes; use an all-electron or def2 basis"
            )
        if not 0 <= self.grid_level <= 9:
            raise OracleConfigError(f"pyscf: grid_level goes from 0 to 9, got {self.grid_level}")

    @property
    def _density_functional(self) -> bool:
        return self.method.endswith("ks")

    @property
    def code(self) -> str:
        """Name and version of PySCF."""
        return f"pyscf {_version('pyscf')}"

    @property
    def capabilities(self) -> Capabilities:
        """Molecules of any charge; other multiplicities than 1 need an unrestricted method."""
        return Capabilities(stress=False, periodic=False, charge=True, spin=self.method in ("uhf", "uks"))

    def physics(self) -> dict[str, Any]:
        """Level of theory and thresholds; options that have no effect are left out; versions as major.minor."""
        facts = asdict(self)
        for name in ("max_cycle", "stability", "small_gap", "max_memory"):
            del facts[name]
        if not self._density_functional:
            del facts["xc"], facts["grid_level"], facts["grid_response"]
        if not self.density_fit:
            del facts["auxiliary_basis"]
        facts["code"] = "pyscf " + ".".join(_version("pyscf").split(".")[:2])
        if self.dispersion:
            facts["dispersion_code"] = _version("pyscf-dispersion")
        return facts

    def check(self, frame: Frames) -> None:
        """Basis, functional, dispersion, charge and spin exist.  Raises: OracleConfigError, EnvironmentProblem without PySCF."""
        _version("pyscf")
        check_capabilities(self, frame)
        self._check_functional()
        self._check_auxiliary_basis(self._molecule(frame))

    def _check_functional(self) -> None:
        from pyscf import dft
        from pyscf.scf.dispersion import DISP_VERSIONS

        if self._density_functional:
            try:
                dft.libxc.parse_xc(self.xc)
            except (KeyError, ValueError, NotImplementedError) as error:
                raise OracleConfigError(f"pyscf does not know xc = {self.xc!r}: {error}") from error
        if self.dispersion:
            _version("pyscf-dispersion")
            if self.dispersion.split(":")[0] not in DISP_VERSIONS:
                raise OracleConfigError(f"dispersion = {self.dispersion!r} is unknown; pyscf knows {', '.join(DISP_VERSIONS)}")

    def _check_auxiliary_basis(self, molecule: Any) -> None:
        from pyscf import df
        from pyscf.lib.exceptions import BasisNotFoundError

        if self.density_fit and self.auxiliary_basis:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    df.addons.make_auxmol(molecule, self.auxiliary_basis)
            except BasisNotFoundError as error:
                raise OracleConfigError(f"pyscf has no auxiliary_basis = {self.auxiliary_basis!r} for these elements") from error

    def _molecule(self, frame: Frames) -> Any:
        from pyscf import gto
        from pyscf.lib.exceptions import BasisNotFoundError

        symbols = [chemical_symbols[z] for z in frame.numbers]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # advice to install another package of basis sets
            try:
                return gto.M(
                    atom=list(zip(symbols, (frame.positions[0] / BOHR).tolist(), strict=True)),
                    unit="Bohr",
                    basis=self.basis,
                    ecp=_core_potentials(self.basis, symbols),
                    charge=frame.charge,
                    spin=frame.multiplicity - 1,
                    max_memory=self.max_memory,
                    verbose=0,
                )
            except BasisNotFoundError as error:
                raise OracleConfigError(f"pyscf has no basis = {self.basis!r} for {sorted(set(symbols))}: {error}") from error
            except RuntimeError as error:
                text = " ".join(str(error).split())
                raise OracleConfigError(
                    f"charge {frame.charge:+d}, multiplicity {frame.multiplicity}: {text}; mend [system]"
                ) from error

    def _mean_field(self, molecule: Any) -> Any:
        from pyscf import dft, scf

        kinds = {"rhf": scf.RHF, "uhf": scf.UHF, "rks": dft.RKS, "uks": dft.UKS}
        mean_field = kinds[self.method](molecule)
        if self._density_functional:
            mean_field.xc = self.xc
            mean_field.grids.level = self.grid_level
        if self.density_fit:
            mean_field = mean_field.density_fit(auxbasis=self.auxiliary_basis or None)
        if self.dispersion:
            mean_field.disp = self.dispersion
        mean_field.conv_tol = self.conv_tol / HARTREE
        mean_field.conv_tol_grad = self.conv_tol_grad
        mean_field.max_cycle = self.max_cycle
        mean_field.chkfile = None
        return mean_field

    def __call__(self, frame: Frames) -> Label:
        """Label one frame from a cold start, so that a label depends on the structure only."""
        self.check(frame)
        solution, rung = self._solve(self._molecule(frame))
        gradient = solution.nuc_grad_method()
        if self._density_functional:
            gradient.grid_response = self.grid_response
        forces = -np.asarray(gradient.kernel()) * HARTREE_PER_BOHR
        evidence = f"mf.converged, rung {rung}, gap {_gap(solution):.2f} eV"
        return make_label(self, frame, float(solution.e_tot) * HARTREE, forces, None, evidence=evidence, rung=rung)

    def _solve(self, molecule: Any) -> tuple[Any, int]:
        """A converged mean field and its rung.  Raises: SCFNotConverged, UnstableState."""
        solution = self._mean_field(molecule)
        solution.kernel()
        rung = 0
        if not solution.converged:
            log.warning("plain SCF not converged in %d cycles; second-order SCF from smeared orbitals follows", self.max_cycle)
            solution, rung = self._second_order(molecule, *self._smeared_orbitals(molecule)), 1
        elif self.stability == "on_fallback" and _gap(solution) >= self.small_gap:
            return solution, rung
        for follow in range(FOLLOWS + 1):
            if not solution.converged:
                raise SCFNotConverged(f"{self._level}: no rung of the ladder converged (the last was {rung}); see the structure")
            orbitals, _, stable, _ = solution.stability(internal=True, external=False, return_status=True)
            if stable:
                self._refuse_broken_symmetry(solution)
                return (solution.undo_soscf() if rung else solution), rung
            if follow < FOLLOWS:
                solution, rung = self._second_order(molecule, orbitals, solution.mo_occ), 2 + follow
        raise UnstableState(f"{self._level}: still not a minimum after an instability was followed {FOLLOWS} times")

    @property
    def _level(self) -> str:
        return f"pyscf {self.method} {self.xc or 'hf'}/{self.basis}"

    def _smeared_orbitals(self, molecule: Any) -> tuple[Array, Array]:
        from pyscf.scf import addons

        smeared = addons.smearing(self._mean_field(molecule), sigma=SMEARING, method="fermi")
        smeared.kernel()
        return smeared.mo_coeff, self._mean_field(molecule).get_occ(smeared.mo_energy, smeared.mo_coeff)

    def _second_order(self, molecule: Any, orbitals: Array, occupation: Array) -> Any:
        solution = self._mean_field(molecule).newton()
        solution.kernel(mo_coeff=orbitals, mo_occ=occupation)
        return solution

    def _refuse_broken_symmetry(self, solution: Any) -> None:
        if self.capabilities.spin:
            return
        *_, stable = solution.stability(internal=False, external=True, return_status=True)
        if not stable:
            raise UnstableState(
                f"{self._level}: the restricted solution is unstable towards an unrestricted one (gap {_gap(solution):.2f} eV): "
                f"a bond breaks or the state is a diradical; use method = 'u{self.method[1:]}' for the whole run, or keep off such structures"
            )


def _gap(solution: Any) -> float:
    """Smallest gap between occupied and empty orbitals of one spin, eV; infinite when none is empty."""
    gaps = [np.inf]
    for energy, occupation in zip(np.atleast_2d(solution.mo_energy), np.atleast_2d(solution.mo_occ), strict=True):
        occupied = occupation > 0
        if occupied.any() and not occupied.all():
            gaps.append(float(energy[~occupied].min() - energy[occupied].max()) * HARTREE)
    return min(gaps)


def _core_potentials(basis: str, symbols: list[str]) -> dict[str, str]:
    """The effective core potentials that belong to a basis.

    PySCF adds none by itself: iodine in def2-SVP would be computed with all its electrons in a valence basis.
    """
    from pyscf.gto.basis import load_ecp
    from pyscf.lib.exceptions import BasisNotFoundError

    found = {}
    for symbol in sorted(set(symbols)):
        # RuntimeError: the name is no potential, and gto.M will say whether it is a basis
        with contextlib.suppress(BasisNotFoundError, KeyError, RuntimeError):
            if load_ecp(basis, symbol):
                found[symbol] = basis
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        extra = "'bnn-driver[pyscf]'" if package == "pyscf" else package
        raise EnvironmentProblem(f"the oracle pyscf needs the package {package}: pip install {extra}") from None
