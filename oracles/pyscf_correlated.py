"""MP2, CCSD and CCSD(T) of molecules on a converged Hartree-Fock state: energy, gradient, and what says that each step converged.

In PySCF 2.14 gradients with density fitting are missing (MP2) or silently not those of the energy (coupled cluster, issue 3425), so
the reference is without.  The unrestricted CCSD(T) gradient is wrong there by up to 4e-4 hartree/bohr (issue 3305: one block of its
density matrix counts twice); here that block is built anew.  PySCF stops the response of the orbitals at a residual of 3e-7: next
to another state (triplet water) that leaves 0.15 meV/Å in the forces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bnn_driver.errors import OracleConfigError, SCFNotConverged
from bnn_driver.records import Array

Theory = Literal["", "mp2", "ccsd", "ccsd(t)"]
ENERGY = 1e-9
"""Hartree; PySCF's own 1e-7 leaves noise in finite differences."""
AMPLITUDES = 1e-7
"""Norm of the change of the amplitudes, and of those of the lambda equations."""


@dataclass(frozen=True, eq=False)
class Correlated:
    """A correlated energy with its derivative."""

    energy: float
    """Hartree."""
    gradient: Array
    """(A, 3) hartree/bohr."""
    evidence: str


def check_orbitals(molecule: Any, theory: Theory, frozen_core: bool) -> None:
    """Both spins have electrons to correlate and orbitals to excite them to.  Args: molecule: a Mole.   Raises: OracleConfigError."""
    frozen = _frozen(molecule, frozen_core) or 0
    for electrons in molecule.nelec:
        if electrons <= frozen or electrons >= molecule.nao:
            raise OracleConfigError(
                f"correlation = {theory!r}: {electrons} electrons of one spin, {frozen} of them frozen, in {molecule.nao} orbitals "
                "leave nothing to correlate; use a larger basis, or frozen_core = false, or no correlation"
            )


def _frozen(molecule: Any, frozen_core: bool) -> int | None:
    from pyscf.data import elements

    return (elements.chemcore(molecule) or None) if frozen_core else None


def correlated(mean_field: Any, theory: Theory, frozen_core: bool, max_cycle: int) -> Correlated:
    """Energy and gradient of a theory on a converged RHF or UHF state, without density fitting.

    Args: frozen_core: leave out the core orbitals.   max_cycle: of the amplitudes, and of lambda.
    Raises: SCFNotConverged when the amplitudes, lambda or the coupled-perturbed equations do not converge.
    """
    frozen = _frozen(mean_field.mol, frozen_core)
    try:
        if theory == "mp2":
            return _moller_plesset(mean_field, frozen)
        return _coupled_cluster(mean_field, theory, frozen, max_cycle)
    except RuntimeError as error:
        if "converge" not in str(error):
            raise
        raise SCFNotConverged(f"pyscf {theory}: response of the orbitals: {error}") from error


def _moller_plesset(mean_field: Any, frozen: int | None) -> Correlated:
    from pyscf import mp

    method = mp.MP2(mean_field, frozen=frozen)
    method.kernel()  # on converged orbitals a formula; the solver of the coupled-perturbed equations raises when it fails
    return Correlated(float(method.e_tot), np.asarray(method.nuc_grad_method().kernel()), "MP2, response converged")


def _coupled_cluster(mean_field: Any, theory: Theory, frozen: int | None, max_cycle: int) -> Correlated:
    from pyscf import cc

    method = cc.CCSD(mean_field, frozen=frozen)
    method.conv_tol, method.conv_tol_normt, method.max_cycle = ENERGY, AMPLITUDES, max_cycle
    integrals = method.ao2mo()
    method.kernel(eris=integrals)
    if not method.converged:
        raise SCFNotConverged(f"pyscf {theory}: the amplitudes did not converge in {max_cycle} cycles; look at the structure")
    if theory == "ccsd":
        gradient = _gradient(method, integrals, max_cycle)
        return Correlated(float(method.e_tot), gradient, "CCSD and lambda converged")
    energy = float(method.e_tot) + float(method.ccsd_t(eris=integrals))
    return Correlated(energy, _gradient_with_triples(method, integrals, max_cycle), "CCSD and lambda of CCSD(T) converged")


def _gradient(method: Any, integrals: Any, max_cycle: int) -> Array:
    method.solve_lambda(eris=integrals)
    _check_lambda(bool(method.converged_lambda), "ccsd", max_cycle)
    return np.asarray(method.nuc_grad_method().kernel(eris=integrals))


def _gradient_with_triples(method: Any, integrals: Any, max_cycle: int) -> Array:
    from pyscf.cc import ccsd_t_lambda, uccsd_t_lambda
    from pyscf.grad import ccsd_t

    unrestricted = isinstance(method.t1, tuple)
    solver = uccsd_t_lambda if unrestricted else ccsd_t_lambda
    t = method.t1, method.t2
    converged, *multipliers = solver.kernel(method, integrals, *t, max_cycle=max_cycle, tol=AMPLITUDES, verbose=0)
    _check_lambda(bool(converged), "ccsd(t)", max_cycle)
    if not unrestricted:
        return np.asarray(ccsd_t.Gradients(method).kernel(*t, *multipliers, eris=integrals))
    return _unrestricted_gradient_with_triples(method, (*t, *multipliers), integrals)


def _unrestricted_gradient_with_triples(method: Any, amplitudes: tuple[Any, ...], integrals: Any) -> Array:
    from pyscf.cc import uccsd_t_rdm
    from pyscf.grad import uccsd

    one = uccsd_t_rdm._gamma1_intermediates(method, *amplitudes, integrals, for_grad=True)
    two = list(uccsd_t_rdm._gamma2_intermediates(method, *amplitudes, integrals))
    alpha, mixed, _, beta = two[1]
    two[1] = (_packed(alpha), _packed(mixed), None, _packed(beta))
    gradient = uccsd.Gradients(method)
    electronic = uccsd.grad_elec(gradient, *amplitudes, integrals, d1=one, d2=two, verbose=0)
    return np.asarray(electronic) + np.asarray(gradient.grad_nuc())


def _packed(block: Array) -> Array:
    """The symmetric part of a block of virtual pairs, lower triangles only.  Args: (a, a, b, b).   Returns: (aa, bb)."""
    rows, columns = np.tril_indices(block.shape[0]), np.tril_indices(block.shape[2])
    symmetric = (block + block.transpose(1, 0, 2, 3)) / 2
    return np.ascontiguousarray(symmetric[rows][:, *columns])


def _check_lambda(converged: bool, theory: str, max_cycle: int) -> None:
    if not converged:
        raise SCFNotConverged(
            f"pyscf {theory}: the lambda equations did not converge in {max_cycle} cycles; look at the structure"
        )
