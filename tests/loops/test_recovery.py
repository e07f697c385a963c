"""A label that is computed while its driver is killed is waited for, also when i-PI's RESTART names its frame anew."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnn_driver.errors import OracleTimeout
from bnn_driver.executors import LocalExecutor, pool
from bnn_driver.executors.claims import is_claimed
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.quarantine import Quarantine
from bnn_driver.oracle import fingerprint, load_oracle, read_done
from bnn_driver.records import Frames
from bnn_driver.store.dataset import LabelStore

THEORY = fingerprint(load_oracle("toy", {}))
#: Å; rounded to the nine digits of RESTART the first atom gets another sixth decimal
WATER = np.array([[10.00000051, 10.0, 10.0], [10.757, 10.586, 10.0], [9.243, 10.586, 10.0]])
CONTEXT = {"step": 7, "bead": 0, "criterion": "energy", "audit": False}
DRIVER = """
import sys
from pathlib import Path
import numpy as np
from bnn_driver.executors import LocalExecutor
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.quarantine import Quarantine
from bnn_driver.records import Frames
from bnn_driver.store.dataset import LabelStore
if __name__ == "__main__":
    folder, theory, positions, context = Path(sys.argv[1]), sys.argv[2], eval(sys.argv[3]), eval(sys.argv[4])
    executor = LocalExecutor("toy", {"delay": "60 s"}, 1, 120.0, folder / "work", 1, folder / "spool")
    desk = Labelling(LabelStore(folder / "labels"), executor, folder / "pending", theory, None, Quarantine(folder / "q", ""))
    desk.ask([Frames(np.array([8, 1, 1]), np.array([positions]))], [context])
