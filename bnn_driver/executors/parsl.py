"""Labels, and the trainer, on whatever Parsl reaches: worker pools on this machine, jobs of a cluster, MPI runs over several nodes.

The only file that knows Parsl.  Of Parsl we take its blocks (jobs), their number, and the way of a task to a worker.  Retries with
pauses, time limits and results on disk are ours: Parsl repeats at once, and its time limits cannot stop compiled code.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import runpy
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from parsl.config import Config
from parsl.dataflow.dflow import DataFlowKernel
from parsl.executors import HighThroughputExecutor, MPIExecutor
from parsl.executors.errors import BadStateException
from parsl.executors.high_throughput.errors import ManagerLost
from parsl.executors.high_throughput.errors import WorkerLost as ParslWorkerLost
from parsl.executors.high_throughput.executor import DEFAULT_INTERCHANGE_LAUNCH_CMD, DEFAULT_LAUNCH_CMD
from parsl.jobs.error_handlers import simple_error_handler, windowed_error_handler
from parsl.launchers import SimpleLauncher, SrunLauncher
from parsl.providers import LocalProvider, SlurmProvider

from bnn_driver.errors import BnnError, ConfigError, EnvironmentProblem, OracleCrashed, WorkerLost
from bnn_driver.executor_config import Mpi, Slurm, drain_period
from bnn_driver.executors.pace import HourlyCap
from bnn_driver.executors.remote import overdue
from bnn_driver.executors.task import label_task

log = logging.getLogger(__name__)

FAILED_BLOCKS = 3
"""Jobs in a row that may fail before the run is stopped."""
CLOSE_LIMIT = 120.0
"""Seconds that Parsl has to end its jobs; commands of a batch system may take a minute."""
TETHER = Path(__file__).with_name("tether.py")
WORKER_POOL = Path(__file__).with_name("process_worker_pool.py")


@dataclass(frozen=True)
class Layout:
    """A Parsl configuration, and how labels, or the trainer, use it."""

    config: Config
    executor: HighThroughputExecutor
    """The one that tasks go to."""
    places: int
    """Tasks at a time when all jobs run."""
    mpi: Mpi | None = None
    queue_timeout: float | None = None
    """s, of a task that waits for a job; None: there is no queue."""


def on_this_machine(
    workers: int, folder: Path, heartbeat: float, accelerators: int | Sequence[str] = 0, label: str = "labels"
) -> Layout:
    """One pool of workers beside the driver.

    Args: folder: for Parsl's own files.   heartbeat: s after which a silent part counts as lost.
        accelerators: their number or names; each worker sees one of them; none: workers are not pinned.   label: of Parsl's executor.
    """
    provider = LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1)
    executor = _htex(label, provider, workers, accelerators, heartbeat, None, address="127.0.0.1")
    return Layout(_config(executor, folder, idle=1e9), executor, workers)


def on_slurm(
    slurm: Slurm, mpi: Mpi | None, timeout: float, folder: Path, heartbeat: float, idle: float, label: str = "labels"
) -> Layout:
    """Jobs of Slurm.  Args: timeout: s, of a label.   idle: s after which jobs without work end.   Otherwise as `on_this_machine`."""
    minutes = int(slurm.walltime // 60)
    drain = drain_period(60.0 * minutes, timeout)
    # without it a step of srun has one core per node
    wide = SrunLauncher(overrides="--cpus-per-task=$SLURM_CPUS_ON_NODE --cpu-bind=none")
    provider = SlurmProvider(
        partition=slurm.partition or None,
        account=slurm.account or None,
        qos=slurm.qos or None,
        constraint=slurm.constraint or None,
        nodes_per_block=slurm.nodes_per_block,
        cores_per_node=slurm.cores_per_node,
        gpus_per_node=slurm.gpus_per_node or None,
        exclusive=slurm.exclusive,
        init_blocks=1,
        min_blocks=0,
        max_blocks=slurm.max_blocks,
        walltime=f"{minutes // 60:02d}:{minutes % 60:02d}:00",
        scheduler_options=slurm.scheduler_options,
        worker_init=slurm.worker_init,
        cmd_timeout=60,
        launcher=SimpleLauncher() if mpi is not None or slurm.nodes_per_block == 1 else wide,
    )
    if mpi is None:
        executor = _htex(label, provider, slurm.workers_per_node, slurm.gpus_per_node, heartbeat, drain)
        places = slurm.max_blocks * slurm.nodes_per_block * slurm.workers_per_node
    else:
        executor = MPIExecutor(
            label=label,
            provider=provider,
            launch_cmd=_pool_command(),
            max_workers_per_block=slurm.nodes_per_block // mpi.nodes,
            mpi_launcher=mpi.launcher,
            encrypted=True,
            **_watch(heartbeat, drain),
        )
        places = slurm.max_blocks * (slurm.nodes_per_block // mpi.nodes)
    return Layout(_config(executor, folder, idle), executor, places, mpi)


def from_file(path: Path, mpi: Mpi | None, timeout: float, folder: Path) -> Layout:
    """The user's own configuration; what it leaves at Parsl's defaults and cannot stay so is filled in, and said.

    Args: path: Python that defines `config`; it is executed.   Otherwise as `on_slurm`.   Raises: ConfigError.
    """
    config = _executed(path)
    if len(config.executors) != 1 or not isinstance(config.executors[0], HighThroughputExecutor):
        kinds = ", ".join(f"{e.label}: {type(e).__name__}" for e in config.executors) or "none"
        raise ConfigError(f"{path}: expected one HighThroughputExecutor or MPIExecutor, got {kinds}")
    executor = config.executors[0]
    if isinstance(executor, MPIExecutor) != (mpi is not None):
        raise ConfigError(
            f"{path}: an MPIExecutor and the table [executor.mpi], which says how large a label is, need each other"
        )
    _complete(path, config, executor, timeout, folder)
    if isinstance(executor, MPIExecutor) or executor.max_workers_per_node != float("inf") or executor.available_accelerators:
        return Layout(config, executor, _places(executor, mpi), mpi)
    raise ConfigError(f"{path}: give {executor.label} max_workers_per_node: it says how many labels run at a time")


def _executed(path: Path) -> Config:
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:  # the border of somebody else's code
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: expected it to define `config`, a parsl.config.Config, got {config!r}")
    return config


def _complete(path: Path, config: Config, executor: HighThroughputExecutor, timeout: float, folder: Path) -> None:
    walltime = _seconds(getattr(executor.provider, "walltime", None))
    if walltime is not None and executor.drain_period is None:
        executor.drain_period = int(drain_period(walltime, timeout))
        log.info("%s: drain_period is not given; tasks are started in the first %d s of a job", path, executor.drain_period)
    if executor.block_error_handler is simple_error_handler:
        executor.block_error_handler = partial(windowed_error_handler, threshold=FAILED_BLOCKS)
        log.info("%s: the default block_error_handler ends an executor that loses its only job; the windowed one is used", path)
    if not executor.encrypted:
        executor.encrypted = True  # what comes over Parsl's sockets is unpickled, and they listen to the network
        log.info(
            "%s: encrypted is not true (for an MPIExecutor by default); Parsl's sockets take nobody without this run's keys", path
        )
    if config.strategy in (None, "none"):
        raise ConfigError(f'{path}: strategy = "none" never replaces a lost job; use "simple"')
    if config.run_dir == "runinfo":
        config.run_dir = str(folder)
    if config.initialize_logging is True:
        config.initialize_logging = False  # or Parsl writes down every poll of its queues, for weeks


def _seconds(walltime: str | None) -> float | None:
    if walltime is None:
        return None
    hours, minutes, seconds = (int(part) for part in walltime.split(":"))
    return 3600.0 * hours + 60.0 * minutes + seconds


def _places(executor: HighThroughputExecutor, mpi: Mpi | None) -> int:
    provider: Any = executor.provider
    nodes = 1 if mpi is not None else provider.nodes_per_block
    return max(1, int(provider.max_blocks * nodes * executor.workers_per_node))


def _htex(
    label: str,
    provider: Any,
    workers: int,
    accelerators: int | Sequence[str],
    heartbeat: float,
    drain: float | None,
    address: str | None = None,
) -> HighThroughputExecutor:
    return HighThroughputExecutor(
        label=label,
        provider=provider,
        launch_cmd=_pool_command(),
        address=address,
        max_workers_per_node=workers,
        cores_per_worker=1e-6,  # as many workers as were asked for, whatever the number of cores
        available_accelerators=accelerators or (),
        **_watch(heartbeat, drain),
    )


def _watch(heartbeat: float, drain: float | None) -> dict[str, Any]:
    """A lost part is noticed within `heartbeat` s; an executor outlives its only job, but not jobs that fail one after the other."""
    return {
        "heartbeat_threshold": max(2, int(heartbeat)),
        "heartbeat_period": max(1, int(heartbeat / 4)),
        "drain_period": None if drain is None else int(drain),
        "block_error_handler": partial(windowed_error_handler, threshold=FAILED_BLOCKS),
    }


def _pool_command() -> str:
    """Parsl's command for workers, by this Python: its scripts need not be on the PATH."""
    pool = f"{shlex.quote(sys.executable)} -P {shlex.quote(str(WORKER_POOL))}"
    return DEFAULT_LAUNCH_CMD.replace("process_worker_pool.py", pool)


