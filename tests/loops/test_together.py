"""Simulations that move at the same time: one prediction for all, each with its own answers; all end when one fails or the run stops."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType

import numpy as np
import pytest

import bnn_driver.loops.together as together_module
from bnn_driver.errors import GuardStop
from bnn_driver.loops.together import Halted, Together
from bnn_driver.records import Frames, Prediction

STEPS = 30


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that move in time are waited for, however slow they are."""
    monkeypatch.setattr(together_module, "WINDOW", 5.0)


def frames(x: float, beads: int, cell: bool = False) -> Frames:
    return Frames(np.array([1]), np.full((beads, 1, 3), x), np.full((beads, 3, 3), x) if cell else None)


class Potential:
    """Two members whose energy is what they are asked about; notes how many structures each call had."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, asked: Frames) -> Prediction:
        self.sizes.append(len(asked))
        x = asked.positions[:, 0, 0]
        if (x == 13).any():
            raise GuardStop("thirteen")
        energy = np.stack([x, 2 * x])
        b = len(asked)
        cells = np.zeros((b, 3, 3)) if asked.cell is None else asked.cell
        return Prediction(energy, np.zeros((2, b, 1, 3)), np.stack([cells, cells]), energy, np.zeros((2, b, 1)), 7)


def walk(together: Together[int], first: int, beads: int = 1, steps: int = STEPS, cell: bool = False) -> Callable[[], int]:
    def run() -> int:
        for step in range(steps):
            found = together.ask(str(first), frames(first + step, beads, cell))
            assert found.energy.tolist() == [[first + step] * beads, [2 * (first + step)] * beads]
            assert found.energy_noise_sd.shape == (2, beads)
            assert found.forces.shape == (2, beads, 1, 3)
            assert (found.virial == (first + step if cell else 0.0)).all()
            assert found.generation == 7
        return first

    return run


def nothing() -> None:
    """What there is to halt."""


@pytest.mark.parametrize("cell", [False, True])
def test_what_is_asked_at_one_moment_is_one_prediction(cell: bool) -> None:
    potential, ended = Potential(), list[int]()
    together: Together[int] = Together(potential)
    together.run({"100": walk(together, 100, 1, cell=cell), "200": walk(together, 200, 4, cell=cell)}, nothing, ended.append)
    assert sorted(ended) == [100, 200]
    assert sum(potential.sizes) == 5 * STEPS
    assert 5 in potential.sizes, "they came to move in time"


def test_one_that_is_done_or_alone_waits_for_nobody() -> None:
    potential, ended = Potential(), list[int]()
    together: Together[int] = Together(potential)
    together.run({"100": walk(together, 100, steps=2), "200": walk(together, 200)}, nothing, ended.append)
    assert ended == [100, 200]
    assert potential.sizes.count(1) >= STEPS - 2


def test_frames_that_the_potential_refuses_concern_their_own_simulation() -> None:
    potential, ended = Potential(), list[int | str]()
    together: Together[int | str] = Together(potential)

    def unlucky() -> str:
        for step in range(13):
            together.ask("a", frames(step, 1))
        with pytest.raises(GuardStop, match="thirteen"):
            together.ask("a", frames(13, 1))
        return "unlucky"

    together.run({"a": unlucky, "100": walk(together, 100)}, nothing, ended.append)  # type: ignore[arg-type]
    assert sorted(map(str, ended)) == ["100", "unlucky"]
    assert potential.sizes.count(2) >= 1


def test_an_error_of_one_ends_all_before_it_is_raised() -> None:
    together: Together[int] = Together(Potential())
    away, halted = threading.Event(), list[type]()

    def fails() -> int:
        together.ask("a", frames(1, 1))
        raise OSError("disk full")

    def computes() -> int:
        try:
            while True:
                together.ask("b", frames(2, 1))
        except Halted as error:
            halted.append(type(error))
            raise

    def waits_for_ipi() -> int:
        assert away.wait(30.0)
        halted.append(threading.Event)
        return 0

    with pytest.raises(OSError, match="disk full"):
        together.run({"a": fails, "b": computes, "c": waits_for_ipi}, away.set, pytest.fail)
    assert set(halted) == {Halted, threading.Event}, "both have ended"
    with pytest.raises(Halted):
        together.ask("a", frames(1, 1))


def test_what_cannot_be_noted_ends_all() -> None:
    together: Together[int] = Together(Potential())
    running = threading.Event()

    def goes_on() -> int:
        running.set()
        while True:
            together.ask("b", frames(2, 1))

    def note(first: int) -> None:
        raise OSError("no space for the event")

    with pytest.raises(OSError, match="no space"):
        together.run({"100": walk(together, 100, steps=2), "b": goes_on}, nothing, note)
    assert running.is_set()


@pytest.fixture
def interrupted() -> Iterator[Callable[[float], None]]:
    """Has the main thread get what Ctrl-C gives it, after so many seconds."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before, timer = signal.signal(signal.SIGALRM, interrupt), signal.getitimer(signal.ITIMER_REAL)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)  # type: ignore[func-returns-value]
    signal.setitimer(signal.ITIMER_REAL, *timer)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("moment", np.linspace(0.05, 0.3, 8))
