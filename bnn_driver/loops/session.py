"""A run from its first to its last second: who is started when, and who is stopped how."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnn_driver.active.policy import Policy
from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.config import Config, read_config
from bnn_driver.errors import BnnError, CleanStop, ConfigError, IpiGone
from bnn_driver.executors import LocalExecutor
from bnn_driver.ipi.client import Client
from bnn_driver.ipi.simulation import IpiInput, IpiProcess
from bnn_driver.ipi.transport import Endpoint
from bnn_driver.loops.assembly import (
    Model,
    foundation_generation,
    load_model,
    make_distances,
    make_ensemble,
    make_policy,
    physics,
    read_system,
    settle,
)
from bnn_driver.loops.counting import StepCounter
from bnn_driver.loops.driver import Driver, DriverSettings
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.progress import Progress
from bnn_driver.loops.signals import stop_on_signals
from bnn_driver.loops.trainer import TrainerProcess
from bnn_driver.oracle import Limits, Oracle, absolute_paths, fingerprint, load_oracle, read_done
from bnn_driver.records import Frames
from bnn_driver.store import weights
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import EventLog, RunDirectory, read_events, write_atomic

log = logging.getLogger(__name__)

GATHER_SECONDS = 2e-3
"""How long a request of one connection waits for those of the others."""
STOP_SECONDS = 30.0
"""How long i-PI may take to write its RESTART."""
DEFAULT_AUDIT_PROBABILITY = 1e-3
"""When the number of steps is unknown and none is configured."""


def run_session(config_file: Path, walker: str = "") -> Path:
    """Start i-PI, drive it to its last step, and return the run directory; the same call resumes.

    Args: walker: one of [ipi.walkers]; empty: the only simulation, [ipi] input.
    Raises: CleanStop on Ctrl-C or SIGTERM; every other error of `bnn_driver.errors`.
    """
    config, base = read_config(config_file), config_file.absolute().parent
    xml = config.ipi.input_of(walker)
    if not xml:
        raise ConfigError(f"{config_file}: ipi.input is missing: `run` starts i-PI on it; with `serve` you start i-PI yourself")
    run = RunDirectory(base / config.run.directory, walker)
    with stop_on_signals(), run.lock("driver"), ExitStack() as stack:
        frames, ipi_input = read_system(config, base, walker)
        if ipi_input is None:
            raise ConfigError(f"{config_file}: ipi.input names no i-PI input")
        _check_input(ipi_input, config)
        simulation = IpiProcess(base / xml, run.ipi_dir, run.log_dir / "ipi.log")
        done = simulation.reached()
        session = stack.enter_context(_open(config, config_file, run, frames, ipi_input, done))
        if simulation.finished():
            session.finish("finished", wait_for_audits=True)
            return run.path
        stack.callback(simulation.stop, STOP_SECONDS, STOP_SECONDS)
        effective = simulation.start()
        session.begin_at(effective.step)
        client = _client(config, effective.endpoints, effective.shared_memory, session.driver)
        session.serve(client, partial(simulation.wait_until_listening, effective, config.ipi.connect_timeout))
        simulation.wait(STOP_SECONDS)
        if not simulation.finished():
            session.finish(f"i-PI ended at step {simulation.reached()}")
            if simulation.stopped_on_request():
                raise CleanStop(f"i-PI was told to stop, at step {simulation.reached()}; the same command goes on")
            raise IpiGone(
                f"i-PI ended at step {simulation.reached()} of {ipi_input.total_steps}; see {simulation.log_file}. "
                f"The same command goes on from there. The end of its log:\n{simulation.tail(15)}"
            )
        session.finish("finished", wait_for_audits=True)
    return run.path


def serve_session(
    config_file: Path, *, unix: bool, addresses: list[str], port: int, prefix: str, shared_memory: bool, walker: str = ""
) -> Path:
    """Drive an i-PI that somebody else started, until it says EXIT.  Raises: as `run_session`."""
    config, base = read_config(config_file), config_file.absolute().parent
    config.ipi.input_of(walker)
    run = RunDirectory(base / config.run.directory, walker)
    endpoints = [Endpoint("unix", a, prefix=prefix) if unix else Endpoint("inet", a, port) for a in addresses]
    with stop_on_signals(), run.lock("driver"):
        frames, ipi_input = read_system(config, base, walker)
        if ipi_input is not None:
            _check_input(ipi_input, config)
        with _open(config, config_file, run, frames, ipi_input, ipi_input.step if ipi_input else 0) as session:
            session.serve(_client(config, endpoints, shared_memory, session.driver))
            session.finish("i-PI said EXIT", wait_for_audits=True)
    return run.path


def check_session(config_file: Path) -> str:
    """Everything that can be validated without running: config, i-PI input, model, oracle settings, one prediction."""
    config, base = read_config(config_file), config_file.absolute().parent
    settle(config.potential.threads)
    frames, ipi_input = read_system(config, base)
    oracle = load_oracle(config.oracle.kind, absolute_paths(config.oracle.kind, config.oracle.options, base))
    oracle.check(frames)
    make_policy(config, frames.numbers, 0.0)
    model = load_model(config, base, frames.numbers, config.potential.device)
    generation = foundation_generation(model, config.ensemble.members)
    ensemble = make_ensemble(model, generation, config)
    ensemble.predict(frames)
    begin = time.monotonic()
    ensemble.predict(frames)
    milliseconds = 1e3 * (time.monotonic() - begin)
    where = ", ".join(str(e) for e in ipi_input.endpoints) if ipi_input else "given to serve"
    sampled = sum(x.numel() for x in model.foundation_weights().values())
    return "\n".join(
        [
            f"atoms      {len(frames.numbers)}, {'periodic' if frames.periodic else 'molecule'}, charge {frames.charge:+d}, "
            f"multiplicity {frames.multiplicity}",
            f"i-PI       {where}; {ipi_input.n_beads if ipi_input else '?'} beads, {ipi_input.total_steps if ipi_input else '?'} steps",
            f"potential  {config.potential.model}: {model.potential.path}",
            f"sampled    {sampled} weights per member, {config.ensemble.members} members, {milliseconds:.1f} ms per prediction",
            f"recipe     {config.ensemble.recipe}; distance to the labels {_distance(config, model)}",
            *(f"fixed      {reason}" for reason in model.potential.never_sampled),
            f"oracle     {oracle.code}, fingerprint {fingerprint(oracle)[:12]}",
            "everything that can be checked without running is in order",
        ]
    )


def _distance(config: Config, model: Model) -> str:
    """Whether the variance of energies grows with it."""
    if make_distances(model.potential, model.noise, config.ensemble) is None:
        return "off" if config.ensemble.distance == "off" else "not to be had with this potential"
    return "in the variance of energies"


@dataclass
class Session:
    """The parts of a run while it lives."""

    driver: Driver
    events: EventLog
    progress: Progress
    label_seconds: float
    """Time limit of a label."""
    workers: int

    def serve(self, client: Client, wait_for_ipi: Callable[[], None] = lambda: None) -> None:
        """Answer i-PI until it ends.  Raises: CleanStop on Ctrl-C or SIGTERM."""
        try:
            wait_for_ipi()
            client.serve()
        except (Exception, KeyboardInterrupt) as error:
            client.close()
            reason = "stopped on request" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            try:
                self.finish(reason)
            except BnnError as second:
                log.error("while the books were closed: %s", second)
            raise
        finally:
            self.progress.finish()

    def begin_at(self, step: int) -> None:
        """The step at which i-PI really starts: an i-PI that a killed driver left may have gone further than it seemed."""
        self.driver.counter.first_step = self.progress.first_step = step

    def finish(self, reason: str, *, wait_for_audits: bool = False) -> None:
        """Take the audits that have come, or all that are in flight, and close the books."""
        in_flight = self.driver.labelling.audits_in_flight
        if wait_for_audits and in_flight:
            self.progress.show(self.driver.step, f"waiting for {in_flight} audits", force=True)
        self.driver.finish(self.label_seconds * -(-in_flight // self.workers) if wait_for_audits else 0.0)
        self.events.append("stop", reason=reason, step=self.driver.step)
        self.progress.finish()


@contextlib.contextmanager
def _open(
    config: Config, config_file: Path, run: RunDirectory, frames: Frames, ipi_input: IpiInput | None, done: int
) -> Iterator[Session]:
    """All parts but i-PI, warm and ready; stopped when the context ends."""
    settle(config.potential.threads)
    options = absolute_paths(config.oracle.kind, config.oracle.options, config_file.absolute().parent)
    oracle = load_oracle(config.oracle.kind, options)
    oracle.check(frames)
    promise = make_policy(config, frames.numbers, _audit_probability(config, ipi_input))
    model = load_model(config, config_file.absolute().parent, frames.numbers, config.potential.device)
    with ExitStack() as stack:
        announced = {e["frame_id"] for e in read_events(run.events_dir) if e["kind"] == "label"}
        events = stack.enter_context(EventLog(run.events_dir))
        facts = physics(config, frames, model, oracle.physics(), fingerprint(oracle))
        run.fix_settings(_effective(config, config_file.absolute().parent), facts, events)
        write_atomic(run.path / "bnn.toml", config_file.read_bytes())
        events.append("start", step=done, config=str(config_file))
        foundation = foundation_generation(model, config.ensemble.members)
        if weights.latest(run.generations_dir) is None:
            weights.publish(run.generations_dir, foundation)
        trainer = TrainerProcess(run, config.trainer.threads)
        trainer.begin()
        stack.callback(trainer.stop)
        labelling = _labelling(config, options, run, oracle, stack)
        progress = Progress(ipi_input.total_steps if ipi_input else None, done)
        driver = _driver(config, frames, ipi_input, done, model, promise, trainer, labelling, events, progress, run.walker)
        driver.announce_missing(announced)
        driver.ensemble.predict(frames)
        driver.foundation.predict(frames)
        yield Session(driver, events, progress, config.oracle.timeout, config.oracle.workers)


def _labelling(config: Config, options: dict[str, Any], run: RunDirectory, oracle: Oracle, stack: ExitStack) -> Labelling:
    o = config.oracle
    spool = run.spool_dir
    limits = Limits(min_distance=config.sanity.min_distance, max_force=config.sanity.max_force)
    executor = LocalExecutor(o.kind, options, o.workers, o.timeout, run.oracle_dir / "work", o.threads, spool, limits=limits)
    stack.callback(executor.shutdown, wait=False)
    name = fingerprint(oracle)
    labelling = Labelling(LabelStore(run.labels_dir), executor, run.oracle_dir / "pending", name, o.max_labels, run.walker)
    labelling.recover(lambda frame_id: read_done(spool, frame_id))
    return labelling


def _driver(
    config: Config,
    frames: Frames,
    ipi_input: IpiInput | None,
    done: int,
    model: Model,
    promise: tuple[Policy, dict[str, GammaCalibration]],
    trainer: TrainerProcess,
    labelling: Labelling,
    events: EventLog,
    progress: Progress,
    walker: str,
) -> Driver:
    batched = ipi_input is not None and ipi_input.batch_size > 1
    settings = DriverSettings(
        frames.numbers, frames.periodic, frames.charge, frames.multiplicity, config.sanity.min_distance,
        config.sanity.max_force, config.trainer.max_lag, config.output.stride, config.output.extras, config.run.seed, config.accuracy.energy,
        walker, config.oracle.workers if config.oracle.ask == "worst" else None,
    )  # fmt: skip
    ensemble = make_ensemble(model, trainer.load(trainer.newest()), config)
    foundation = make_ensemble(model, foundation_generation(model, 1), config)
    counter = StepCounter(_frames_per_step(ipi_input), done, batched)
    return Driver(settings, ensemble, foundation, *promise, labelling, trainer, events, counter, progress.show)


def _frames_per_step(ipi_input: IpiInput | None) -> int:
    """Beads of all systems; without an i-PI input a step cannot be told from a frame."""
    return ipi_input.n_beads * ipi_input.n_systems if ipi_input else 1


def _audit_probability(config: Config, ipi_input: IpiInput | None) -> float:
    """Chance that a served frame is audited."""
    if config.audit.probability is not None:
        return config.audit.probability
    if ipi_input is None or not ipi_input.total_steps:
        return DEFAULT_AUDIT_PROBABILITY
    walkers = max(1, len(config.ipi.walkers))
    return min(1.0, config.audit.expected / (walkers * ipi_input.total_steps * _frames_per_step(ipi_input)))


def _client(config: Config, endpoints: tuple[Endpoint, ...] | list[Endpoint], shared_memory: bool, driver: Driver) -> Client:
    return Client(
        endpoints,
        driver.respond,
        shared_memory=shared_memory,
        connect_timeout=config.ipi.connect_timeout,
        reconnects=config.ipi.reconnects,
        gather_seconds=GATHER_SECONDS,
    )


def _check_input(found: IpiInput, config: Config) -> None:
    """Settings of the i-PI input that would spoil the run.  Raises: ConfigError."""
    if 0 < found.timeout < config.oracle.timeout:
        raise ConfigError(
            f"{found.path}: <timeout> is {found.timeout:g} s, but a label may take {config.oracle.timeout:g} s ([oracle] timeout): "
            "i-PI would drop the driver in the middle of it; remove <timeout> or make it longer"
        )
    if found.pbc and not config.system.periodic:
        raise ConfigError(
            f"{found.path}: <ffsocket pbc='true'> folds every atom by itself into the cell, and molecules come torn apart, "
            "but [system] periodic = false; write pbc='false'"
        )
    if found.exit_on_disconnect:
        log.warning("%s: <exit_on_disconnect> ends the simulation when the driver stops; the same command goes on", found.path)
    if found.checkpoint_stride is None:
        log.warning("%s: no <checkpoint>: a crash of i-PI loses the run back to its start; add one to <output>", found.path)


def _effective(config: Config, base: Path) -> dict[str, object]:
    """Settings in use, with the versions and thread counts that belong to them."""
    versions = {"torch": torch.__version__, "numpy": np.__version__, "torch_threads": torch.get_num_threads()}
    return config.model_dump(mode="json") | {"base": str(base), "versions": versions}
