from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from awkward import FINGERPRINT, assert_same, make_label

from bnn_driver.errors import BnnError, EnvironmentProblem, OracleInconsistent
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.labelfile import decode, encode


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("atoms", [1, 7])
def test_a_label_comes_back_bit_by_bit(tmp_path: Path, periodic: bool, atoms: int) -> None:
    for seed in range(5):
        item = make_label(seed, atoms=atoms, periodic=periodic)
        assert LabelStore(tmp_path).write(item) == seed
        assert_same(LabelStore(tmp_path).read(seed), item)


def test_any_context_comes_back_with_its_types() -> None:
    item = make_label(0)
    context = {
        "a": "12345", "b": "1e5", "c": "T", "d": "", "e": "line\nbreak é \"'\\={[", "f": "_JSON [1]", "g": None, "h": 3,
        "i": -2.0, "j": True, "k": float("inf"), "l": [1, "x"], "m": {"y": 1},
        "n": np.arange(6).reshape(2, 3), "o": np.zeros(5), "p": -0.0,
    }  # fmt: skip
    back = decode(encode(replace(item, context=context))).context
    assert_same(back, context)
    assert np.signbit(back["p"])


def test_ase_reads_the_same_numbers(tmp_path: Path) -> None:
    item = make_label(3, periodic=True)
    store = LabelStore(tmp_path)
    store.write(item)
    store.write(make_label(4, periodic=True))
    atoms = ase.io.read(store.path(0))
    assert np.array_equal(atoms.positions, item.frame.positions[0])
    assert np.array_equal(atoms.cell.array, item.frame.cell[0])
    assert np.array_equal(atoms.arrays["REF_forces"], item.label.forces)
    assert np.array_equal(np.reshape(atoms.info["REF_stress"], (3, 3)), item.label.stress)
    assert atoms.info["REF_energy"] == item.label.energy
    assert atoms.info["charge"] == -1
    assert atoms.info["code"] == item.label.code
    assert np.array_equal(atoms.arrays["predicted_forces"], item.context["predicted_forces"])
    assert atoms.pbc.all()
    store.export_extxyz(tmp_path / "train.extxyz")
    both = ase.io.read(tmp_path / "train.extxyz", index=":")
    assert [a.info["step"] for a in both] == [item.context["step"], store.read(1).context["step"]]


def test_one_frame_has_one_file_whoever_writes_it(tmp_path: Path) -> None:
    one, other = LabelStore(tmp_path), LabelStore(tmp_path)
    assert one.write(make_label(0)) == 0
    assert other.write(make_label(1)) == 1, "the other process has seen number 0"
    assert other.write(make_label(0)) == 0
    assert one.write(make_label(1)) == 1
    assert len(list(tmp_path.glob("*.extxyz"))) == len(one) == len(other) == 2


def test_labels_of_others_appear_with_refresh(tmp_path: Path) -> None:
    reader, writer = LabelStore(tmp_path), LabelStore(tmp_path)
    for seed in range(3):
        writer.write(make_label(seed))
    assert (len(reader), reader.all()) == (0, [])
    assert reader.refresh() == 3
    assert reader.refresh() == 0
    assert [item.label.frame_id for item in reader.all()] == [make_label(seed).label.frame_id for seed in range(3)]
    assert reader.all()[1] is reader.read(1)


def test_a_writer_killed_before_any_system_call_leaves_whole_labels_without_gaps(tmp_path: Path, killed_at: Callable) -> None:
    attempts = 0
    for k in range(30):
        attempts += 1
        if not killed_at(lambda k=k: LabelStore(tmp_path).write(make_label(k)), k):
            break
    else:
        pytest.fail("the writer never finished")
    store = LabelStore(tmp_path)
    assert attempts > 3
    assert sorted(p.name for p in tmp_path.glob("*.extxyz")) == [f"{n:06d}.extxyz" for n in range(len(store))]
    assert not list(tmp_path.glob(".*.tmp"))
    assert store.write(make_label(999)) == len(store) - 1


def test_find_is_by_structure_and_level_of_theory(tmp_path: Path) -> None:
    store = LabelStore(tmp_path)
    items = [make_label(seed, periodic=True) for seed in range(4)]
    for item in items:
        store.write(item)
    frame = items[2].frame
    moved = replace(frame, positions=frame.positions.copy())
    moved.positions[0, 1, 2] += 5e-7
    assert store.find(moved, FINGERPRINT, 1e-6) is store.read(2)
    assert store.find(moved, FINGERPRINT, 1e-7) is None
    assert store.find(moved, "another", 1e-6) is None
    assert store.find(replace(moved, charge=0), FINGERPRINT, 1e-6) is None
    assert store.find(replace(moved, cell=frame.cell + 1e-3), FINGERPRINT, 1e-6) is None
    assert store.find(replace(moved, cell=None), FINGERPRINT, 1e-6) is None
    assert store.find(replace(moved, numbers=frame.numbers[::-1]), FINGERPRINT, 1e-6) is None
    assert store.find(make_label(77, atoms=2).frame, FINGERPRINT, 1e9) is None


def test_find_takes_the_nearest_of_many(tmp_path: Path) -> None:
    store = LabelStore(tmp_path)
    item = make_label(0)
    for n, shift in enumerate([3e-4, 1e-4, 2e-4]):
        frame = replace(item.frame, positions=item.frame.positions + shift)
        store.write(replace(item, frame=frame, label=replace(item.label, frame_id=f"f{n}")))
    found = store.find(item.frame, FINGERPRINT, 1e-3)
    assert found is store.read(1)


def test_labels_that_are_not_numbers_are_never_stored(tmp_path: Path) -> None:
    item = make_label(0)
    bad_forces = item.label.forces.copy()
    bad_forces[0, 0] = np.nan
    for label in (
        replace(item.label, forces=bad_forces),
        replace(item.label, energy=float("inf")),
        replace(item.label, forces=item.label.forces[1:]),
    ):
        with pytest.raises(OracleInconsistent, match="is not stored"):
            LabelStore(tmp_path).write(replace(item, label=label))
    for key in ("REF_energy", "two words", "frame_id"):
        with pytest.raises(BnnError, match="cannot name a fact"):
            LabelStore(tmp_path).write(replace(item, context={key: 1}))
    assert len(LabelStore(tmp_path)) == 0


def test_a_file_cut_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    store = LabelStore(tmp_path)
    store.write(make_label(0, atoms=2))
    whole = store.path(0).read_bytes()
    for cut in range(0, len(whole), 7):
        store.path(0).write_bytes(whole[:cut])
        with pytest.raises(EnvironmentProblem, match=r"000000\.extxyz is no label"):
            LabelStore(tmp_path)
    with pytest.raises(EnvironmentProblem, match="there is no label 5"):
        store.read(5)


def test_a_store_can_be_read_without_the_right_to_write(tmp_path: Path) -> None:
    LabelStore(tmp_path).write(make_label(0))
    (tmp_path / ".lock").unlink()
    tmp_path.chmod(0o500)
    try:
        assert len(LabelStore(tmp_path)) == 1
    finally:
        tmp_path.chmod(0o700)
