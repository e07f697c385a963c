"""Tight binding fails loudly and knows charge, spin and cell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase.build import molecule

from bnn_driver.errors import OracleConfigError
from bnn_driver.oracle import label, load_oracle
from bnn_driver.records import Frames
from bnn_driver.units import BOHR, HARTREE

pytest.importorskip("tblite")

WATER = Frames(molecule("H2O").numbers, molecule("H2O").positions[None])


def test_the_energy_is_the_documented_one() -> None:
    """The example in tblite's own documentation: 16 atoms, positions in bohr, -31.716159156026254 hartree."""
    numbers = np.array([1, 1, 6, 5, 1, 15, 8, 17, 13, 15, 5, 1, 9, 15, 1, 15])
    positions = np.array(
        [
            [2.79274810283778, 3.82998228828316, -2.79287054959216],
            [-1.43447454186833, 0.43418729987882, 5.53854345129809],
            [-3.26268343665218, -2.50644032426151, -1.56631149351046],
            [2.14548759959147, -0.88798018953965, -2.24592534506187],
            [-4.30233097423181, -3.93631518670031, -0.48930754109119],
            [0.06107643564880, -3.82467931731366, -2.22333344469482],
            [0.41168550401858, 0.58105573172764, 5.56854609916143],
            [4.41363836635653, 3.92515871809283, 2.57961724984000],
            [1.33707758998700, 1.40194471661647, 1.97530004949523],
            [3.08342709834868, 1.72520024666801, -4.42666116106828],
            [-3.02346932078505, 0.04438199934191, -0.27636197425010],
            [1.11508390868455, -0.97617412809198, 6.25462847718180],
            [0.61938955433011, 2.17903547389232, -6.21279842416963],
            [-2.67491681346835, 3.00175899761859, 1.05038813614845],
            [-4.13181080289514, -2.34226739863660, -3.44356159392859],
            [2.85007173009739, -2.64884892757600, 0.71010806424206],
        ]
    )
    result = label(load_oracle("tblite", {}), Frames(numbers, positions[None] * BOHR))
    # the documented number was computed with accuracy 1, ours with 0.1
    assert result.energy / HARTREE == pytest.approx(-31.716159156026254, abs=1e-6)


@pytest.mark.parametrize("state", [{"charge": 1}, {"multiplicity": 2}, {"charge": -1, "multiplicity": 3}])
def test_impossible_spins_are_refused(state: dict[str, int]) -> None:
    with pytest.raises(OracleConfigError, match="cannot have multiplicity"):
        load_oracle("tblite", {}).check(replace(WATER, **state))


def test_elements_beyond_radon_are_refused() -> None:
    with pytest.raises(OracleConfigError, match=r"1 to 86.*92"):
        load_oracle("tblite", {}).check(Frames(np.array([92]), np.zeros((1, 1, 3))))


def test_a_large_cell_gives_the_molecule() -> None:
    oracle = load_oracle("tblite", {})
    boxed = label(oracle, replace(WATER, cell=np.eye(3)[None] * 30.0))
    alone = label(oracle, WATER)
    # the dipoles of the images are left: about 1 D² / (30 Å)^3 = 1e-4 eV
    assert boxed.energy == pytest.approx(alone.energy, abs=1e-3)
    np.testing.assert_allclose(boxed.forces, alone.forces, atol=2e-3)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    label(load_oracle("tblite", {}), WATER)
    assert capfd.readouterr() == ("", "")


def test_thresholds_that_mean_nothing_are_refused() -> None:
    with pytest.raises(OracleConfigError, match="positive"):
        load_oracle("tblite", {"accuracy": 0.0})
