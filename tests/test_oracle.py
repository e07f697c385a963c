"""Oracles are found by name, and what contradicts itself never becomes a label."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list

from bnn_driver.errors import ConfigError, GeometryRejected, OracleConfigError, OracleInconsistent, SCFNotConverged
from bnn_driver.oracle import (
    Capabilities,
    Limits,
    Oracle,
    fingerprint,
    label,
    label_from_json,
    label_to_json,
    load_oracle,
    make_label,
    pairs_within,
    read_done,
    read_failures,
    write_done,
    write_failed,
)
from bnn_driver.records import Frames, Label

WATER = Frames(np.array([8, 1, 1]), np.array([[[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]]))
CUBE = np.eye(3)[None] * 5.0


@dataclass(frozen=True)
class Stub:
    """Returns what a test tells it."""

    spoil: str = ""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(stress=True, periodic=True, charge=False, spin=False)

    @property
    def code(self) -> str:
        return "stub 1"

    def physics(self) -> dict[str, Any]:
        return {"code": self.code}

    def check(self, frame: Frames) -> None:
        pass

    def __call__(self, frame: Frames) -> Label:
        forces = np.array([[1.0, 0, 0], [-0.5, 0, 0], [-0.5, 0, 0]])
        stress = None if frame.cell is None else np.eye(3) * 0.01
        good = make_label(self, frame, -1.0, forces, stress, evidence="told so")
        shear = np.eye(3)
        shear[0, 1] = 0.5
        spoilt: dict[str, dict[str, Any]] = {
            "": {},
            "energy": {"energy": np.nan},
            "forces": {"forces": np.full((3, 3), np.inf)},
            "shape": {"forces": forces[:2]},
            "net": {"forces": forces + 0.01},
            "huge": {"forces": forces * 1000},
            "evidence": {"evidence": ""},
            "other frame": {"frame_id": "0" * 32},
            "no stress": {"stress": None},
            "shear": {"stress": shear},
        }
        return replace(good, **spoilt[self.spoil])


def test_a_sound_result_passes() -> None:
    assert isinstance(Stub(), Oracle)
    assert label(Stub(), WATER).energy == -1.0
    assert label(Stub(), replace(WATER, cell=CUBE)).stress is not None


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("energy", "not finite"),
        ("forces", "not finite"),
        ("shape", r"\(2, 3\) for 3 atoms"),
        ("net", "add up to 0.05"),
        ("evidence", "evidence"),
        ("other frame", "another frame"),
    ],
)
def test_a_result_that_contradicts_itself_is_refused(spoil: str, expected: str) -> None:
    with pytest.raises(OracleInconsistent, match=expected):
        label(Stub(spoil), WATER)


@pytest.mark.parametrize(("spoil", "expected"), [("no stress", "no stress"), ("shear", "not symmetric")])
def test_a_wrong_stress_is_refused(spoil: str, expected: str) -> None:
    with pytest.raises(OracleInconsistent, match=expected):
        label(Stub(spoil), replace(WATER, cell=CUBE))


def test_forces_on_a_crystal_need_not_add_up_to_zero() -> None:
    assert label(Stub("net"), replace(WATER, cell=CUBE)).forces.sum() > 0.01


def test_absurd_forces_are_the_fault_of_the_structure() -> None:
    with pytest.raises(GeometryRejected, match=r"1000\.0 eV/Å"):
        label(Stub("huge"), WATER)


@pytest.mark.parametrize("change", [{"charge": 1}, {"multiplicity": 2}])
def test_what_a_code_cannot_do_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(OracleConfigError, match=r"stub 1"):
        label(Stub(), replace(WATER, **change))


def test_atoms_too_close_through_the_boundary_are_named() -> None:
    positions = WATER.positions.copy()
    positions[0, 1] = [4.7, 0.0, 0.0]
    label(Stub(), replace(WATER, positions=positions))
    with pytest.raises(GeometryRejected, match=r"H1.* 0.300 Å|0.300 Å"):
        label(Stub(), replace(WATER, positions=positions, cell=CUBE))


def test_heavy_atoms_keep_a_share_of_their_covalent_radii() -> None:
    gold = Frames(np.array([79, 79, 1]), np.array([[[0.0, 0, 0], [0, 0, 0.6], [0, 0, 3]]]))
    with pytest.raises(GeometryRejected, match="Au0 and Au1"):
        label(Stub(), gold)
    label(Stub(), gold, Limits(covalent_fraction=0.1))


@pytest.mark.parametrize("cutoff", [1.0, 3.0, 7.5])
def test_pairs_are_those_of_ase_for_any_cell_and_atoms_outside_it(cutoff: float) -> None:
    rng = np.random.default_rng(0)
    cell = np.diag([3.0, 4.0, 5.0]) + rng.normal(0, 0.6, (3, 3))
    positions = rng.uniform(-12, 12, (4, 3))
    i, j, vectors = pairs_within(Frames(np.full(4, 18), positions[None], cell[None]), cutoff)
    wanted = neighbor_list("ijD", Atoms("Ar4", positions=positions, cell=cell, pbc=True), cutoff, self_interaction=False)
    assert len(i) == len(wanted[0])
    assert sorted(zip(i, j, vectors.round(8).tolist(), strict=True)) == sorted(
        zip(*wanted[:2], wanted[2].round(8).tolist(), strict=True)
    )


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'toy'\?.*pyscf.*tblite"):
        load_oracle("toi", {})


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("toy", {"dlay": "1 s"}, r"\[oracle.toy\] unknown key 'dlay'; did you mean 'delay'"),
        ("toy", {"delay": 1.0}, r"delay: the unit is missing"),
        ("toy", {"delay": "1 A"}, r"delay: unknown unit"),
        ("toy", {"steepness": "steep"}, r"steepness: .*number"),
        ("toy", {"steepness": True}, r"steepness: .*number"),
        ("tblite", {"method": "GFN3"}, r"method: .*GFN2-xTB"),
        ("pyscf", {"method": "rks", "xc": "pbe"}, r"basis is missing"),
    ],
)
def test_wrong_settings_name_the_key_and_the_way_out(kind: str, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_oracle(kind, settings)


def test_the_same_physics_in_another_class_has_another_fingerprint() -> None:
    class Other(Stub):
        pass

    assert len(fingerprint(Stub())) == 64
    assert fingerprint(Stub()) == fingerprint(Stub("net"))
    assert fingerprint(Other()) != fingerprint(Stub())


def test_awkward_doubles_survive_json() -> None:
    forces = np.array([[0.1 + 0.2, 1e-308, -0.0], [5e-324, 1 / 3, -1e300], [np.pi, 1e16 + 2, 2**-1074]])
    result = replace(label(Stub(), WATER), energy=-1 / 3, forces=forces)
    again = label_from_json(label_to_json(result))
    assert again.energy == result.energy
    assert again.forces.tobytes() == forces.tobytes()


@pytest.mark.parametrize("text", ["", "[]", '{"energy": 1.0}', '{"energy": 1.0, "forces": [[1'])
def test_half_a_label_is_not_a_label(text: str) -> None:
    with pytest.raises(OracleInconsistent, match="JSON of a label"):
        label_from_json(text)


def test_the_spool_gives_back_what_was_put_in(tmp_path: Path) -> None:
    result = label(Stub(), WATER)
    assert read_done(tmp_path, result.frame_id) is None
    write_done(tmp_path, result)
    again = read_done(tmp_path, result.frame_id)
    assert again is not None
    assert again.forces.tobytes() == result.forces.tobytes()
    assert [p.name for p in (tmp_path / "done").iterdir()] == [f"{result.frame_id}.json"]


def test_a_spoilt_file_in_the_spool_is_named(tmp_path: Path) -> None:
    result = label(Stub(), WATER)
    write_done(tmp_path, result)
    file = tmp_path / "done" / f"{result.frame_id}.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(OracleInconsistent, match=file.name):
        read_done(tmp_path, result.frame_id)


def test_failures_are_counted_and_forgotten_with_success(tmp_path: Path) -> None:
    result = label(Stub(), WATER)
    for _ in range(2):
        write_failed(tmp_path, result.frame_id, SCFNotConverged("no rung"))
    assert read_failures(tmp_path) == {result.frame_id: {"class": "SCFNotConverged", "message": "no rung", "count": 2}}
    write_done(tmp_path, result)
    assert read_failures(tmp_path) == {}
