"""Units and the sign of the virial, proved: our client and an analytic potential against i-PI with its own drivers.

The reference for the virial is ASE's LennardJones inside i-PI (<ffdirect>, i-PI's own ASE driver and unit conversions), in a
triclinic box under a flexible barostat, where every component of the virial moves the cell.  i-PI rounds its constants
(1 Å = 1.8897261 bohr), which our eV and Å cannot see: the toy's σ and ε are those constants' values, so that both sides are
one potential in atomic units.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harness import NVE, Setup, client_of, columns, running
from toys import Harmonic, PeriodicLennardJones

from bnn_driver.ipi.client import Reply, Request
from bnn_driver.ipi.simulation import IpiProcess
from bnn_driver.units import BOHR, HARTREE

pytestmark = [pytest.mark.ipi, pytest.mark.timeout(90)]

TEMPLATE = Path(__file__).parents[2] / "ipi_inputs" / "argon.xyz"
ANGSTROM, ELECTRONVOLT = 1.8897261 * BOHR, 0.036749326 * HARTREE  # i-PI's units in ours
EPSILON, SIGMA, ONSET, CUTOFF = 0.05, 4.6, 6.0, 7.5  # strong and compressed: kbar, so that the cell moves
STEPS = 25
FREE = "<fixcom> False </fixcom>"  # an external potential moves the centre of mass; removing that costs energy at first order

PES = f"""
from ase.calculators.lj import LennardJones
from ipi.pes._ase import ASEDriver

__DRIVER_NAME__ = "lj"
__DRIVER_CLASS__ = "Lj"


class Lj(ASEDriver):
    def check_parameters(self):
        super().check_parameters()
        self.template_ase.pbc = True
        self.ase_calculator = LennardJones(epsilon={EPSILON}, sigma={SIGMA}, ro={ONSET}, rc={CUTOFF}, smooth=True)