"""
WORKER = """
import sys, time
from pathlib import Path
import numpy as np
from bnn_driver.executors.claims import claim
from bnn_driver.oracle import label, load_oracle, write_done
from bnn_driver.records import Frames
folder, positions, seconds, fate = Path(sys.argv[1]), eval(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
oracle, frame = load_oracle("toy", {}), Frames(np.array([8, 1, 1]), np.array([positions]))
result = label(oracle, frame)
with claim(folder / "spool", result.frame_id):
    print("computes", flush=True)
    time.sleep(seconds)
    if fate == "finishes":
        write_done(folder / "spool", result)
"""


def frame_of(positions: np.ndarray) -> Frames:
    return Frames(np.array([8, 1, 1]), positions[None])


def restarted() -> Frames:
    """The frame as i-PI asks for it again by its default format of numbers."""
    return frame_of(np.array([[float(f"{x:16.8e}") for x in row] for row in WATER]))


@dataclass
class Left:
    """What a killed driver left, and where the next one goes on."""

    folder: Path
    name: str
    """Of the frame that it had asked for."""

    @contextmanager
    def worker(self, seconds: float, fate: str = "finishes") -> Iterator[subprocess.Popen[str]]:
        """A worker that outlives its driver by so long."""
        arguments = [str(self.folder), repr(WATER.tolist()), str(seconds), fate]
        process = subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "computes\n"
            yield process
        finally:
            process.kill()
            process.communicate()

    @contextmanager
    def driver(self, delay: float = 0.0, timeout: float = 120.0) -> Iterator[Labelling]:
        """The next start.  Args: delay: s that it would take it to compute a label itself."""
        work, spool = self.folder / "work", self.folder / "spool"
        with LocalExecutor("toy", {"delay": f"{delay} s"}, 1, timeout, work, 1, spool) as executor:
            quarantine = Quarantine(self.folder / "quarantine", "")
            labelling = Labelling(LabelStore(self.folder / "labels"), executor, self.folder / "pending", THEORY, None, quarantine)
            labelling.recover(spool)
            yield labelling
            executor.shutdown(wait=False)

    def computed(self) -> set[str]:
        return {file.stem for file in (self.folder / "spool" / "done").glob("*.json")}

    def pending(self) -> set[str]:
        return {file.stem for file in (self.folder / "pending").glob("*.json")}


@pytest.fixture
def left(tmp_path: Path) -> Left:
    """After kill -9 of a driver that waited for a label."""
    arguments = [str(tmp_path), THEORY, repr(WATER.tolist()), repr(CONTEXT)]
    process = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments])
    name = frame_of(WATER).content_id(THEORY)
    try:
        assert within(60, lambda: is_claimed(tmp_path / "spool", name)), "the driver never asked"
    finally:
        process.kill()
        process.wait()
    assert within(10, lambda: not is_claimed(tmp_path / "spool", name)), "a local worker outlives its driver"
    assert restarted().content_id(THEORY) != name
    return Left(tmp_path, name)


def within(seconds: float, condition: Callable[[], Any]) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def test_a_frame_that_is_still_computed_is_waited_for_though_it_is_asked_with_other_digits(
    left: Left, caplog: pytest.LogCaptureFixture
) -> None:
    with left.worker(3.0) as worker, left.driver(delay=60.0) as driver:
        assert "still computes the frame of step 7" in caplog.text
        assert driver.known(restarted()) is None
        begin = time.monotonic()
        (answer,) = driver.ask([restarted()], [CONTEXT | {"step": 8}])
        assert time.monotonic() - begin < 30, "it was computed anew"
        assert answer is not None
        assert (answer.label.frame_id, answer.context["step"]) == (left.name, 8)
        assert f"pid {worker.pid}" in caplog.text
        assert driver.known(restarted()) is answer
    assert left.computed() == {left.name}
    assert left.pending() == set()


def test_a_label_that_comes_after_the_start_is_found_though_nobody_claimed_it_then(left: Left) -> None:
    with left.driver() as driver:
        with left.worker(0.0) as worker:
            worker.wait()
        (arrived,) = driver.collect(pytest.fail)
        assert arrived.label.frame_id == left.name
        assert not arrived.context["audit"]
        assert driver.known(restarted()) is arrived
        assert driver.collect(pytest.fail) == []
    assert left.computed() == {left.name}
    assert left.pending() == set()


def test_a_worker_that_dies_at_last_is_replaced_and_the_frame_keeps_its_name(left: Left) -> None:
    with left.worker(1.0, fate="dies"), left.driver() as driver:
        (answer,) = driver.ask([restarted()], [CONTEXT])
        assert answer is not None
        assert answer.label.frame_id == left.name
    assert left.computed() == {left.name}


def test_a_frame_that_is_audited_already_is_not_computed_again_when_it_is_asked(left: Left) -> None:
    file = left.folder / "pending" / f"{left.name}.json"
    facts = json.loads(file.read_text())
    facts["scalars"] |= {"audit": True, "criterion": "audit"}
    file.write_text(json.dumps(facts))
    with left.driver(delay=1.0) as driver:
        assert driver.in_flight == 1
        (answer,) = driver.ask([restarted()], [CONTEXT])
        assert answer is not None
        (audit,) = driver.collect(pytest.fail, timeout=30.0)
        assert audit is answer, "one label, asked and audited"
    assert left.computed() == {left.name}
    assert left.pending() == set()


def test_a_process_that_never_ends_is_not_waited_for_without_limit(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "START_LIMIT", 0.5)
    with left.worker(60.0), left.driver(timeout=0.5) as driver:
        with pytest.raises(OracleTimeout, match="by another process"):
            driver.ask([restarted()], [CONTEXT])


def test_at_the_end_what_is_computed_is_waited_for_and_what_nobody_wants_is_forgotten(left: Left) -> None:
    with left.worker(3.0) as worker, left.driver() as driver:
        assert driver.in_flight == 1
        assert driver.collect(pytest.fail, timeout=0.1) == []
        driver.forget_begun()
        assert left.pending() == {left.name}, "it is computed and may come"
        (arrived,) = driver.collect(pytest.fail, timeout=60.0)
        assert arrived.label.frame_id == left.name
        assert worker.wait(10) == 0
        assert driver.in_flight == 0


def test_what_nobody_computes_and_nobody_asks_again_is_forgotten_at_the_end(left: Left) -> None:
    with left.driver() as driver:
        assert driver.in_flight == 0
        assert left.pending() == {left.name}, "i-PI may ask it again"
        driver.forget_begun()
        assert left.pending() == set()
        (answer,) = driver.ask([restarted()], [CONTEXT])
        assert answer is not None
        assert answer.label.frame_id == restarted().content_id(THEORY)
    assert read_done(left.folder / "spool", left.name) is None
