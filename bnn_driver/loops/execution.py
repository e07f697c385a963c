"""The executor of labels that a config asks for, the desk before it, and the place of the trainer."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from bnn_driver.config import Config
from bnn_driver.errors import ConfigError, EnvironmentProblem
from bnn_driver.executor_config import ParslSettings
from bnn_driver.executors.children import Job
from bnn_driver.executors.local import LocalExecutor
from bnn_driver.executors.pace import HourlyCap
from bnn_driver.executors.pool import Pool
from bnn_driver.executors.remote import RemoteExecutor
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.quarantine import Quarantine, settings_digest
from bnn_driver.loops.remote_trainer import Deployed, OnParsl
from bnn_driver.loops.trainer import Here, Place
from bnn_driver.loops.trainer_task import run_trainer
from bnn_driver.oracle import Limits, Oracle, fingerprint, load_oracle
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.files import shared_list
from bnn_driver.store.run import RunDirectory

CHAINS = "chains"
"""Label of the trainer's executor in Parsl."""
END_MARGIN = 30.0
"""Seconds at the end of a job in which the trainer must not begin; half a minute more is kept by `drain_period`."""

JOBS = "jobs.json"
"""When jobs were submitted; beside the spool, which all walkers share."""


def limits_of(config: Config) -> Limits:
    """What no label may go beyond."""
    return Limits(min_distance=config.sanity.min_distance, max_force=config.sanity.max_force)


def make_executor(config: Config, options: dict[str, Any], base: Path, folder: Path, spool: Path) -> Pool:
    """What labels frames, ready to use.

    Args: options: of [oracle.KIND], paths absolute.   base: folder of the config file.   folder: for work and logs.
        spool: of finished and failed labels.
    Raises: ConfigError; EnvironmentProblem where Parsl or the batch system cannot be used.
    """
    o, work = config.oracle, folder / "work"
    limits = limits_of(config)
    if config.executor.kind == "local":
        return LocalExecutor(o.kind, options, o.workers, o.timeout, work, o.threads, spool, limits=limits)
    name = fingerprint(load_oracle(o.kind, options))
    return _on_parsl(config, base, folder, Job(o.kind, options, name, str(spool.resolve()), o.timeout, o.threads, limits), work)


def _on_parsl(config: Config, base: Path, folder: Path, job: Job, work: Path) -> RemoteExecutor:
    e, own = config.executor, folder / "parsl"
    parsl = _parsl('[executor] kind = "parsl"')
    if e.slurm is not None:
        _look_for_sbatch("[executor.slurm]")
        layout = parsl.on_slurm(e.slurm, e.mpi, job.timeout, own, e.heartbeat, e.idle)
    elif e.config:
        layout = parsl.from_file(_existing(base / e.config, "[executor]"), e.mpi, job.timeout, own)
    else:
        layout = parsl.on_this_machine(config.oracle.workers, own, e.heartbeat)
    deployment = parsl.Deployment(_patient(layout, e), _cap(e, Path(job.spool)), e.heartbeat)
    return RemoteExecutor(job, deployment, layout.places, work)


def make_trainer_place(config: Config, base: Path, run: RunDirectory) -> Place:
    """Where the trainer is to run; its `start` raises ConfigError for a Parsl file that cannot work.

    Args: base: folder of the config file.   Raises: as `make_executor`.
    """
    t = config.trainer
    if t.executor == "local":
        return Here(run, t.threads)
    parsl = _parsl('[trainer] executor = "parsl"')
    if t.slurm is not None:
        _look_for_sbatch("[trainer.slurm]")
    file = _existing(base / t.config, "[trainer]") if t.config else None
    own = run.home / "trainer"

    def deploy() -> Deployed:
        if t.slurm is not None:
            layout = parsl.on_slurm(t.slurm, None, END_MARGIN, own, t.heartbeat, t.idle, CHAINS)
        elif file is not None:
            layout = parsl.from_file(file, None, END_MARGIN, own)
        else:
            layout = parsl.on_this_machine(1, own, t.heartbeat, t.accelerators, CHAINS)
        deployment: Deployed = parsl.Deployment(_patient(layout, t), _cap(t, run.spool_dir), t.heartbeat, run_trainer)
        return deployment

    return OnParsl(run, t.threads, deploy)


def _cap(settings: ParslSettings, spool: Path) -> HourlyCap:
    """One for all jobs of a run: of its walkers, the trainer and earlier starts.  Worker pools of this machine, which are no jobs that
    others wait for, count for each process alone."""
    if _is_here(settings):
        return HourlyCap(settings.jobs_per_hour)
    return HourlyCap(settings.jobs_per_hour, partial(shared_list, spool.parent / JOBS))


def _patient(layout: Any, settings: ParslSettings) -> Any:
    """The layout, whose tasks wait as long as a queue may take."""
    return layout if _is_here(settings) else replace(layout, queue_timeout=settings.queue_timeout)


def _is_here(settings: ParslSettings) -> bool:
    return settings.slurm is None and not settings.config


def _parsl(what: str) -> Any:
    """The module that knows Parsl.  Args: what: setting that needs it."""
    try:
        from bnn_driver.executors import parsl
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(f"{what} needs the package {error.name}: pip install 'bnn-driver[parsl]'") from error
    except ImportError as error:
        raise EnvironmentProblem(f"this version of Parsl does not fit ({error}): pip install 'bnn-driver[parsl]'") from error
    return parsl


def _look_for_sbatch(table: str) -> None:
    if shutil.which("sbatch") is None:
        raise EnvironmentProblem(f"{table} sbatch is no program here; start the driver where jobs can be submitted")


def _existing(path: Path, table: str) -> Path:
    if not path.is_file():
        raise ConfigError(f"{table} config: there is no file {path}")
    return path


def make_labelling(
    config: Config, options: dict[str, Any], base: Path, run: RunDirectory, oracle: Oracle, stack: ExitStack
) -> Labelling:
    """The desk between a run and its oracle, with what a killed start had begun finished or asked again.

    Args: options: of [oracle.KIND], paths absolute.   base: folder of the config file.   stack: ends the executor.
    """
    executor = make_executor(config, options, base, run.oracle_dir, run.spool_dir)
    stack.callback(executor.shutdown, wait=False)
    name = fingerprint(oracle)
    o, limits = config.oracle, limits_of(config)
    tried = settings_digest(o.kind, options, o.timeout, o.threads, asdict(limits))
    quarantine = Quarantine(run.oracle_dir / "quarantine", tried)
    pending = run.oracle_dir / "pending"
    labelling = Labelling(LabelStore(run.labels_dir), executor, pending, name, o.max_labels, quarantine, run.walker, oracle.code)
    labelling.recover(run.spool_dir)
    return labelling
