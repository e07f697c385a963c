"""Whatever hangs or whose clock jumps: no wait is without a limit, and the same command goes on."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import pytest
from campaign import LIMIT, Fault, Place, Table, until
from verify import resumes

from bnn_driver.store.run import read_events

pytestmark = pytest.mark.ipi
HANGS = {"role": "worker", "place": "bnn_driver.oracle:label", "when": "before", "action": "hang"}

UNCONVERGED = HANGS | {"action": "unconverged"}


@dataclass(frozen=True)
class HungOracle:
    """A calculation that never returns: its time limit, once more with twice the limit, then quarantine.

    On Parsl a time limit is final, see tests/executors/test_parsl.py.
    """

    name: str

    def attack(self, folder: Path) -> None:
        """It hangs once, then for ever; the frame is set aside with the reason, and not tried again until something changes."""
        place = Place(folder)
        place.edit('kind = "toy"\ntimeout = "20 s"', 'kind = "toy"\ntimeout = "2 s"\nrewinds = 0')
        place.strike(Fault("oracle hangs once", call=2, ends=(0,), **HANGS))
        place.lengthen(place.steps + 8)
        said = place.strike(Fault("oracle hangs for ever", lasting=True, ends=(4,), says="killed after 4 s", **HANGS))
        records = list((place.run / "oracle" / "quarantine").glob("*.json"))
        assert records, said
        for record in records:  # of the asked frame, and of an audit if there was one
            facts = json.loads(record.read_text())
            assert (facts["class"], facts["count"]) == ("OracleTimeout", 1), said
            assert len(ase.io.read(record.with_suffix(".extxyz"))) == 3
        before = place.computed.read_text()
        begin = time.monotonic()
        code, said = place.end(place.start())
        assert code == 4, said
        (asked,) = (record for record in records if str(record) in said)
        assert "is not tried again with the same settings" in said
        assert before == place.computed.read_text(), "the frame was tried again"
        assert time.monotonic() - begin < LIMIT
        place.edit('timeout = "2 s"', 'timeout = "10 s"')  # what the message says
        resumes(place)
        assert not asked.exists(), "the frame has its label now"


@dataclass(frozen=True)
class HardFrames:
    """Frames that no rung of the ladder labels: set aside, and the simulation goes back and around them."""

    name: str
    beads: int = 1

    def attack(self, folder: Path) -> None:
        """The run ends well all the same, and says what it did."""
        place = Place(folder, steps=40, options={"beads": self.beads, "batch": self.beads})
        place.edit("probability = 0.25", "probability = 0")  # a failed audit stops nobody
        said = place.strike(Fault(self.name, call=8 * self.beads, ends=(0,), says="takes another way", **UNCONVERGED))
        records = list((place.run / "oracle" / "quarantine").glob("*.json"))
        backs = [e for e in read_events(place.run / "events") if e["kind"] == "rewind"]
        assert len(records) == len(backs) == 1, said
        assert backs[0]["to"] < backs[0]["step"] == json.loads(records[0].read_text())["step"]
        assert "SCFNotConverged" in backs[0]["reason"]
        assert "went back" in said
        place.lengthen(place.steps + 8)
        resumes(place)


@dataclass(frozen=True)
class KilledGoingBack:
    """The driver dies while the checkpoint that it goes back to is made the next start."""

    name: str

    def attack(self, folder: Path) -> None:
        """The next start meets the frame again, does not compute it again, and goes back."""
        place = Place(folder, steps=40)
        place.edit("probability = 0.25", "probability = 0")
        place.strike(
            Fault("SCF unconverged, then a kill", call=8, ends=(-signal.SIGKILL,), **UNCONVERGED),
            Fault(self.name, "driver", "bnn_driver.ipi.simulation:reseeded", "after"),
        )
        before = place.computed.read_text().splitlines()
        code, said = place.end(place.start())
        assert code == 0, said
        assert "is not tried again with the same settings" in said
        assert [e["kind"] for e in read_events(place.run / "events")].count("rewind") == 1
        assert place.computed.read_text().splitlines()[: len(before)] == before
        place.lengthen(place.steps + 8)
        resumes(place)


@dataclass(frozen=True)
class Stopped:
    """A process that lives and does nothing, as on a file system that hangs."""

    name: str
    role: str
    place: str
    match: str
    limit: tuple[str, str]
    ends: tuple[int, ...]
    says: str

    def attack(self, folder: Path) -> None:
        """Noticed within the limit that the config sets."""
        place = Place(folder)
        place.edit(*self.limit)
        place.strike(
            Fault(self.name, self.role, self.place, "after", 2, self.match, action="stop", ends=self.ends, says=self.says)
        )
        resumes(place)


@dataclass(frozen=True)
class JumpingClock:
    """time.time() of every process goes a day ahead, back, and a day behind, every few calls."""

    name: str = "a clock that jumps"

    def attack(self, folder: Path) -> None:
        """One run from start to end, with a kill in the middle, and nobody notices."""
        place = Place(folder, steps=16)
        fault = Fault(self.name, "all", "time:time", "before", action="jump", ends=(0, -signal.SIGKILL))
        Table.attempt(fault.name)
        process = place.start(fault)
        until(lambda: len(list((place.run / "labels").glob("*.extxyz"))) >= 2, LIMIT)
        process.kill()
        place.end(process)
        code, said = place.end(place.start(fault))
        assert code == 0, said
        times = [json.loads(line)["time"] for file in (place.run / "events").iterdir() for line in file.read_text().splitlines()]
        assert max(times) - min(times) > 80_000, "the clock has jumped"
        place.hits.append(fault.name)
        resumes(place)


TRIALS: list[Any] = [
    HungOracle("hung oracle"),
    HardFrames("SCF unconverged"),
    HardFrames("SCF unconverged in a ring", beads=2),
    KilledGoingBack("kill driver: going back"),
    Stopped(
        "trainer stopped (SIGSTOP)", "trainer", "bnn_driver.store.weights:publish", "",
        ("max_lag = 0", 'max_lag = 0\nstall_timeout = "20 s"'), (0,), "did nothing for 20 s",
    ),
    Stopped(
        "i-PI stopped (SIGSTOP)", "ipi", "ipi.engine.outputs:PropertyOutput.write", "",
        ('connect_timeout = "60 s"', 'connect_timeout = "60 s"\nsilence_timeout = "4 s"'), (6,), "has said nothing for 4 s",
    ),
    JumpingClock(),
]  # fmt: skip


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_no_wait_without_a_limit(trials: dict[str, Future[None]], trial: Any) -> None:
    trials[trial.name].result()
