"""kill -9 at random moments, of every kind of process, again and again in the same run directory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from campaign import INTERCHANGE, LIMIT, POOL, TIMES, Place, Table, until
from verify import resumes

pytestmark = [pytest.mark.ipi, pytest.mark.timeout(0)]
SIGNS = {
    "driver": "bnn_driver.cli",
    "trainer": "trainer_main",
    "worker": "oracle_worker",
    "i-PI": "i-pi",
    "pool": POOL,
    "interchange": INTERCHANGE,
}
"""A word of the command line of each kind of process."""
AFTER = {"driver": (-signal.SIGKILL,), "trainer": (0,), "worker": (0,), "i-PI": (6,), "pool": (0,), "interchange": (3,)}
"""How the program may end when one of them is killed once."""
STEPS = 8
"""Of every start: the first one, in which nothing is killed, says how long the others take."""
SEED = int(os.environ.get("BNN_FAULTS_SEED", "5"))


@dataclass(frozen=True)
class RandomKills:
    """Kills of one process in each start, each at a moment drawn anew, then the end of the run."""

    name: str
    victims: tuple[str, ...]
    seed: int
    executor: str = "local"

    def attack(self, folder: Path) -> None:
        """Measure, strike and resume until all kills are spent."""
        rng = np.random.default_rng((SEED, self.seed))
        place = Place(folder, steps=STEPS, options={"delay": "0.1 s"}, executor=self.executor)
        span, missed = self._one_start(place, "", 0.0), 0
        for victim in self.victims:
            place.lengthen(place.steps + STEPS)
            before = len(place.hits)
            lasted = self._one_start(place, victim, rng.uniform(0.0, span))
            if len(place.hits) == before:  # it was over earlier
                span, missed = min(span, lasted), missed + 1
        assert missed < len(self.victims), f"no process was killed in {missed} starts of {span:.1f} s"
        resumes(place)

    def _one_start(self, place: Place, victim: str, moment: float) -> float:
        """Args: moment: s from the beginning of the books, at which a victim is killed.  Returns: s that the start lasted from there."""
        process = place.start()
        books = place.run / "events"
        until(lambda: process.poll() is not None or len(list(books.glob("*.jsonl"))) >= place.starts, LIMIT)
        begin = time.monotonic()
        killed = bool(victim) and self._kill(place, process, victim, begin + moment)
        process.wait(LIMIT)
        lasted = time.monotonic() - begin
        code, said = place.end(process)
        assert code in ((*AFTER[victim], 0) if killed else (0,)), f"{victim} killed: {killed}; the run ended with {code}:\n{said}"
        assert "Traceback" not in said, said
        place.check_disk()
        return lasted

    def _kill(self, place: Place, process: subprocess.Popen[str], victim: str, moment: float) -> bool:
        """Whether the blow fell before the end of the run; waits for a victim that is not there yet."""
        until(lambda: process.poll() is not None or time.monotonic() >= moment, LIMIT)
        until(lambda: process.poll() is not None or place.processes(SIGNS[victim]), LIMIT)
        if victim == "interchange":  # for one that dies while Parsl starts, Parsl itself waits two minutes
            until(lambda: process.poll() is not None or place.processes(SIGNS["i-PI"]), LIMIT)
        victims = sorted(place.processes(SIGNS[victim]))
        if process.poll() is not None or not victims:
            return False
        row = f"kill {victim} at random moments" + ("" if self.executor == "local" else f" ({self.executor})")
        Table.attempt(row)
        place.hits.append(row)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victims[0], signal.SIGKILL)
        return True


PARTS = ("worker", "pool", "interchange")
"""Of Parsl, one after the other in the same run directory: its starts are long."""
TRIALS = [
    *(RandomKills(f"Parsl {n}", PARTS, 4000 + n, "parsl") for n in range(TIMES)),
    *(RandomKills(f"driver {n}", ("driver",) * 3, n) for n in range(TIMES)),
    *(RandomKills(f"trainer {n}", ("trainer",) * 3, 1000 + n) for n in range(TIMES)),
    *(RandomKills(f"worker {n}", ("worker",) * 3, 2000 + n) for n in range(TIMES)),
    *(RandomKills(f"i-PI {n}", ("i-PI",) * 3, 3000 + n) for n in range(TIMES)),
]


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_killed_at_random_moments(trials: dict[str, Future[None]], trial: RandomKills) -> None:
    trials[trial.name].result()
