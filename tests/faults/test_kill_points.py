"""kill -9 at every named point: before, in the middle of, and after whatever a process writes or sends."""

from __future__ import annotations

import signal
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from campaign import INTERCHANGE, LIMIT, POOL, Fault, Place, Table, chains_of, until
from verify import check, resumes

pytestmark = pytest.mark.ipi
STORE, FILES, RUN, WEIGHTS = (f"bnn_driver.store.{name}" for name in ("dataset", "files", "run", "weights"))
SURVIVES = (0,)
"""How a run ends of which only a helper died: well, in the same start."""
IPI_GONE = (6,)


def driver(name: str, place: str, when: str, call: int = 1, match: str = "") -> Fault:
    return Fault(f"kill driver: {name}", "driver", place, when, call, match)


def trainer(name: str, place: str, when: str, call: int = 1, match: str = "") -> Fault:
    return Fault(f"kill trainer: {name}", "trainer", place, when, call, match, ends=SURVIVES)


def worker(name: str, place: str, when: str, call: int = 1, match: str = "") -> Fault:
    return Fault(f"kill worker: {name}", "worker", place, when, call, match, ends=SURVIVES)


def ipi(name: str, place: str, when: str, call: int = 1, match: str = "") -> Fault:
    return Fault(f"kill i-PI: {name}", "ipi", place, when, call, match, ends=IPI_GONE)


DRIVER = [
    driver("settings half written", f"{FILES}:write_synced", "torn", match="settings.json"),
    driver("settings written", f"{RUN}:RunDirectory.fix_settings", "after"),
    driver("generation 0 half published", f"{FILES}:write_synced", "before", match="state.json"),
    driver("generation 0 published, not current", f"{FILES}:write_atomic", "before", match="current"),
    driver("before the first label's pending file", f"{FILES}:write_atomic", "before", match="pending"),
    driver("pending written, label not asked", f"{FILES}:write_atomic", "after", match="pending"),
    driver("label computed, not written", f"{STORE}:LabelStore.write", "before"),
    driver("recovered label not announced", "bnn_driver.loops.labelling:Labelling._adopt", "after"),
    driver("label half written", f"{FILES}:write_synced", "torn", match="labels"),
    driver("label written, not renamed", "os:replace", "before", match="labels"),
    driver("label written, pending left", f"{STORE}:LabelStore.write", "after"),
    driver("before the label's event", f"{RUN}:EventLog.append", "before", match="label"),
    driver("label's event half written", f"{RUN}:EventLog.append", "torn", match="label"),
    driver("after the label's event", f"{RUN}:EventLog.append", "after", match="label"),
    driver("decision half written", f"{RUN}:EventLog.append", "torn", call=2, match="decision"),
    driver("after the decision's event", f"{RUN}:EventLog.append", "after", call=2, match="decision"),
    driver("before the swap", f"{RUN}:EventLog.append", "before", match="swap"),
    driver("before the reply", "bnn_driver.ipi.transport:Channel.write", "before", call=2, match="FORCEREADY"),
    driver("mid-reply", "bnn_driver.ipi.transport:Channel.write", "torn", call=2, match="FORCEREADY"),
    driver("after the reply", "bnn_driver.ipi.transport:Channel.write", "after", call=2, match="FORCEREADY"),
    driver("before the last event", f"{RUN}:EventLog.append", "before", match="stop"),
]
TRAINER = [
    trainer("at its start", f"{RUN}:RunDirectory.existing", "before"),
    trainer("weights half written", f"{FILES}:write_synced", "torn", match="weights.safetensors"),
    trainer("between weights and state", f"{FILES}:write_synced", "before", match="state.json"),
    trainer("state half written", f"{FILES}:write_synced", "torn", match="state.json"),
    trainer("before the folder is renamed", "os:rename", "before", match="generations"),
    trainer("folder renamed, not current", f"{FILES}:write_atomic", "before", match="current"),
    trainer("published", f"{WEIGHTS}:publish", "after"),
    trainer("before the update's event", f"{RUN}:EventLog.append", "before", match="update"),
    trainer("update's event half written", f"{RUN}:EventLog.append", "torn", match="update"),
    trainer("in the middle of a prune", f"{WEIGHTS}:_remove", "after"),
]
WORKER = [
    worker("before it computes", "bnn_driver.oracle:label", "before", call=2),
    worker("computed, not written", "bnn_driver.oracle:write_done", "before", call=2),
    worker("written, not renamed", "os:replace", "before", match="done"),
    worker("written, not told", "bnn_driver.oracle:write_done", "after", call=2),
]
COMPUTED = {"place": "bnn_driver.oracle:label", "when": "before"}
PARSL = [
    *(replace(fault, name=f"{fault.name} (Parsl)") for fault in WORKER),
    Fault(
        "kill Parsl's worker: label written, not told", "parsl worker", "bnn_driver.executors.task:label_task", "after",
        ends=SURVIVES,
    ),
    Fault("kill Parsl's pool: a label being computed", "worker", **COMPUTED, victim=POOL, ends=SURVIVES),
]  # fmt: skip
LOST_INTERCHANGE = Fault(
    "kill Parsl's interchange: a label being computed", "worker", **COMPUTED, victim=INTERCHANGE, ends=(3,), says="interchange has ended"
)  # fmt: skip
IPI = [
    ipi("checkpoint half written", "ipi.inputs.simulation:InputSimulation.write", "before", call=2),
    ipi("between two steps", "ipi.engine.outputs:PropertyOutput.write", "after", call=3),
    ipi("positions sent", "ipi.interfaces.sockets:Driver.dispatch_send", "after", call=2),
]


