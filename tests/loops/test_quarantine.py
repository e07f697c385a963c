"""Frames without a label are kept with the reason, and a code that only fails is not asked for ever."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest

from bnn_driver.errors import (
    EnvironmentProblem,
    OracleConfigError,
    OracleCrashed,
    OracleError,
    OracleTimeout,
    SCFNotConverged,
)
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.quarantine import IN_A_ROW, Breaker, Quarantine, settings_digest
from bnn_driver.records import Frames, Label
from bnn_driver.store.dataset import LabelStore

CONTEXT: dict[str, Any] = {"step": 7, "bead": 2, "criterion": "energy", "audit": False}


def water(shift: float = 0.0, cell: bool = False) -> Frames:
    positions = np.array([[[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0.1 / 3]]]) + shift
    return Frames(np.array([8, 1, 1]), positions, 7.5 * np.eye(3)[None] if cell else None, 1, 2)


class Failing:
    """An executor whose every label fails."""

    def __init__(self, error: OracleError) -> None:
        self.error, self.asked = error, 0

    def submit(self, frame: Frames, *, priority: int = 0) -> Future[Label]:
        self.asked += 1
        future: Future[Label] = Future()
        future.set_exception(self.error)
        return future


def desk(folder: Path, executor: Failing, settings: str = "a") -> Labelling:
    quarantine = Quarantine(folder / "quarantine", settings)
    return Labelling(LabelStore(folder / "labels"), executor, folder / "pending", "theory", None, quarantine)


@pytest.mark.parametrize("cell", [False, True])
def test_the_structure_is_kept_to_the_last_bit_with_the_reason(tmp_path: Path, cell: bool) -> None:
    file = Quarantine(tmp_path / "q", "a").add(water(cell=cell), "f" * 32, CONTEXT, SCFNotConverged('no "rung"\nof two'))
    atoms = ase.io.read(file)
    assert (atoms.positions == water().positions[0]).all()
    assert atoms.pbc.all() == cell
    assert atoms.info["reason"] == "SCFNotConverged"
    assert (atoms.info["charge"], atoms.info["multiplicity"]) == (1, 2)
    if cell:
        assert (atoms.cell.array == water(cell=True).cell[0]).all()


def test_what_only_repeats_is_refused_until_something_changes(tmp_path: Path) -> None:
    executor = Failing(OracleTimeout("killed after 2 s"))
    with pytest.raises(OracleTimeout, match="killed after 2 s"):
        desk(tmp_path, executor).ask([water()], [CONTEXT])
    assert executor.asked == 1
    with pytest.raises(OracleTimeout, match=r"not tried again with the same settings \(killed after 2 s\).*delete") as refused:
        desk(tmp_path, executor).ask([water()], [CONTEXT])
    assert executor.asked == 1
    assert str(tmp_path / "quarantine") in str(refused.value)
    with pytest.raises(OracleTimeout, match=r"^killed"):
        desk(tmp_path, executor, "b").ask([water()], [CONTEXT])
    assert executor.asked == 2
    (record,) = (tmp_path / "quarantine").glob("*.json")
    assert '"count": 2' in record.read_text()
    record.unlink()
    with pytest.raises(OracleTimeout, match=r"^killed"):
        desk(tmp_path, executor, "b").ask([water()], [CONTEXT])


@pytest.mark.parametrize("error", [OracleCrashed("died"), OracleConfigError("no such basis")], ids=["crash", "settings"])
def test_a_crash_is_tried_again_and_wrong_settings_are_not_the_frames_fault(tmp_path: Path, error: OracleError) -> None:
    executor = Failing(error)
    for _ in range(2):
        with pytest.raises(type(error)):
            desk(tmp_path, executor).ask([water()], [CONTEXT])
    assert executor.asked == 2
    kept = list((tmp_path / "quarantine").glob("*.json"))
    assert len(kept) == isinstance(error, OracleCrashed)


def test_a_label_after_all_releases_the_frame(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, "a")
    quarantine.add(water(), "f" * 32, CONTEXT, OracleTimeout("late"))
    restarted = water(1e-8)
    assert quarantine.refusal(restarted)
    assert quarantine.refusal(water(1e-4)) is None
    quarantine.release(restarted)
    assert not list(tmp_path.iterdir())
    assert quarantine.refusal(water()) is None


def test_a_torn_record_is_named(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, "a")
    quarantine.add(water(), "f" * 32, CONTEXT, OracleTimeout("late"))
    for torn in ('{"class": "Or', "{}", "[]", '{"positions": "x"}'):
        quarantine.record("f" * 32).write_text(torn)
        with pytest.raises(EnvironmentProblem, match="f" * 32):
            quarantine.refusal(water())


def test_audits_that_fail_one_after_the_other_end_the_asking(tmp_path: Path) -> None:
    executor, told = Failing(OracleCrashed("died")), []
    labelling = desk(tmp_path, executor)
    for n in range(IN_A_ROW + 1):
        labelling.audit(water(0.1 * n), CONTEXT | {"audit": True, "step": n}, told.append)
        labelling.collect(told.append)
    with pytest.raises(OracleError, match="one after the other"):
        labelling.audit(water(9.0), CONTEXT | {"audit": True, "step": 99}, told.append)
    assert executor.asked == len(told) == IN_A_ROW + 1


def test_failures_between_labels_are_counted_too() -> None:
    breaker = Breaker()
    for n in range(30):
        breaker.count(failed=n % 2 == 1)
        breaker.check()
    breaker.count(failed=True)
    with pytest.raises(OracleError, match="16 of the last 31"):
        breaker.check()


def test_few_failures_among_many_labels_are_allowed() -> None:
    breaker = Breaker()
    for n in range(1000):
        breaker.count(failed=n % 4 == 0)
        breaker.check()


def test_every_setting_counts_and_its_order_does_not() -> None:
    assert settings_digest("toy", {"a": 1, "b": 2}, 3.0) == settings_digest("toy", {"b": 2, "a": 1}, 3.0)
    assert len({settings_digest("toy", {"a": a}, t) for a in (1, 2) for t in (1.0, 2.0)}) == 4