def test_a_request_to_stop_ends_all_whatever_they_do(moment: float, interrupted: Callable[[float], None]) -> None:
    def slow(asked: Frames) -> Prediction:
        time.sleep(0.01)
        return Potential()(asked)

    together: Together[int] = Together(slow)
    away, ended, heard = threading.Event(), list[str](), list[int]()

    def computes(name: str) -> int:
        try:
            while True:
                together.ask(name, frames(2, 1))
        finally:
            ended.append(name)

    def waits_for_ipi() -> int:
        away.wait(30.0)
        ended.append("c")
        return 3

    interrupted(moment)
    with pytest.raises(KeyboardInterrupt):
        together.run({"a": partial(computes, "a"), "b": partial(computes, "b"), "c": waits_for_ipi}, away.set, heard.append)
    assert sorted(ended) == ["a", "b", "c"]
    assert heard == [3], "what came to its end meanwhile is known to be done"


def armed_until(over: Callable[[], bool], seconds: float) -> None:
    """Interrupt after so many seconds, and again while that was lost in a callback of Python's own, which swallows it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not over():
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.05)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("interrupted")
@pytest.mark.timeout(120, method="thread")
def test_a_signal_amid_an_answer_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """With locks of Python's own between the threads, one in a hundred was left held."""
    monkeypatch.setattr(together_module, "WAKE_SECONDS", 0.01)
    rng = np.random.default_rng(4)
    found = Potential()(frames(2, 1))
    for _ in range(400):
        interrupted_run(found, rng.uniform(0.0002, 0.005))


def interrupted_run(found: Prediction, seconds: float) -> None:
    """Four simulations that ask as fast as they can, so long after the first answer."""
    armed = list[bool]()

    def predict(asked: Frames) -> Prediction:
        if not armed:
            armed.append(True)
            armed_until(lambda: together._halted, seconds)
        return replaced(found, len(asked))

    together: Together[int] = Together(predict)

    def computes(name: str) -> int:
        while True:
            together.ask(name, frames(2, 1))

    with pytest.raises(KeyboardInterrupt):
        together.run({name: partial(computes, name) for name in "abcd"}, nothing, pytest.fail)
    signal.setitimer(signal.ITIMER_REAL, 0)


def replaced(found: Prediction, count: int) -> Prediction:
    """The same for so many frames, at once."""
    parts = (found.energy, found.forces, found.virial, found.energy_noise_sd, found.force_noise_sd)
    return Prediction(*(np.repeat(part, count, axis=1) for part in parts))


def test_structures_of_a_prediction_are_in_the_order_of_the_simulations() -> None:
    """So that neighbour lists of the step before are those of the same structures."""
    seen = list[list[float]]()

    def predict(asked: Frames) -> Prediction:
        seen.append(asked.positions[:, 0, 0].tolist())
        return Potential()(asked)

    together: Together[int] = Together(predict)

    def walks(name: str, x: float, wait: float) -> int:
        for _ in range(STEPS):
            time.sleep(wait)
            together.ask(name, frames(x, 1))
        return 0

    together.run({"a": partial(walks, "a", 1.0, 0.003), "b": partial(walks, "b", 2.0, 0.0)}, nothing, lambda result: None)
    assert {tuple(x) for x in seen} <= {(1.0,), (2.0,), (1.0, 2.0)}
    assert (1.0, 2.0) in {tuple(x) for x in seen}