@dataclass(frozen=True)
class Trial:
    """Some faults of one kind, one after the other in the same run directory."""

    name: str
    faults: list[Fault]
    steps: int = 12
    digits: bool = True

    def attack(self, folder: Path) -> None:
        """Strike, each time from where the last blow left the run; then bring it to its end."""
        place = Place(folder, self.steps, digits=self.digits)
        for fault in self.faults:
            if fault.ends == SURVIVES and place.starts:
                place.lengthen(place.steps + 8)
            place.strike(fault)
        resumes(place)


@dataclass(frozen=True)
class PartsOfParsl:
    """Kills of all that Parsl consists of; a start is long, so those that a run survives strike the same one."""

    name: str

    def attack(self, folder: Path) -> None:
        """All that is replaced in one start, then what ends the run."""
        place = Place(folder, steps=24, executor="parsl")
        place.strike(*PARSL)
        place.lengthen(place.steps + 12)
        place.strike(LOST_INTERCHANGE)
        resumes(place)


@dataclass(frozen=True)
class OutlivedDriver:
    """kill -9 of the driver while a worker of Parsl computes a label; the next start comes before the label."""

    name: str

    def attack(self, folder: Path) -> None:
        """The label is waited for and used, though i-PI, by its default format of numbers, asks for the frame with other ones."""
        place = Place(folder, executor="parsl", heartbeat=LIMIT / 4, digits=False)
        place.edit("probability = 0.25", "probability = 0.0")  # an audit's label would not be asked for again
        place.edit('timeout = "20 s"', f'timeout = "{LIMIT:g} s"')  # however long the next start takes on a busy machine
        go = folder / "go"
        fault = Fault(
            "kill driver: a label being computed (Parsl)", "worker", **COMPUTED, call=3, victim="bnn_driver.cli", until=str(go)
        )
        Table.attempt(fault.name)
        assert place.start(fault).wait(LIMIT) == -signal.SIGKILL
        assert place.marker().exists()
        place.hits.append(fault.name)
        process = place.start()
        until(lambda: process.poll() is not None or "waiting for the label" in place.output.read_text(), LIMIT)
        go.touch()
        code, said = place.end(process)
        assert code == 0, said
        assert "waiting for the label" in said, said
        check(place)
        begun = [line for line in place.computed.read_text().splitlines() if line.startswith("begin")]
        assert len(begun) == len(set(begun)) == len(list((place.run / "labels").glob("*.extxyz"))), "a label was computed twice"


def trials_of(kind: str, faults: list[Fault], length: int, digits: bool = True) -> list[Trial]:
    return [Trial(f"{kind} {n}", chain, digits=digits) for n, chain in enumerate(chains_of(faults, length))]


TRIALS: list[Any] = [
    OutlivedDriver("driver outlived by its worker"),  # long, but most of it is waiting
    PartsOfParsl("parts of Parsl"),
    *trials_of("driver", DRIVER[:14], 7),
    *trials_of("driver, default digits", DRIVER[14:], 7, digits=False),
    *trials_of("trainer", TRAINER, 5),
    *trials_of("worker", WORKER, 4),
    *trials_of("i-PI", IPI, 3),
]


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_killed_at_a_named_point(trials: dict[str, Future[None]], trial: Any) -> None:
    trials[trial.name].result()