"""
FLEXIBLE = """<dynamics mode='npt'><timestep units='femtosecond'> 2 </timestep>
  <barostat mode='flexible'><tau units='femtosecond'> 100 </tau>
    <thermostat mode='langevin'><tau units='femtosecond'> 50 </tau></thermostat></barostat>
  <thermostat mode='langevin'><tau units='femtosecond'> 50 </tau></thermostat></dynamics>"""
PRESSURE = "<pressure units='bar'> 1 </pressure>"
OUTPUT = (
    "<properties stride='1' filename='out'> [step, conserved, potential, volume, cell_h, stress_md, temperature] </properties>"
)


def toy() -> PeriodicLennardJones:
    return PeriodicLennardJones(EPSILON * ELECTRONVOLT, SIGMA * ANGSTROM, ONSET * ANGSTROM, CUTOFF * ANGSTROM)


def setup(dynamics: str, ensemble: str = "") -> Setup:
    return Setup(steps=STEPS, dynamics=dynamics, ensemble=ensemble, output=OUTPUT, structure=TEMPLATE.read_text())


def reference(settings: Setup, folder: Path, forcefield: str) -> np.ndarray:
    """The same input with a forcefield inside i-PI."""
    process = IpiProcess(replace(settings, forcefield=forcefield).write(folder), folder / "run", folder / "ipi.log")
    (folder / "run").mkdir()
    (folder / "run" / "lj_pes.py").write_text(PES)
    (folder / "run" / "input.xml").write_text((folder / "user.xml").read_text())
    (folder / "run" / "init.xyz").write_text(settings.structure)
    process._spawn(folder / "run" / "input.xml")  # without a socket there is nothing for our reader
    assert process.wait(60.0), process.tail(20)
    return columns(folder)


def ours(settings: Setup, folder: Path, handler: object) -> np.ndarray:
    with running(settings, folder) as (process, effective):
        assert client_of(effective, handler).serve() == "exit"  # type: ignore[arg-type]
        assert process.wait(30.0)
    return columns(folder)


@pytest.fixture(scope="module")
def npt_reference(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """i-PI with its own ASE driver."""
    forcefield = (
        "<ffdirect name='ff0' pbc='false'><pes> custom </pes><pes_path> lj_pes.py </pes_path>"
        "<parameters>{template: init.xyz}</parameters></ffdirect>"
    )
    rows = reference(setup(FLEXIBLE, PRESSURE), tmp_path_factory.mktemp("reference"), forcefield)
    assert np.ptp(rows[:, 3]) > 0.02 * rows[0, 3]  # the cell did move
    assert np.abs(rows[-1, 5:10] - rows[0, 5:10]).max() > 1e-3  # and so did its shape
    return rows


def test_flexible_npt_follows_ipis_own_driver(tmp_path: Path, npt_reference: np.ndarray):
    rows = ours(setup(FLEXIBLE, PRESSURE), tmp_path, toy())
    # 1e-8 of each column's size: 1e-15 of rounding, grown over 25 steps of a chaotic cluster
    np.testing.assert_allclose(rows, npt_reference, rtol=1e-8, atol=1e-8 * np.abs(npt_reference).max())


def test_virial_of_the_other_sign_would_be_seen(tmp_path: Path, npt_reference: np.ndarray):
    right = toy()

    def wrong(request: Request) -> Reply:
        reply = right(request)
        return replace(reply, virial=-reply.virial)

    rows = ours(setup(FLEXIBLE, PRESSURE), tmp_path, wrong)
    assert abs(rows[-1, 3] / npt_reference[-1, 3] - 1) > 0.01


def test_nve_of_a_cluster_follows_ipis_own_lennard_jones(tmp_path: Path):
    """Energies and forces alone, in atomic units on i-PI's side (<fflj>)."""
    settings = setup("<dynamics mode='nve'><timestep units='femtosecond'> 4 </timestep></dynamics>")
    epsilon, sigma = 0.002, 8.5  # hartree, bohr
    forcefield = f"<fflj name='ff0' pbc='false'><parameters>{{eps: {epsilon}, sigma: {sigma}}}</parameters></fflj>"
    expected = reference(settings, tmp_path / "reference", forcefield)

    def cluster(request: Request) -> Reply:
        d = request.positions[:, None] - request.positions[:, :, None]  # from i to j
        r2 = (d**2).sum(axis=-1) + np.where(np.eye(d.shape[1], dtype=bool), np.inf, 0.0)
        s6 = ((sigma * BOHR) ** 2 / r2) ** 3
        forces = (-24 * epsilon * HARTREE * ((2 * s6**2 - s6) / r2)[..., None] * d).sum(axis=2)
        energy = 2 * epsilon * HARTREE * (s6**2 - s6).sum(axis=(1, 2))
        return Reply(energy, forces, np.zeros((len(d), 3, 3)), ["{}"] * len(d))

    rows = ours(settings, tmp_path / "ours", cluster)
    assert np.ptp(expected[:, 2]) > 1e-4  # hartree: it moves
    np.testing.assert_allclose(rows[:, :4], expected[:, :4], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(rows[:, -1], expected[:, -1], rtol=1e-9)


def test_error_of_the_conserved_energy_falls_with_the_square_of_the_timestep(tmp_path: Path):
    spread = []
    for dt in (0.4, 0.2):  # fs; the fastest period is 29 fs (H, k = 5 eV/Å^2)
        settings = Setup(steps=round(30 / dt), dynamics=NVE.replace("0.5", str(dt)) + FREE)
        rows = ours(settings, tmp_path / str(dt), Harmonic(5.0))
        assert np.ptp(rows[:, 2]) > 1.0  # eV goes from potential to kinetic
        spread.append(np.ptp(rows[:, 1]))
    assert spread[0] < 0.1
    assert spread[0] / spread[1] == pytest.approx(4.0, rel=0.05)  # velocity Verlet; higher orders add (ω dt)² = 1 %
