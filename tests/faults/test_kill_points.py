"""kill -9 at every named point: before, in the middle of, and after whatever a process writes or sends."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
from campaign import EXECUTORS, Fault, Place, chains_of
from verify import resumes

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
    executor: str = "local"

    def attack(self, folder: Path) -> None:
        """Strike, each time from where the last blow left the run; then bring it to its end."""
        place = Place(folder, self.steps, executor=self.executor)
        for fault in self.faults:
            if fault.ends == SURVIVES and place.starts:
                place.lengthen(place.steps + 8)
            place.strike(fault)
        resumes(place)


def trials_of(kind: str, faults: list[Fault], length: int, executor: str = "local") -> list[Trial]:
    return [Trial(f"{kind} {n}", chain, executor=executor) for n, chain in enumerate(chains_of(faults, length))]


TRIALS = [
    *trials_of("driver", DRIVER, 7),
    *trials_of("trainer", TRAINER, 5),
    *(trial for executor in EXECUTORS for trial in trials_of(f"worker {executor}", WORKER, 4, executor)),
    *trials_of("i-PI", IPI, 3),
]


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_killed_at_a_named_point(trials: dict[str, Future[None]], trial: Trial) -> None:
    trials[trial.name].result()
