from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from awkward import assert_same

from bnn_driver.errors import BnnError, EnvironmentProblem
from bnn_driver.records import Generation
from bnn_driver.store.weights import label_ids, latest, load, load_latest, prune, publish, settle


def make(number: int) -> Generation:
    rng = np.random.default_rng(number)
    weights = {
        "interactions.0.weight": rng.standard_normal((4, 3, 5)),
        "head": rng.standard_normal((4, 7)).astype(np.float32),
        "scale": np.array(0.1),
        "empty": np.zeros((4, 0)),
    }
    return Generation(number, weights, tuple(f"id{i}" for i in range(number)), {"seed": 3, "losses": [0.1, 1 / 3], "why": "é"})


def test_a_generation_comes_back_bit_by_bit(tmp_path: Path) -> None:
    place = publish(tmp_path, make(0))
    assert place == tmp_path / "000000"
    assert {p.name for p in place.iterdir()} == {"weights.safetensors", "state.json"}
    assert_same(load(tmp_path, 0), make(0))
    assert_same(load_latest(tmp_path), make(0))


def test_strided_and_foreign_arrays_keep_their_values(tmp_path: Path) -> None:
    base = np.arange(24.0).reshape(4, 6)
    weights = {"t": base.T, "every other": base[:, ::2], "big endian": base.astype(">f8"), "fortran": np.asfortranarray(base)}
    publish(tmp_path, Generation(0, weights, ()))
    back = load(tmp_path, 0).weights
    for name, array in weights.items():
        assert np.array_equal(back[name], array), name


def test_current_follows_what_is_published(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    assert load_latest(tmp_path) is None
    for number in range(3):
        publish(tmp_path, make(number))
        assert latest(tmp_path) == number
        assert (tmp_path / "current").read_text() == f"{number}\n"


def test_a_published_generation_is_never_rewritten(tmp_path: Path) -> None:
    for number in range(2):
        publish(tmp_path, make(number))
    publish(tmp_path, make(1))
    with pytest.raises(BnnError, match="generation 1 is current"):
        publish(tmp_path, replace(make(2), number=1))
    assert_same(load_latest(tmp_path), make(1))


def test_a_publisher_killed_before_any_system_call_leaves_the_old_or_the_new(tmp_path: Path, killed_at: Callable) -> None:
    publish(tmp_path, make(0))
    seen = []
    for k in range(40):
        if not killed_at(lambda: publish(tmp_path, make(1)), k):
            break
        number = latest(tmp_path)
        assert number is not None
        assert_same(load(tmp_path, number), make(number))
        seen.append(number)
        if number == 1:  # begin again from the old state
            (tmp_path / "current").write_text("0\n")
    assert seen[0] == 0
    assert len(seen) >= 6
    assert latest(tmp_path) == 1
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "no state", "cut state", "no weights"])
def test_damage_is_named_and_the_generation_before_is_used(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        publish(tmp_path, make(number))
    weights, state = tmp_path / "000002" / "weights.safetensors", tmp_path / "000002" / "state.json"
    content = bytearray(weights.read_bytes())
    if damage == "cut":
        weights.write_bytes(content[:-5])
    elif damage == "flipped bit":
        content[-3] ^= 16
        weights.write_bytes(content)
    elif damage == "no state":
        state.unlink()
    elif damage == "cut state":
        state.write_bytes(state.read_bytes()[:30])
    else:
        weights.unlink()
    with pytest.raises(EnvironmentProblem, match="000002"):
        load(tmp_path, 2)
    with caplog.at_level(logging.WARNING):
        assert_same(load_latest(tmp_path), make(1))
    assert caplog.records
    assert latest(tmp_path) == (2 if damage == "flipped bit" else 1), "only the content shows a flipped bit"


def test_a_lost_current_falls_back_to_the_newest_whole_one(tmp_path: Path) -> None:
    for number in range(3):
        publish(tmp_path, make(number))
    (tmp_path / "current").unlink()
    assert latest(tmp_path) == 2
    for number in range(3):
        (tmp_path / f"{number:06d}" / "weights.safetensors").unlink()
    assert latest(tmp_path) is None
    with pytest.raises(EnvironmentProblem, match="no generation in"):
        load_latest(tmp_path)


def test_pruning_keeps_the_newest_the_foundation_and_the_current(tmp_path: Path) -> None:
    for number in range(7):
        publish(tmp_path, make(number))
    assert prune(tmp_path, keep=3) == (1, 2, 3)
    assert latest(tmp_path) == 6
    (tmp_path / "current").write_text("4\n")
    assert prune(tmp_path, keep=1) == (5,), "0, the current 4 and the newest 6 stay"
    publish(tmp_path, make(5))
    assert prune(tmp_path, keep=0) == (6,), "0, the current 5 and the one before it stay"
    assert_same(load(tmp_path, 0), make(0))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["000000", "000004", "000005"]
    assert prune(tmp_path / "absent", keep=1) == ()


def test_a_state_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BnnError, match="is not JSON"):
        publish(tmp_path, replace(make(0), state={"x": object()}))
    assert latest(tmp_path) is None


def test_after_a_damaged_generation_the_next_update_takes_its_place(tmp_path: Path):
    for number in range(3):
        publish(tmp_path, make(number))
    damaged = tmp_path / "000002" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    undamaged = settle(tmp_path)
    assert undamaged is not None
    assert undamaged.number == latest(tmp_path) == 1
    publish(tmp_path, make(2))
    assert load(tmp_path, 2).number == 2
    assert label_ids(tmp_path, 2) == frozenset(make(2).label_ids)


def test_a_whole_generation_that_was_never_named_becomes_the_current_one(tmp_path: Path):
    publish(tmp_path, make(0))
    (tmp_path / "current").unlink()
    settled = settle(tmp_path)
    assert settled is not None
    assert (tmp_path / "current").read_text() == "0\n"
    assert settle(tmp_path / "absent") is None


def test_a_torn_current_is_not_taken_for_a_smaller_number(tmp_path: Path):
    for number in range(13):
        publish(tmp_path, make(number))
    (tmp_path / "current").write_text("1")  # of "12\n"
    assert latest(tmp_path) == 12