def _config(executor: HighThroughputExecutor, folder: Path, idle: float) -> Config:
    return Config(
        executors=[executor],
        run_dir=str(folder),
        strategy="simple",
        strategy_period=1,
        max_idletime=idle,
        retries=0,  # ours have pauses and look into the spool
        initialize_logging=False,
    )


class Deployment:
    """A running Parsl.  It ends with this process, however that ends: workers follow within the heartbeat."""

    def __init__(self, layout: Layout, cap: HourlyCap, heartbeat: float, task: Callable[[str], str] = label_task) -> None:
        """Start; jobs are submitted from now on.

        Args: cap: of jobs.   heartbeat: s for which the interchange may be silent.   task: what workers run.   Raises: EnvironmentProblem.
        """
        self._layout, self._config, self._cap, self._heartbeat, self._task = layout, layout.config, cap, heartbeat, task
        self._executors = [e for e in self._config.executors if isinstance(e, HighThroughputExecutor)]
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._started, self._stop = threading.Event(), threading.Event()
        if any(letter.isspace() for letter in str(Path(self._config.run_dir).absolute())):
            raise EnvironmentProblem(
                f"Parsl cannot work in {self._config.run_dir!r}: there is a space in it; move the run directory"
            )
        # the interchange dies with the thread that started it (PR_SET_PDEATHSIG), so one thread lives as long as Parsl
        self._keeper = threading.Thread(target=self._keep, daemon=True, name="parsl")
        self._keeper.start()
        self._started.wait()
        if self._failure is not None:
            raise EnvironmentProblem(f"Parsl cannot be started: {self._failure}") from self._failure
        atexit.register(self.close)

    def submit(self, text: str, priority: int) -> Future[str]:
        """Have a worker run the task.  Raises: EnvironmentProblem."""
        mpi = self._layout.mpi
        specification = {"priority": priority} if mpi is None else _size(mpi)
        with self._lock:  # Parsl counts tasks and uses its socket without one
            if problem := self.problem():
                raise EnvironmentProblem(problem)
            try:
                future: Future[str] = self._layout.executor.submit(self._task, specification, text)
            except Exception as error:  # the border to Parsl, which raises whatever ended it
                raise EnvironmentProblem(f"Parsl takes no more tasks: {error}") from error
        return future

    @property
    def lifetime(self) -> float | None:
        """s for which a pool of workers takes tasks; None: for ever."""
        return self._layout.executor.drain_period

    def problem(self) -> str:
        """Why no task will ever be finished any more; empty while all is well."""
        return self._problem(self._layout.executor)

    def overdue(self, waited: float) -> str:
        """As `remote.Workers`."""
        return overdue(waited, self._layout.queue_timeout, self._config.run_dir)

    def meaning(self, error: Exception) -> BnnError:
        """Lost workers and nodes, a node that fails, tasks that cannot be run there at all, and the rest."""
        if isinstance(error, (ParslWorkerLost, ManagerLost)):
            return WorkerLost(str(error))
        if isinstance(error, BadStateException):
            return EnvironmentProblem(self.problem() or str(error))
        if isinstance(error, (ImportError, AttributeError)):
            return EnvironmentProblem(
                f"a worker cannot run the task: {type(error).__name__}: {error}; give it the driver's environment (worker_init)"
            )
        if isinstance(error, OSError):
            return WorkerLost(f"{type(error).__name__} on a worker: {error}")
        return OracleCrashed(f"a worker raised {type(error).__name__}: {error}")

    def _problem(self, executor: HighThroughputExecutor) -> str:
        where = f"see {self._config.run_dir} and give the same command again"
        if executor.bad_state_is_set:
            return f"{FAILED_BLOCKS} jobs failed one after the other: {executor.executor_exception}; {where}"
        process = executor.interchange_proc
        if process is not None and process.poll() is not None:
            return f"Parsl's interchange has ended with status {process.returncode}; {where}"
        if not executor.command_client.ok:
            return f"Parsl's interchange has not answered for {self._heartbeat:g} s; {where}"
        return ""

    def close(self) -> None:
        """End all jobs and processes; what runs is lost."""
        self._stop.set()
        self._keeper.join(CLOSE_LIMIT)
        if self._keeper.is_alive():
            log.error("Parsl does not end within %g s; its jobs are ended without it", CLOSE_LIMIT)
            self._end_jobs()
        atexit.unregister(self.close)

    def _keep(self) -> None:
        try:
            for executor in self._executors:
                self._prepare(executor)
            kernel = DataFlowKernel(self._config)
        except Exception as error:  # the border of a thread
            self._failure = error
            self._end_jobs()
            return
        finally:
            self._started.set()
        for executor in self._executors:
            client: Any = executor.command_client
            client.run = partial(client.run, timeout_s=self._heartbeat)  # Parsl waits for ever for a dead interchange,
            outgoing: Any = executor.outgoing_q
            outgoing.zmq_socket.linger = 0  # and for it to take tasks
            outgoing.zmq_socket.sndtimeo = int(1e3 * self._heartbeat)
        with _logged(Path(kernel.run_dir) / "parsl.log"):
            self._stop.wait()
            self._clean_up(kernel)

    def _prepare(self, executor: HighThroughputExecutor) -> None:
        command = executor.interchange_launch_cmd
        if command == DEFAULT_INTERCHANGE_LAUNCH_CMD:
            command = [sys.executable, "-P", "-m", "parsl.executors.high_throughput.interchange"]
        executor.interchange_launch_cmd = [sys.executable, "-P", str(TETHER), str(os.getpid()), *command]
        scale_out = executor.scale_out_facade

        def capped(wanted: int) -> list[str]:
            granted = self._cap.grant(wanted)
            return list(scale_out(granted)) if granted else []

        vars(executor)["scale_out_facade"] = capped

    def _clean_up(self, kernel: DataFlowKernel) -> None:
        for executor in self._executors:
            problem = self._problem(executor)
            if problem and not executor.bad_state_is_set:
                # Parsl would ask the dead for its workers
                with contextlib.suppress(Exception):
                    executor.set_bad_state_and_fail_all(EnvironmentProblem(problem))
            if problem:
                self._end_jobs()
        try:
            kernel.cleanup()
        except Exception:  # the border to Parsl: jobs must be ended whatever it says
            log.exception("while Parsl was shut down")
        self._end_jobs()

    def _end_jobs(self) -> None:
        """End the jobs that Parsl has left, as it does when an executor failed."""
        for executor in self._executors:
            provider: Any = executor.provider
            jobs = list(executor.job_ids_to_block)
            try:
                left = [job for job, status in zip(jobs, provider.status(jobs), strict=True) if not status.terminal]
                if left:
                    provider.cancel(left)
            except Exception:  # as above
                log.exception("jobs %s of Parsl may still run; end them yourself", ", ".join(map(str, jobs)))
            process = executor.interchange_proc
            if process is not None and process.poll() is None:
                process.kill()


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """What Parsl says goes to a file of its own."""
    logger, handler = logging.getLogger("parsl"), logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _size(mpi: Mpi) -> dict[str, Any]:
    return {"num_nodes": mpi.nodes, "ranks_per_node": mpi.ranks_per_node, "num_ranks": mpi.nodes * mpi.ranks_per_node}
