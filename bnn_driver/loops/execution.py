"""The executor that a config asks for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bnn_driver.config import Config
from bnn_driver.errors import ConfigError, EnvironmentProblem
from bnn_driver.executors.children import Job
from bnn_driver.executors.local import LocalExecutor
from bnn_driver.executors.pool import Pool
from bnn_driver.executors.remote import RemoteExecutor
from bnn_driver.oracle import Limits, fingerprint, load_oracle


def make_executor(config: Config, options: dict[str, Any], base: Path, folder: Path, spool: Path) -> Pool:
    """What labels frames, ready to use.

    Args: options: of [oracle.KIND], paths absolute.   base: folder of the config file.   folder: for work and logs.
        spool: of finished and failed labels.
    Raises: ConfigError; EnvironmentProblem where Parsl or the batch system cannot be used.
    """
    o, work = config.oracle, folder / "work"
    limits = Limits(min_distance=config.sanity.min_distance, max_force=config.sanity.max_force)
    if config.executor.kind == "local":
        return LocalExecutor(o.kind, options, o.workers, o.timeout, work, o.threads, spool, limits=limits)
    name = fingerprint(load_oracle(o.kind, options))
    return _on_parsl(config, base, folder, Job(o.kind, options, name, str(spool.resolve()), o.timeout, o.threads, limits), work)


def _on_parsl(config: Config, base: Path, folder: Path, job: Job, work: Path) -> RemoteExecutor:
    try:
        from bnn_driver.executors import parsl
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            f"[executor] kind = \"parsl\" needs the package {error.name}: pip install 'bnn-driver[parsl]'"
        ) from error
    except ImportError as error:
        raise EnvironmentProblem(f"this version of Parsl does not fit ({error}): pip install 'bnn-driver[parsl]'") from error
    e, own = config.executor, folder / "parsl"
    if e.slurm is not None:
        if shutil.which("sbatch") is None:
            raise EnvironmentProblem("[executor.slurm] sbatch is no program here; start the driver where jobs can be submitted")
        layout = parsl.on_slurm(e.slurm, e.mpi, job.timeout, own, e.heartbeat, e.idle)
    elif e.config:
        layout = parsl.from_file(_existing(base / e.config), e.mpi, job.timeout, own)
    else:
        layout = parsl.on_this_machine(config.oracle.workers, own, e.heartbeat)
    return RemoteExecutor(job, parsl.Deployment(layout, e.jobs_per_hour, e.heartbeat), layout.places, work)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"[executor] config: there is no file {path}")
    return path
