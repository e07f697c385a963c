"""Hartree-Fock, density functional theory, MP2 and coupled cluster of molecules with PySCF, one thread per process.

How a state is brought to convergence, and proven to be a minimum, stands in `pyscf_ladder`; crystals are in `pyscf_periodic`.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from ase.data import chemical_symbols

from bnn_driver.errors import OracleConfigError
from bnn_driver.oracle import Capabilities, check_capabilities, make_label
from bnn_driver.records import Frames, Label
from bnn_driver.units import BOHR, HARTREE, HARTREE_PER_BOHR
from oracles import pyscf_dispersion
from oracles.pyscf_correlated import AMPLITUDES, ENERGY, Correlated, Theory, check_orbitals, correlated
from oracles.pyscf_ladder import EXCHANGE_GAP, Ladder, LastDensity, on_host, without_checkpoint
from oracles.pyscf_settings import (
    check_functional,
    check_gpu,
    check_spelling_of_functional,
    exact_exchange,
    is_nonlocal,
    refused_basis,
    refused_state,
    release,
    version,
)


@dataclass(frozen=True)
class PySCF:
    """One level of theory for a whole campaign; charge and multiplicity come with the frame.

    What does not converge, and what converges to no minimum, is refused; so is a restricted solution that would lower its energy by
    becoming unrestricted: one spin-polarised label in a restricted data set makes the surface inconsistent.  For radicals and broken
    bonds use method = "uhf" or "uks" throughout.
    """

    method: Literal["rhf", "uhf", "rks", "uks"]
    basis: str
    xc: str = ""
    """Functional in PySCF's notation, without dispersion; for rks and uks."""
    correlation: Theory = ""
    """"mp2", "ccsd", "ccsd(t)" on top of rhf or uhf; with density_fit = false."""
    frozen_core: bool = False
    """The core orbitals are not correlated."""
    dispersion: str = ""
    """"d3bj", "d3zero", "d4" ..., or "d4:FUNCTIONAL" where the package names it in another way: needs pyscf-dispersion.  It takes the
    place of the VV10 of a functional: xc = "wb97m_v" with "d3bj:wb97m" is ωB97M-D3(BJ)."""
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
    """Of the SCF; at least that many, and 100, for coupled cluster."""
    stability: Literal["on_fallback", "always"] = "on_fallback"
    """"on_fallback": after any rung but the first, and below `small_gap`; an analysis costs about four SCFs."""
    small_gap: float = field(default=1.5, metadata={"quantity": "energy"})
    """Gap between occupied and empty orbitals, eV, below which also a plain solution is tested; 17 eV more for full exact exchange,
    so that Hartree-Fock is tested nearly always."""
    initial_guess: Literal["atoms", "previous"] = "atoms"
    """"previous": begin with the density of the label before.  A tenth to a fifth faster for neighbouring steps, nothing for frames
    20 fs apart, and a label then depends, within the thresholds, on its history."""
    device: Literal["cpu", "gpu"] = "cpu"
    """"gpu": the plain SCF and its gradient run with gpu4pyscf."""
    max_memory: int = 4000
    """MB that PySCF aims at."""

    def __post_init__(self) -> None:
        if self._density_functional == (not self.xc):
            wanted = "xc is missing, for example 'pbe'" if self._density_functional else f"xc = {self.xc!r} has no meaning"
            raise OracleConfigError(f"pyscf: with method = {self.method!r} {wanted}")
        check_spelling_of_functional(self.xc)
        if self.basis.lower().startswith("gth"):
            raise OracleConfigError(
                f"pyscf: basis = {self.basis!r} needs pseudopotentials of periodic codes; use an all-electron or def2 basis, "
                'or kind = "pyscf_periodic"'
            )
        if not 0 <= self.grid_level <= 9:
            raise OracleConfigError(f"pyscf: grid_level goes from 0 to 9, got {self.grid_level}")
        self._check_correlation()

    def _check_correlation(self) -> None:
        if not self.correlation:
            if self.frozen_core:
                raise OracleConfigError(
                    'pyscf: frozen_core = true without correlation has no meaning; set correlation = "mp2" or such'
                )
            return
        said = f"pyscf: correlation = {self.correlation!r}"
        if self._density_functional:
            raise OracleConfigError(f"{said} needs Hartree-Fock, got method = {self.method!r}; use 'rhf' or 'uhf'")
        if self.density_fit:
            raise OracleConfigError(f"{said} has no right gradients with density fitting in PySCF; set density_fit = false")
        if self.dispersion:
            raise OracleConfigError(f"{said} has dispersion of its own; remove dispersion = {self.dispersion!r}")
        if self.device == "gpu":
            raise OracleConfigError(f"{said} runs on the CPU only; set device = 'cpu'")

    @property
    def _density_functional(self) -> bool:
        return self.method.endswith("ks")

    @property
    def code(self) -> str:
        """Name and version of PySCF."""
        return f"pyscf {version('pyscf')}"

    @property
    def capabilities(self) -> Capabilities:
        """Molecules of any charge; other multiplicities than 1 need an unrestricted method."""
        return Capabilities(stress=False, periodic=False, charge=True, spin=self.method in ("uhf", "uks"))

    def physics(self) -> dict[str, Any]:
        """Level of theory and thresholds; options that have no effect are left out; versions as major.minor."""
        facts = asdict(self)
        for name in ("max_cycle", "stability", "small_gap", "initial_guess", "device", "max_memory"):
            del facts[name]
        if not self._density_functional:
            del facts["xc"], facts["grid_level"], facts["grid_response"]
        if not self.density_fit:
            del facts["auxiliary_basis"]
        if self.correlation:
            facts |= {"correlation_tol": ENERGY, "amplitudes_tol": AMPLITUDES}
        else:
            del facts["correlation"], facts["frozen_core"]
        facts["code"] = f"pyscf {release('pyscf')}"
        if self.dispersion:
            facts["dispersion_code"] = version(pyscf_dispersion.PACKAGE)
        return facts

    def check(self, frame: Frames) -> None:
        """Basis, functional, dispersion, device, charge and spin exist.  Raises: OracleConfigError, EnvironmentProblem."""
        self._checked(frame)

    def _checked(self, frame: Frames) -> Any:
        """PySCF's Mole of a frame that all settings fit."""
        version("pyscf")
        check_capabilities(self, frame)
        if self._density_functional:
            check_functional(self.xc)
        if self.device == "gpu":
            check_gpu()
        molecule = self._molecule(frame)
        self._check_auxiliary_basis(molecule)
        if self.correlation:
            check_orbitals(molecule, self.correlation, self.frozen_core)
        if self.dispersion:
            pyscf_dispersion.model(molecule, self.xc or "hf", self.dispersion)
        return molecule

    def _check_auxiliary_basis(self, molecule: Any) -> None:
        from pyscf import df
        from pyscf.lib.exceptions import BasisNotFoundError

        if self.density_fit and self.auxiliary_basis:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    df.addons.make_auxmol(molecule, self.auxiliary_basis)
            except BasisNotFoundError as error:
                raise refused_basis("auxiliary_basis", self.auxiliary_basis, molecule.elements, error) from error

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
                raise refused_basis("basis", self.basis, symbols, error) from error
            except RuntimeError as error:
                raise refused_state(frame.charge, frame.multiplicity, error) from error

    def _mean_field(self, molecule: Any) -> Any:
        from pyscf import dft, scf

        kinds = {"rhf": scf.RHF, "uhf": scf.UHF, "rks": dft.RKS, "uks": dft.UKS}
        mean_field = kinds[self.method](molecule)
        if self._density_functional:
            mean_field.xc = self.xc
            mean_field.grids.level = self.grid_level
            if self.dispersion and is_nonlocal(self.xc):
                mean_field.nlc = False
        if self.density_fit:
            mean_field = mean_field.density_fit(auxbasis=self.auxiliary_basis or None)
        mean_field.conv_tol = self.conv_tol / HARTREE
        mean_field.conv_tol_grad = self.conv_tol_grad
        mean_field.max_cycle = self.max_cycle
        return without_checkpoint(mean_field)

    def _ladder(self, molecule: Any) -> Ladder:
        return Ladder(
            lambda: self._mean_field(molecule),
            level=f"pyscf {self.method} {self.xc or 'hf'}/{self.basis}",
            restricted=not self.capabilities.spin,
            tested=self.stability,
            tested_below=self.small_gap + EXCHANGE_GAP * exact_exchange(self.xc),
            way_out=f"u{self.method[1:]}",
            gpu=self.device == "gpu",
        )

    def __call__(self, frame: Frames) -> Label:
        """Label one frame; from a cold start unless `initial_guess` says otherwise, so that a label depends on the structure only."""
        molecule = self._checked(frame)
        guess = self._last.take(frame) if self.initial_guess == "previous" else None
        solution = self._ladder(molecule).climb(guess)
        result = self._differentiated(solution.mean_field)
        energy, forces = result.energy * HARTREE, -result.gradient * HARTREE_PER_BOHR
        if self.dispersion:
            added = pyscf_dispersion.correction(molecule, self.xc or "hf", self.dispersion)
            energy, forces = energy + added.energy, forces - added.gradient
        if self.initial_guess == "previous":
            self._last.put(frame, on_host(solution.mean_field.make_rdm1()))
        evidence = "; ".join(filter(None, (solution.evidence, result.evidence)))
        return make_label(self, frame, energy, forces, None, evidence=evidence, rung=solution.rung)

    @cached_property
    def _last(self) -> LastDensity:
        return LastDensity()

    def _differentiated(self, mean_field: Any) -> Correlated:
        if self.correlation:
            return correlated(mean_field, self.correlation, self.frozen_core, max(100, self.max_cycle))
        gradient = mean_field.nuc_grad_method()
        if self._density_functional:
            gradient.grid_response = self.grid_response
        return Correlated(float(mean_field.e_tot), np.asarray(on_host(gradient.kernel())), "")


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
