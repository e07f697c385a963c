"""Density functional theory of crystals with PySCF: GTH pseudopotentials, Gaussians, FFT grid; energy, forces and stress.

Always k-point code, also at Γ: of PySCF 2.14's periodic routes only KRKS and KUKS with LDA or GGA on the FFT
grid have both gradient and stress.  A reference for small cells; for real work a plane-wave code is far faster.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from ase.data import chemical_symbols

from bnn_driver.errors import OracleConfigError, OracleInconsistent
from bnn_driver.oracle import Capabilities, check_capabilities, check_multiplicity, make_label
from bnn_driver.records import Array, Frames, Label
from bnn_driver.units import BOHR, HARTREE, HARTREE_PER_BOHR, volume
from oracles import pyscf_dispersion
from oracles.pyscf_ladder import Ladder, LastDensity, without_checkpoint
from oracles.pyscf_settings import (
    check_functional,
    check_spelling_of_functional,
    exact_exchange,
    is_nonlocal,
    refused_basis,
    refused_state,
    release,
    version,
)

NET_FORCE = 0.02
"""eV/Å; a larger sum of all forces says that the mesh is too coarse: the energy then depends on where the atoms are on it."""


@dataclass(frozen=True)
class PySCFPeriodic:
    """One level of theory for crystals, neutral; other multiplicities (of one cell) than 1 need method = "uks"."""

    method: Literal["rks", "uks"]
    xc: str
    """LDA or GGA in PySCF's notation, such as "pbe"."""
    basis: str
    """A basis that belongs to the pseudopotentials, such as "gth-dzvp"."""
    pseudopotential: str
    """Such as "gth-pbe"; it should be made for the functional."""
    kpoints: list[int] = field(default_factory=lambda: [1, 1, 1])
    """Of a mesh that has Γ."""
    ke_cutoff: float = field(default=0.0, metadata={"quantity": "energy"})
    """eV, plane-wave cutoff of the FFT grid; 0: PySCF's estimate from basis and pseudopotentials, exact and slow (hydrogen: 1e6
    points in 50 Å^3).  H2 needs 80 hartree for 2 meV/Å, 120 for 0.1 meV/Å; soft elements less."""
    mesh: list[int] = field(default_factory=list)
    """Points of the FFT grid, odd, in place of ke_cutoff: the same for all cells, so that the energy is smooth where they change."""
    dispersion: str = ""
    """"d3bj", "d3zero", "d4" ...: needs the package pyscf-dispersion."""
    conv_tol: float = field(default=1e-10 * HARTREE, metadata={"quantity": "energy"})
    conv_tol_grad: float = 1e-6
    """Norm of the orbital gradient, PySCF's unit."""
    max_cycle: int = 60
    stability: Literal["on_fallback", "always"] = "on_fallback"
    """"on_fallback": after any rung but the first, and below `small_gap`."""
    small_gap: float = field(default=1.5, metadata={"quantity": "energy"})
    """Gap over all k-points, eV, below which also a plain solution is tested."""
    initial_guess: Literal["atoms", "previous"] = "atoms"
    """"previous": begin with the density of the label before; a label then depends, within the thresholds, on its history."""
    max_memory: int = 4000
    """MB that PySCF aims at; half of it holds the values of the basis functions on the grid."""

    def __post_init__(self) -> None:
        check_spelling_of_functional(self.xc)
        for name, value in (("kpoints", self.kpoints), ("mesh", self.mesh or [1, 1, 1])):
            if len(value) != 3 or min(value) < 1:
                raise OracleConfigError(f"pyscf_periodic: {name} must be three positive numbers, got {value}")
        if self.mesh and self.ke_cutoff:
            raise OracleConfigError("pyscf_periodic: mesh and ke_cutoff say the same; give one of them")
        if self.ke_cutoff < 0:
            raise OracleConfigError(f"pyscf_periodic: ke_cutoff must not be negative, got {self.ke_cutoff} eV")

    @property
    def code(self) -> str:
        """Name and version of PySCF."""
        return f"pyscf {version('pyscf')}"

    @property
    def capabilities(self) -> Capabilities:
        """Crystals with stress; no charge, because the energy of a charged cell depends on conventions."""
        return Capabilities(stress=True, periodic=True, charge=False, spin=self.method == "uks")

    def physics(self) -> dict[str, Any]:
        """Level of theory, grid and thresholds; versions as major.minor."""
        facts = asdict(self)
        for name in ("max_cycle", "stability", "small_gap", "initial_guess", "max_memory"):
            del facts[name]
        facts["code"] = f"pyscf {release('pyscf')}"
        if self.dispersion:
            facts["dispersion_code"] = version(pyscf_dispersion.PACKAGE)
        return facts

    def check(self, frame: Frames) -> None:
        """Functional, basis, pseudopotential, dispersion and spin exist.  Raises: OracleConfigError, EnvironmentProblem."""
        self._checked(frame)

    def _checked(self, frame: Frames) -> Any:
        """PySCF's Cell of a frame that all settings fit."""
        version("pyscf")
        check_capabilities(self, frame)
        if not frame.periodic:
            raise OracleConfigError(
                "pyscf_periodic labels crystals only, but the frame has no cell; use kind = 'pyscf', or put the molecule into a box"
            )
        self._check_functional()
        cell = self._cell(frame)
        check_multiplicity(frame, cell.tot_electrons())
        if self.dispersion:
            pyscf_dispersion.model(cell, self.xc, self.dispersion)
        return cell

    def _check_functional(self) -> None:
        from pyscf import dft

        check_functional(self.xc)
        kind = dft.libxc.xc_type(self.xc)
        if kind not in ("LDA", "GGA") or exact_exchange(self.xc) or is_nonlocal(self.xc):
            what = "a hybrid" if exact_exchange(self.xc) else "non-local" if is_nonlocal(self.xc) else f"a {kind}"
            raise OracleConfigError(
                f"pyscf_periodic: xc = {self.xc!r} is {what}; PySCF has forces and stress of crystals for LDA and GGA only, such as 'pbe'"
            )

    def _cell(self, frame: Frames) -> Any:
        from pyscf.lib.exceptions import BasisNotFoundError
        from pyscf.pbc import gto

        symbols = [chemical_symbols[z] for z in frame.numbers]
        cell = gto.Cell()
        cell.atom = list(zip(symbols, (frame.positions[0] / BOHR).tolist(), strict=True))
        cell.a, cell.unit = frame.cell[0] / BOHR, "Bohr"
        cell.basis, cell.pseudo = self.basis, self.pseudopotential
        cell.spin, cell.verbose, cell.max_memory = frame.multiplicity - 1, 0, self.max_memory
        if self.mesh:
            cell.mesh = self.mesh
        elif self.ke_cutoff:
            cell.ke_cutoff = self.ke_cutoff / HARTREE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                return cell.build()
            except (BasisNotFoundError, KeyError) as error:
                raise refused_basis("basis and pseudopotential", (self.basis, self.pseudopotential), symbols, error) from error
            except RuntimeError as error:
                raise refused_state(frame.charge, frame.multiplicity, error) from error

    def _mean_field(self, cell: Any, integrator: Any) -> Any:
        from pyscf.pbc import dft

        kinds = {"rks": dft.KRKS, "uks": dft.KUKS}
        points = cell.make_kpts(self.kpoints)
        mean_field = kinds[self.method](cell, kpts=points)
        mean_field.xc = self.xc
        mean_field._numint = mean_field.with_df._numint = integrator
        if self.method == "uks":
            # PySCF counts the electrons of all k-points and would spread the spin of one cell over them
            mean_field.nelec = tuple((cell.tot_electrons() + sign * cell.spin) // 2 * len(points) for sign in (1, -1))
        mean_field.conv_tol = self.conv_tol / HARTREE
        mean_field.conv_tol_grad = self.conv_tol_grad
        mean_field.max_cycle = self.max_cycle
        return without_checkpoint(mean_field)

    def _ladder(self, cell: Any) -> Ladder:
        integrator = _remembering(self.max_memory * 5e5)
        return Ladder(
            lambda: self._mean_field(cell, integrator),
            level=f"pyscf_periodic {self.method} {self.xc}/{self.basis}",
            restricted=self.method == "rks",
            tested=self.stability,
            tested_below=self.small_gap,
            way_out="uks",
        )

    def __call__(self, frame: Frames) -> Label:
        """Label one frame; from a cold start unless `initial_guess` says otherwise, so that a label depends on the structure only."""
        cell = self._checked(frame)
        guess = self._last.take(frame) if self.initial_guess == "previous" else None
        solution = self._ladder(cell).climb(guess)
        energy = float(solution.mean_field.e_tot) * HARTREE
        forces, stress = _derivatives(solution.mean_field)
        if self.dispersion:
            added = pyscf_dispersion.correction(cell, self.xc, self.dispersion)
            energy, forces = energy + added.energy, forces - added.gradient
            stress = stress + added.virial / volume(frame.cell[0])
        _refuse_coarse_mesh(forces, cell.mesh)
        if self.initial_guess == "previous":
            self._last.put(frame, np.asarray(solution.mean_field.make_rdm1()))
        mesh = "x".join(str(points) for points in cell.mesh)
        return make_label(self, frame, energy, forces, stress, evidence=f"{solution.evidence}, mesh {mesh}", rung=solution.rung)

    @cached_property
    def _last(self) -> LastDensity:
        return LastDensity()


def _derivatives(mean_field: Any) -> tuple[Array, Array]:
    """Forces (A, 3) eV/Å and stress (3, 3) eV/Å^3.

    `get_stress` gives hartree/bohr^3 with ASE's sign; PySCF's own ASE calculator multiplies it by hartree/bohr, which is wrong.
    """
    gradient = mean_field.nuc_grad_method()
    forces = -np.asarray(gradient.kernel()) * HARTREE_PER_BOHR
    stress = np.asarray(gradient.get_stress()) * HARTREE / BOHR**3
    return forces, (stress + stress.T) / 2


def _refuse_coarse_mesh(forces: Array, mesh: Any) -> None:
    net = float(np.linalg.norm(forces.sum(axis=0)))
    if net > NET_FORCE:
        raise OracleInconsistent(
            f"pyscf_periodic: the forces on the crystal add up to {net:.2g} eV/Å, expected less than {NET_FORCE}: the FFT grid "
            f"{list(mesh)} is too coarse for these pseudopotentials; raise ke_cutoff or mesh"
        )


def _remembering(limit: float) -> Any:
    """PySCF's integration over the grid, with the basis functions evaluated once per label instead of twice per SCF cycle.

    They take 85 % of the time of a label otherwise.   Args: limit: bytes; beyond them nothing more is kept.
    """
    from pyscf.pbc.dft.numint import KNumInt, eval_ao_kpts

    class Remembering(KNumInt):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[bytes, Any] = {}
            self.room = limit

        def eval_ao(self, cell: Any, coords: Array, kpts: Any = None, deriv: int = 0, non0tab: Any = None, **rest: Any) -> Any:
            if rest:
                return eval_ao_kpts(cell, coords, kpts, deriv, non0tab=non0tab, **rest)
            parts = (coords, np.zeros(3) if kpts is None else np.asarray(kpts), np.array(deriv), np.asarray(non0tab))
            key = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).digest()
            if key not in self.kept:
                values = eval_ao_kpts(cell, coords, kpts, deriv, non0tab=non0tab)
                size = sum(value.nbytes for value in values)
                if size > self.room:
                    return values
                self.room -= size
                for value in values:
                    value.flags.writeable = False  # whoever changed them would change them for all cycles
                self.kept[key] = values
            return self.kept[key]

    return Remembering()
