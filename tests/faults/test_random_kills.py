"""kill -9 at random moments, of every kind of process, again and again in the same run directory."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from campaign import EXECUTORS, LIMIT, TIMES, Place, Table, until
from verify import resumes

pytestmark = [pytest.mark.ipi, pytest.mark.timeout(0)]
SIGNS = {"driver": "bnn_driver.cli", "trainer": "trainer_main", "worker": "oracle_worker", "i-PI": "i-pi"}
"""A word of the command line of each kind of process."""
AFTER = {"driver": (-signal.SIGKILL,), "trainer": (0,), "worker": (0,), "i-PI": (6,)}
"""How the program may end when one of them is killed once."""
KILLS = 3
"""In one run directory."""
SPAN = 8.0
"""s from the beginning of the books, within which the blow falls."""
SEED = int(os.environ.get("BNN_FAULTS_SEED", "5"))


@dataclass(frozen=True)
class RandomKills:
    """Kills of one kind of process, each at a moment drawn anew, then the end of the run."""

    name: str
    victim: str
    seed: int
    executor: str = "local"

    def attack(self, folder: Path) -> None:
        """Strike and resume until all kills are spent."""
        rng = np.random.default_rng((SEED, self.seed))
        place = Place(folder, steps=20, options={"delay": "0.1 s"}, executor=self.executor)
        for _ in range(KILLS):
            self._kill_once(place, rng)
            place.lengthen(place.steps + 6)
        resumes(place)

    def _kill_once(self, place: Place, rng: np.random.Generator) -> None:
        process = place.start()
        books = place.run / "events"
        until(lambda: process.poll() is not None or len(list(books.glob("*.jsonl"))) >= place.starts, LIMIT)
        time.sleep(rng.uniform(0.0, SPAN))
        until(lambda: process.poll() is not None or place.processes(SIGNS[self.victim]), LIMIT)
        victims = sorted(place.processes(SIGNS[self.victim]))
        if process.poll() is None and victims:
            Table.attempt(self._row)
            os.kill(victims[0], signal.SIGKILL)
            place.hits.append(self._row)
        code, said = place.end(process)
        assert code in (*AFTER[self.victim], 0), f"killed {self.victim}, and the run ended with {code}:\n{said}"
        assert "Traceback" not in said, said
        place.check_disk()

    @property
    def _row(self) -> str:
        return f"kill {self.victim} at random moments" + ("" if self.executor == "local" else f" ({self.executor})")


TRIALS = [
    *(RandomKills(f"driver {n}", "driver", n) for n in range(TIMES)),
    *(RandomKills(f"trainer {n}", "trainer", 1000 + n) for n in range(TIMES)),
    *(RandomKills(f"worker {executor} {n}", "worker", 2000 + n, executor) for n in range(TIMES) for executor in EXECUTORS),
    *(RandomKills(f"i-PI {n}", "i-PI", 3000 + n) for n in range(TIMES)),
]


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_killed_at_random_moments(trials: dict[str, Future[None]], trial: RandomKills) -> None:
    trials[trial.name].result()
