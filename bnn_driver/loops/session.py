"""A run from its first to its last second: who is started when, and who is stopped how."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bnn_driver.active.policy import Policy
from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.config import Config, read_config
from bnn_driver.errors import BnnError, CleanStop, ConfigError, IpiGone
from bnn_driver.executors.retries import LONGEST
from bnn_driver.ipi.client import Client
from bnn_driver.ipi.foreign import ask_to_stop
from bnn_driver.ipi.simulation import IpiInput, IpiProcess
from bnn_driver.ipi.transport import Endpoint
from bnn_driver.loops.assembly import (
    STOP_SECONDS,
    Model,
    effective_settings,
    foundation_generation,
    load_model,
    make_client,
    make_ensemble,
    make_policy,
    physics,
    read_system,
    settle,
)
from bnn_driver.loops.counting import StepCounter
from bnn_driver.loops.driver import Driver, DriverSettings
from bnn_driver.loops.execution import make_labelling, make_trainer_place
from bnn_driver.loops.findings import input_findings
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.progress import Progress
from bnn_driver.loops.rewinding import FRAME_FAILED, Rewinding
from bnn_driver.loops.trainer import TrainerProcess
from bnn_driver.loops.walltime import TimeIsUp, WallClock, find_end, reason_of
from bnn_driver.oracle import absolute_paths, fingerprint, load_oracle
from bnn_driver.records import Frames
from bnn_driver.store import weights
from bnn_driver.store.run import EventLog, RunDirectory, announced_labels, read_events, write_atomic

log = logging.getLogger(__name__)

DEFAULT_AUDIT_PROBABILITY = 1e-3
"""When the number of steps is unknown and none is configured."""


def run_session(config_file: Path, walker: str = "", until: str | None = None) -> Path:
    """Start i-PI, drive it to its last step, and return the run directory; the same call resumes.

    Args: walker: one of [ipi.walkers]; empty: the only simulation, [ipi] input.
        until: when to stop, as --until has it; None: in time for the end of the scheduler's job, where there is one.
    Raises: CleanStop when i-PI was told to stop, WallLimit before the end; every other error of `bnn_driver.errors`; KeyboardInterrupt,
        which `stop_on_signals` makes of SIGTERM too, after the books are closed.
    """
    config, base = read_config(config_file), config_file.absolute().parent
    xml = config.ipi.input_of(walker)
    if not xml:
        raise ConfigError(f"{config_file}: ipi.input is missing: `run` starts i-PI on it; with `serve` you start i-PI yourself")
    clock = WallClock(find_end(until), config.run.margin)
    run = RunDirectory(base / config.run.directory, walker)
    with clock.armed(), run.lock("driver"), ExitStack() as stack:
        frames, ipi_input = read_system(config, base, walker)
        if ipi_input is None:
            raise ConfigError(f"{config_file}: ipi.input names no i-PI input")
        _check_input(ipi_input, config)
        simulation = IpiProcess(base / xml, run.ipi_dir, run.log_dir / "ipi.log")
        done = simulation.reached()
        session = stack.enter_context(_open(config, config_file, run, frames, ipi_input, done, clock))
        if simulation.finished():
            session.finish("finished", wait_for_audits=True)
            return run.path
        stack.callback(simulation.stop, STOP_SECONDS, STOP_SECONDS)
        with session.books_closed_on_error():
            _drive(config, simulation, session, _rewinding(config, run, session.driver))
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


def _drive(config: Config, simulation: IpiProcess, session: Session, rewinding: Rewinding) -> None:
    """Answer i-PI until it ends; before a frame that cannot be labelled it goes back and takes another way."""
    while True:
        effective = simulation.start()
        session.begin_at(effective.step)
        client = make_client(config, effective.endpoints, effective.shared_memory, session.driver.respond)
        try:
            session.serve(client, partial(simulation.wait_until_listening, effective, config.ipi.connect_timeout))
            return
        except FRAME_FAILED as error:
            simulation.stop(STOP_SECONDS, STOP_SECONDS)
            if not rewinding.go_back(simulation, session.driver.counter.moment()[0], error):
                raise


def _rewinding(config: Config, run: RunDirectory, driver: Driver) -> Rewinding:
    times = sum(event["kind"] == "rewind" for event in read_events(run.events_dir))

    def tell(step: int, target: int, reason: str) -> None:
        driver.events.append("rewind", step=step, to=target, reason=reason)
        driver.warn(
            f"i-PI goes back from step {step} to {target} and takes another way, for a frame could not be labelled: {reason}"
        )

    return Rewinding(config.oracle.rewinds, config.run.seed, run.walker, tell, times)


def serve_session(
    config_file: Path,
    *,
    unix: bool,
    addresses: list[str],
    port: int,
    prefix: str,
    shared_memory: bool,
    walker: str = "",
    until: str | None = None,
) -> Path:
    """Drive an i-PI that somebody else started, until it says EXIT.  Args, Raises: as `run_session`."""
    config, base = read_config(config_file), config_file.absolute().parent
    config.ipi.input_of(walker)
    clock = WallClock(find_end(until), config.run.margin)
    run = RunDirectory(base / config.run.directory, walker)
    endpoints = [Endpoint("unix", a, prefix=prefix) if unix else Endpoint("inet", a, port) for a in addresses]
    with clock.armed(), run.lock("driver"):
        frames, ipi_input = read_system(config, base, walker)
        if ipi_input is not None:
            _check_input(ipi_input, config)
        with _open(config, config_file, run, frames, ipi_input, ipi_input.step if ipi_input else 0, clock) as session:
            try:
                with session.books_closed_on_error():
                    session.serve(make_client(config, endpoints, shared_memory, session.driver.respond))
            except TimeIsUp:
                ask_to_stop(endpoints, STOP_SECONDS)
                raise
            session.finish("i-PI said EXIT", wait_for_audits=True)
    return run.path


@dataclass
class Session:
    """The parts of a run while it lives."""

    driver: Driver
    events: EventLog
    progress: Progress
    label_seconds: float
    """Time limit of a label."""
    workers: int
    clock: WallClock

    def __post_init__(self) -> None:
        self._at_first = self._reached()
        self.driver.before_asking = self._check_time
        self.clock.progressed = self._progressed

    def serve(self, client: Client, wait_for_ipi: Callable[[], None] = lambda: None) -> None:
        """Answer i-PI until it ends."""
        try:
            wait_for_ipi()
            client.serve()
        except BaseException:
            client.close()
            raise

    @contextlib.contextmanager
    def books_closed_on_error(self) -> Iterator[None]:
        """A context; what it raises, also KeyboardInterrupt on Ctrl-C or SIGTERM, is in the events before it goes on."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            self.clock.disarm()  # from here on it is stopping
            try:
                self.finish(reason_of(error))
            except BnnError as second:
                log.error("while the books were closed: %s", second)
            raise
        finally:
            self.progress.finish()

    def begin_at(self, step: int) -> None:
        """The step at which i-PI really starts: an i-PI that a killed driver left may have gone further than it seemed."""
        self.driver.begin_at(step)
        self.progress.first_step = step
        self._at_first = max(self._at_first, self._reached())  # going back is no progress

    def finish(self, reason: str, *, wait_for_audits: bool = False) -> None:
        """Take the audits that have come, or all that are in flight, and close the books."""
        in_flight = self.driver.labelling.in_flight
        if wait_for_audits and in_flight:
            self.progress.show(self.driver.step, f"waiting for {in_flight} labels", force=True)
        try:
            self.driver.finish(LONGEST * self.label_seconds * -(-in_flight // self.workers) if wait_for_audits else 0.0)
            if wait_for_audits:
                self.driver.labelling.forget_begun()
        except KeyboardInterrupt as error:
            reason = f"{reason}; {reason_of(error)}"
            raise
        finally:
            self.events.append("stop", reason=reason, step=self.driver.step)
            self.progress.finish()

    def _progressed(self) -> bool:
        """Whether this start has brought the run forward."""
        return any(now > then for now, then in zip(self._reached(), self._at_first, strict=True))

    def _reached(self) -> tuple[int, int, int]:
        """Step, labels, generation."""
        return self.driver.step, len(self.driver.labelling.store), self.driver.chains.newest()

    def _check_time(self, count: int) -> None:
        """Before labels are asked for.  Raises: TimeIsUp when they cannot finish."""
        self.clock.check_labels(count, self.driver.labelling.slowest, self.workers, self.label_seconds)


@contextlib.contextmanager
def _open(
    config: Config,
    config_file: Path,
    run: RunDirectory,
    frames: Frames,
    ipi_input: IpiInput | None,
    done: int,
    clock: WallClock,
) -> Iterator[Session]:
    """All parts but i-PI, warm and ready; stopped when the context ends."""
    settle(config.potential.threads)
    base = config_file.absolute().parent
    options = absolute_paths(config.oracle.kind, config.oracle.options, base)
    oracle = load_oracle(config.oracle.kind, options)
    oracle.check(frames)
    promise = make_policy(config, frames.numbers, _audit_probability(config, ipi_input))
    model = load_model(config, config_file.absolute().parent, frames.numbers, config.potential.device)
    with ExitStack() as stack:
        announced = announced_labels(run.events_dir)
        events = stack.enter_context(EventLog(run.events_dir))
        facts = physics(config, frames, model, oracle.physics(), fingerprint(oracle))
        run.fix_settings(effective_settings(config, config_file.absolute().parent), facts, events)
        write_atomic(run.path / "bnn.toml", config_file.read_bytes())
        events.append("start", step=done, config=str(config_file))
        foundation = foundation_generation(model, config.ensemble.members)
        if weights.settle(run.generations_dir) is None:
            weights.publish(run.generations_dir, foundation)
        trainer = TrainerProcess(run, make_trainer_place(config, base, run), config.trainer.stall_timeout)
        stack.callback(trainer.stop)
        trainer.begin()
        labelling = make_labelling(config, options, base, run, oracle, stack)
        progress = Progress(ipi_input.total_steps if ipi_input else None, done)
        driver = _driver(config, frames, ipi_input, done, model, promise, trainer, labelling, events, progress, run.walker)
        driver.announce_missing(announced)
        driver.ensemble.predict(frames)
        driver.foundation.predict(frames)
        yield Session(driver, events, progress, config.oracle.timeout, labelling.executor.workers, clock)


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
        walker, labelling.executor.workers if config.oracle.ask == "worst" else None,
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


def _check_input(found: IpiInput, config: Config) -> None:
    """Raises: ConfigError for settings of the i-PI input that would spoil the run."""
    for text in input_findings(found, config):
        log.warning("%s", text)
