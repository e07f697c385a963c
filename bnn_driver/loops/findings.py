"""What the i-PI input, its sockets and the run directory mean for a run, found without starting anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnn_driver.config import Config
from bnn_driver.errors import ConfigError
from bnn_driver.executors.retries import LONGEST
from bnn_driver.ipi.addresses import state_of
from bnn_driver.ipi.simulation import IpiInput, IpiProcess
from bnn_driver.ipi.transport import Endpoint
from bnn_driver.store import weights
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import WALKERS, RunDirectory, read_segments

SOCKETS = {
    "free": "free",
    "stale": "a socket file that nobody listens on; `run` removes it",
    "listening": "somebody listens: `serve` would connect, `run` would be refused",
    "elsewhere": "no address of this machine: i-PI has to listen on that host; `run` starts it here",
}


def input_findings(found: IpiInput, config: Config) -> list[str]:
    """Settings of the i-PI input that cost something.  Raises: ConfigError for those that would spoil the run."""
    longest = LONGEST * config.oracle.timeout
    if 0 < found.timeout < longest:
        raise ConfigError(
            f"{found.path}: <timeout> is {found.timeout:g} s, but a label may take {longest:g} s: [oracle] timeout, and once more with "
            "twice the limit. i-PI would drop the driver in the middle of it; remove <timeout> or make it longer"
        )
    if found.pbc and not config.system.periodic:
        raise ConfigError(
            f"{found.path}: <ffsocket pbc='true'> folds every atom by itself into the cell, and molecules come torn apart, "
            "but [system] periodic = false; write pbc='false'"
        )
    findings = []
    if found.exit_on_disconnect:
        findings.append(f"{found.path}: <exit_on_disconnect> ends the simulation when the driver stops; the same command goes on")
    if found.checkpoint_stride is None:
        findings.append(f"{found.path}: no <checkpoint>: a crash of i-PI loses the run back to its start; add one to <output>")
    return findings


def batch_hint(found: IpiInput) -> str | None:
    """What would make the evaluation of beads cheaper."""
    beads = found.n_beads * found.n_systems
    if beads == 1 or found.batch_size >= beads:
        return None
    return f"{beads} structures per step come {found.batch_size} at a time; <batch_size>{beads}</batch_size> evaluates them in one call"


def socket_line(endpoints: Sequence[Endpoint]) -> str:
    """State of every address.  Raises: as `state_of`."""
    return "; ".join(f"{endpoint} {SOCKETS[state_of(endpoint)]}" for endpoint in endpoints)


@dataclass(frozen=True)
class RunState:
    """Where a run directory stands."""

    path: Path
    begun: bool
    """Its settings are fixed: the same command resumes."""
    owner: str | None
    """The driver that works in it now."""
    step: int
    labels: int
    audits_pending: int
    generation: int | None
    finished: bool
    label_seconds: float | None
    """Mean of its labels."""
    update_seconds: float | None
    """Mean of the updates of its chains."""
    step_seconds: float | None
    """Wall time per step so far, with labels and updates."""


def run_state(config: Config, base: Path, facts: dict[str, Any], ipi_input: IpiInput | None, walker: str = "") -> RunState:
    """What `run` would find; nothing is made or changed.

    Args: facts: the physics of now, as `assembly.physics` gives them.
    Raises: ConfigError when the directory was begun with other physics, in the words of `run`.
    """
    path = (base / config.run.directory).absolute()
    if not (path / "settings.json").exists():
        return RunState(path, False, None, ipi_input.step if ipi_input else 0, 0, 0, None, False, None, None, None)
    RunDirectory(path).refuse_other_physics(facts)
    if walker and walker not in RunDirectory(path).walkers():
        return RunState(
            path / WALKERS / walker, False, None, ipi_input.step if ipi_input else 0, 0, 0, None, False, None, None, None
        )
    run = RunDirectory(path, walker)
    labels = LabelStore(run.labels_dir).all()
    xml = config.ipi.input_of(walker)
    simulation = IpiProcess(base / xml, run.ipi_dir, run.log_dir / "ipi.log") if xml else None
    update, step = _paces(run)
    return RunState(
        run.home,
        True,
        run.live_owner("driver"),
        simulation.reached() if simulation else 0,
        len(labels),
        len(list((run.oracle_dir / "pending").glob("*.json"))),
        weights.latest(run.generations_dir),
        bool(simulation and simulation.finished()),
        _mean([item.label.seconds for item in labels]),
        update,
        step,
    )


def _paces(run: RunDirectory) -> tuple[float | None, float | None]:
    """Mean s of an update of the chains, and s per step, from the events of all starts."""
    updates: list[float] = []
    seconds, steps = 0.0, 0
    folders = dict.fromkeys([run.events_dir, run.path / "events"])  # the trainer of walkers writes to the common ones
    for segment in (segment for folder in folders for segment in read_segments(folder)):
        events = list(segment)
        updates += [e["seconds"] for e in events if e["kind"] == "update"]
        starts, clocks = ([e for e in events if e["kind"] == kind] for kind in ("start", "clock"))
        if starts and clocks:
            seconds += clocks[-1]["total"]
            steps += max(clocks[-1]["steps"] - starts[0]["step"], 0)
    return _mean(updates), seconds / steps if steps else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
