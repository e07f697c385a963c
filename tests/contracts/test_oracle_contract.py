"""One suite over every oracle: a label is the exact derivative of one energy surface, or there is no label."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnn_driver.errors import GeometryRejected, OracleConfigError
from bnn_driver.oracle import Limits, Oracle, fingerprint, label, label_from_json, label_to_json, load_oracle
from bnn_driver.records import Array, Frames

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:pyscf")]

WATER = Frames(np.array([8, 1, 1]), np.array([[[0.05, -0.02, 0.03], [0.98, 0.07, -0.04], [-0.31, 0.90, 0.11]]]))
ZUNDEL = Frames(
    np.array([8, 8, 1, 1, 1, 1, 1]),
    np.array(
        [
            [
                [-1.19, 0.02, 0.0],
                [1.21, -0.03, 0.02],
                [0.05, 0.08, -0.03],
                [-1.62, 0.75, 0.42],
                [-1.66, -0.81, 0.33],
                [1.68, 0.72, -0.44],
                [1.63, -0.79, -0.38],
            ]
        ]
    ),
    charge=1,
)
TRICLINIC = np.array([[[4.6, 0.3, -0.2], [0.1, 4.4, 0.4], [-0.3, 0.2, 4.9]]])
ROTATION = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]


@dataclass(frozen=True)
class Subject:
    """An oracle with what is known about its numerical noise."""

    kind: str
    settings: dict[str, Any]
    step: float
    """Å, of the finite differences."""
    force_tolerance: float
    """eV/Å: truncation h²F'''/6 plus the code's own noise over h, with a margin of about five on what was measured."""
    invariance: float
    """eV and eV/Å, under rotation, translation and permutation."""
    physics: dict[str, Any]
    """Other values of settings that fix the level of theory."""
    mechanics: dict[str, Any]
    """Other values of settings that do not."""

    def oracle(self, **changes: Any) -> Oracle:
        pytest.importorskip({"toy": "numpy", "socket": "tblite"}.get(self.kind, self.kind))
        return load_oracle(self.kind, self.settings | changes)


TOY = Subject(
    "toy", {}, 1e-4, 2e-6, 1e-9,
    {"depth": "2 eV", "steepness": 2.0, "bending": "1 eV", "cutoff": "5 A"}, {"delay": "1 ms"},
)  # fmt: skip
TBLITE = Subject(
    "tblite", {}, 1e-3, 2e-4, 1e-5,
    {"method": "GFN1-xTB", "accuracy": 1.0, "electronic_temperature": "500 K"}, {"max_iterations": 100},
)  # fmt: skip
PYSCF = Subject(
    "pyscf", {"method": "rhf", "basis": "sto-3g"}, 1e-3, 2e-4, 1e-5,
    {"method": "uhf", "basis": "6-31g", "density_fit": False, "auxiliary_basis": "def2-universal-jkfit",
     "conv_tol": "1e-8 hartree", "conv_tol_grad": 1e-5},
    {"max_cycle": 100, "stability": "always", "small_gap": "1 eV", "max_memory": 2000},
)  # fmt: skip
# tblite behind ASE's i-PI client, in a process of its own
SOCKET = Subject(
    "socket",
    {"command": f"{sys.executable} client.py {{socket}}", "code": "socket tblite", "converged": "stdout.log: charges converged",
     "folder": str(Path(__file__).parents[1] / "oracles" / "inputs" / "tblite"), "templates": ["settings.json", "start.xyz"],
     "box": "0 A", "periodic": True, "stress": True, "environment": {"OMP_NUM_THREADS": "1"}},
    1e-3, 2e-4, 1e-5,
    {"code": "socket other", "command": "client.py {path}", "templates": ["start.xyz"], "box": "30 A", "net_force": "1e-3 eV/A",
     "stress": False},
    {"launcher": "env", "failed": "stdout.log: no", "lines_per_frame": 2, "restart_every": 7, "frame_timeout": "1 min",
     "connect_timeout": "1 min", "evidence_timeout": "1 s", "socket_prefix": "/tmp/x", "environment": {}},
)  # fmt: skip


@pytest.fixture(params=[TOY, TBLITE, SOCKET, pytest.param(PYSCF, marks=pytest.mark.dft)], ids=lambda s: s.kind)
def subject(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.chdir(tmp_path)
    return request.param


def energy(oracle: Oracle, frame: Frames) -> float:
    return label(oracle, frame).energy


def slope(function: Callable[[float], float], step: float) -> float:
    return (function(step) - function(-step)) / (2 * step)


def periodic(frame: Frames) -> Frames:
    return replace(frame, cell=TRICLINIC)


def moved(frame: Frames, atom: int, axis: int, distance: float) -> Frames:
    positions = frame.positions.copy()
    positions[0, atom, axis] += distance
    return replace(frame, positions=positions)


def strained(frame: Frames, row: int, column: int, strain: float) -> Frames:
    deformation = np.eye(3)
    deformation[row, column] += strain
    return replace(frame, positions=frame.positions @ deformation.T, cell=frame.cell @ deformation.T)


def assert_forces_are_slopes(oracle: Oracle, frame: Frames, subject: Subject) -> None:
    forces = label(oracle, frame).forces
    numerical = [
        [-slope(lambda h, a=a, x=x: energy(oracle, moved(frame, a, x, h)), subject.step) for x in range(3)]
        for a in range(len(frame.numbers))
    ]
    np.testing.assert_allclose(forces, numerical, rtol=0, atol=subject.force_tolerance)
    assert np.abs(forces).max() > 100 * subject.force_tolerance


def test_forces_are_minus_the_slope_of_the_energy(subject: Subject) -> None:
    assert_forces_are_slopes(subject.oracle(), WATER, subject)


def test_forces_in_a_triclinic_cell_are_slopes_too(subject: Subject) -> None:
    oracle = subject.oracle()
    if not oracle.capabilities.periodic:
        with pytest.raises(OracleConfigError, match="periodic"):
            label(oracle, periodic(WATER))
        return
    assert_forces_are_slopes(oracle, periodic(WATER), subject)


def test_stress_is_the_slope_by_strain_per_volume(subject: Subject) -> None:
    oracle = subject.oracle()
    if not oracle.capabilities.stress:
        pytest.skip("labels of this oracle carry no stress")
    frame = periodic(WATER)
    volume = abs(np.linalg.det(TRICLINIC[0]))
    numerical = [
        [slope(lambda h, i=i, j=j: energy(oracle, strained(frame, i, j, h)), subject.step) / volume for j in range(3)]
        for i in range(3)
    ]
    stress = label(oracle, frame).stress
    # a strain of h moves atoms by about h * 4 Å in a volume of 100 Å^3: the noise of a force, divided by some 25 Å^2
    np.testing.assert_allclose(stress, numerical, rtol=0, atol=subject.force_tolerance / 10)
    assert np.abs(stress).max() > 50 * subject.force_tolerance / 10


def test_a_cell_is_only_a_choice_of_images(subject: Subject) -> None:
    oracle = subject.oracle()
    if not oracle.capabilities.periodic:
        pytest.skip("molecules only")
    wrapped, away = periodic(WATER), periodic(WATER).positions.copy()
    away[0, 1] += TRICLINIC[0, 0] - 2 * TRICLINIC[0, 2]
    near, far = label(oracle, wrapped), label(oracle, replace(wrapped, positions=away))
    assert near.energy == pytest.approx(far.energy, abs=subject.invariance)
    np.testing.assert_allclose(near.forces, far.forces, atol=subject.invariance)


def test_the_order_of_the_atoms_is_irrelevant(subject: Subject) -> None:
    oracle, order = subject.oracle(), np.array([2, 0, 1])
    plain = label(oracle, WATER)
    shuffled = label(oracle, replace(WATER, numbers=WATER.numbers[order], positions=WATER.positions[:, order]))
    assert shuffled.energy == pytest.approx(plain.energy, abs=subject.invariance)
    np.testing.assert_allclose(shuffled.forces, plain.forces[order], atol=subject.invariance)


@pytest.mark.parametrize(("matrix", "shift"), [(np.eye(3), 7.3), (ROTATION, -2.0)], ids=["translated", "rotated"])
def test_forces_turn_with_the_molecule(subject: Subject, matrix: Array, shift: float) -> None:
    oracle = subject.oracle()
    plain, turned = label(oracle, WATER), label(oracle, replace(WATER, positions=WATER.positions @ matrix.T + shift))
    assert turned.energy == pytest.approx(plain.energy, abs=subject.invariance)
    np.testing.assert_allclose(turned.forces, plain.forces @ matrix.T, atol=subject.invariance)


def test_the_charge_reaches_the_code(subject: Subject) -> None:
    oracle, neutral = subject.oracle(), replace(ZUNDEL, charge=0)
    charged = energy(oracle, ZUNDEL)
    if subject.kind in ("toy", "socket"):  # ASE's interface to tblite takes half electrons
        assert abs(energy(oracle, neutral) - charged) > 1e-3
        return
    with pytest.raises(OracleConfigError, match="multiplicity"):  # an odd number of electrons
        label(oracle, neutral)


def test_the_multiplicity_reaches_the_code(subject: Subject) -> None:
    oracle, triplet = subject.oracle(), replace(WATER, multiplicity=3)
    if not oracle.capabilities.spin:
        with pytest.raises(OracleConfigError, match="multiplicity"):
            label(oracle, triplet)
        return
    assert abs(energy(oracle, triplet) - energy(oracle, WATER)) > 1e-3


def test_one_atom_feels_no_force(subject: Subject) -> None:
    helium = Frames(np.array([2]), np.array([[[0.1, 0.2, 0.3]]]))
    np.testing.assert_allclose(label(subject.oracle(), helium).forces, np.zeros((1, 3)), atol=1e-9)


def test_a_label_depends_on_its_frame_only(subject: Subject) -> None:
    oracle = subject.oracle()
    first = label(oracle, WATER)
    label(oracle, moved(WATER, 1, 0, 0.2))
    again = label(subject.oracle(), WATER)
    assert again.energy == first.energy
    np.testing.assert_array_equal(again.forces, first.forces)


def test_a_label_says_where_it_comes_from(subject: Subject) -> None:
    oracle = subject.oracle()
    result = label(oracle, WATER)
    assert result.code == oracle.code
    assert result.code.split()[0] == subject.kind
    assert result.fingerprint == fingerprint(oracle)
    assert result.frame_id == WATER.content_id(fingerprint(oracle))
    assert result.evidence
    assert result.rung == 0
    assert result.seconds > 0


def test_a_label_survives_json_to_the_last_bit(subject: Subject) -> None:
    oracle = subject.oracle()
    result = label(oracle, periodic(WATER) if oracle.capabilities.periodic else WATER)
    again = label_from_json(label_to_json(result))
    assert again.energy == result.energy
    np.testing.assert_array_equal(again.forces, result.forces)
    assert (again.stress is None) == (result.stress is None)
    if result.stress is not None:
        np.testing.assert_array_equal(again.stress, result.stress)
    assert replace(again, forces=None, stress=None).__dict__ == replace(result, forces=None, stress=None).__dict__


def test_every_setting_is_either_physics_or_mechanics(subject: Subject) -> None:
    plain = subject.oracle()
    names = [fingerprint(subject.oracle(**{key: value})) for key, value in subject.physics.items()]
    assert len({fingerprint(plain), *names}) == len(names) + 1
    for key, value in subject.mechanics.items():
        assert fingerprint(subject.oracle(**{key: value})) == fingerprint(plain), key


def test_the_fingerprint_of_a_default_is_that_of_its_value_spelt_out(subject: Subject) -> None:
    spelt = {
        "toy": {"depth": "3 eV"},
        "tblite": {"electronic_temperature": "300 K"},
        "pyscf": {"conv_tol": "1e-10 hartree"},
        "socket": {"net_force": "0 eV/A", "restart_every": 500},
    }[subject.kind]
    assert fingerprint(subject.oracle(**spelt)) == fingerprint(subject.oracle())


@pytest.mark.parametrize("spoil", ["close", "nan", "batch"])
def test_an_unfit_frame_is_refused_before_it_costs_anything(subject: Subject, spoil: str) -> None:
    oracle = subject.oracle()
    if spoil == "batch":
        with pytest.raises(OracleConfigError, match="batch of 2"):
            label(oracle, WATER[np.array([0, 0])])
        return
    wrong = moved(WATER, 1, 0, -0.85 if spoil == "close" else np.nan)
    with pytest.raises(GeometryRejected, match="H1" if spoil == "close" else "finite"):
        label(oracle, wrong)


def test_absurd_forces_are_refused(subject: Subject) -> None:
    with pytest.raises(GeometryRejected, match="force on atom"):
        label(subject.oracle(), moved(WATER, 1, 0, -0.3), Limits(max_force=1.0))


def test_the_check_passes_what_can_be_labelled(subject: Subject) -> None:
    subject.oracle().check(WATER)
    subject.oracle().check(ZUNDEL)
