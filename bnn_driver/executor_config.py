"""The table [executor]: where labels are computed; and what it shares with [trainer]."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from bnn_driver.errors import ConfigError
from bnn_driver.sections import Seconds, Section

SHORTEST_USE = 30.0
"""Seconds for which a job must at least take labels, or it would end before its workers have started."""

SHORTEST_TRAINER_JOB = 300.0
"""Seconds of a job that the trainer runs in."""


def drain_period(walltime: float, timeout: float) -> float:
    """Seconds after which a job takes no more labels, so that its last one ends before the job does.

    Between the two lies the time limit of a label and a fifth of it, at least half a minute, for the start of the workers.
    Args: walltime: s, of a job.   timeout: s, of a label.   Raises: ConfigError if no label would ever fit in.
    """
    period = walltime - timeout - max(0.2 * timeout, 30.0)
    if period < SHORTEST_USE:
        raise ConfigError(
            f"a job of {walltime:g} s is too short for labels of up to {timeout:g} s ([oracle] timeout): none could be started that is "
            f"sure to finish; walltime must be at least {walltime - period + SHORTEST_USE:g} s"
        )
    return period


class Slurm(Section):
    """Jobs of a Slurm cluster, which Parsl calls blocks."""

    walltime: Seconds
    """Of one job, whole minutes."""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    nodes_per_block: int = Field(default=1, ge=1)
    max_blocks: int = Field(default=1, ge=1)
    """Jobs at a time."""
    workers_per_node: int = Field(default=1, ge=1)
    """Labels at a time on one node, each with [oracle] threads."""
    cores_per_node: int | None = Field(default=None, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    """Each worker sees one of them."""
    exclusive: bool = True
    """Nodes are not shared with other jobs."""
    worker_init: str = ""
    """Shell commands before a worker starts, such as "module load ..."."""
    scheduler_options: str = ""
    """More lines that begin with #SBATCH."""

    @model_validator(mode="after")
    def _can_work(self) -> Slurm:
        if self.walltime < 60:
            raise ValueError(f"walltime is {self.walltime:g} s, but Slurm counts minutes; give at least one")
        if not self.exclusive and self.cores_per_node is None:
            raise ValueError("exclusive = false gives one core unless cores_per_node is given")
        if self.gpus_per_node and self.workers_per_node > self.gpus_per_node:
            raise ValueError(
                f"workers_per_node = {self.workers_per_node}, but each worker has a GPU of its own and gpus_per_node = {self.gpus_per_node}"
            )
        return self


class Mpi(Section):
    """Labels that run on several nodes each: the oracle's command starts with $PARSL_MPI_PREFIX."""

    nodes: int = Field(default=1, ge=1)
    """Of one label."""
    ranks_per_node: int = Field(ge=1)
    launcher: Literal["srun", "mpiexec", "aprun"] = "srun"
    """What $PARSL_MPI_PREFIX stands for in the short form; in a file of your own its MPIExecutor says it."""


class ParslSettings(Section):
    """Where Parsl's workers are: by your own file, in jobs of Slurm, or, with neither, on this machine."""

    config: str = ""
    """A Python file that defines `config`, a parsl.config.Config; it is executed.  Relative to the config file."""
    slurm: Slurm | None = None
    jobs_per_hour: int = Field(default=30, ge=1)
    """Jobs submitted within any hour by all processes of a run together; beyond it labels, or the trainer, wait."""
    heartbeat: Seconds = Field(default="1 min", ge=4)  # type: ignore[assignment]
    """A worker, node or driver of which nothing is heard for so long counts as lost."""
    queue_timeout: Seconds = Field(default="7 d", gt=0)  # type: ignore[assignment]
    """A label, or the trainer, for which no job has begun after so long ends the run."""
    idle: Seconds = "10 min"  # type: ignore[assignment]
    """Jobs without work are given back after this."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.config and self.slurm is not None:
            raise ValueError("give config, your own Parsl file, or the table slurm, and not both")
        return self


class ExecutorSettings(ParslSettings):
    """Processes on this machine, or Parsl: your own file, jobs of Slurm, or, with neither, one worker pool on this machine."""

    kind: Literal["local", "parsl"] = "local"
    mpi: Mpi | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> ExecutorSettings:
        given = self.model_fields_set - {"kind"}
        if self.kind == "local" and given:
            raise ValueError(f'kind = "local" knows no {", ".join(sorted(given))}; set kind = "parsl"')
        if self.mpi is not None and not self.config and self.slurm is None:
            raise ValueError("the table mpi needs nodes to run on: give the table slurm, or config")
        if self.mpi is not None and self.slurm is not None:
            _fits(self.mpi, self.slurm)
        return self

    def check(self, timeout: float, workers_given: bool) -> None:
        """What must fit [oracle].

        Args: timeout: s, of a label.   workers_given: [oracle] workers stands in the file.   Raises: ConfigError.
        """
        if self.slurm is not None:
            drain_period(self.slurm.walltime, timeout)
        if workers_given and (self.slurm is not None or self.config):
            where = "[executor.slurm] max_blocks, nodes_per_block and workers_per_node" if self.slurm else f"{self.config}"
            raise ConfigError(
                f"[oracle] workers counts processes of one machine, but here {where} says how many there are; remove it"
            )


class TrainerSettings(ParslSettings):
    """The process that moves the chains: a child of the driver, or a task of Parsl that lasts as long as its job."""

    max_lag: int = Field(default=0, ge=0)
    """Labels that may be known but not yet learnt while frames are served; 0 waits for the chains (published)."""
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    update_retries: int = Field(default=1, ge=0)
    stall_timeout: Seconds = "30 min"  # type: ignore[assignment]
    """Without a single step of the chains for so long the trainer is taken for hung and started again."""
    executor: Literal["local", "parsl"] = "local"
    accelerators: tuple[str, ...] = ()
    """Names of those of this machine, as CUDA_VISIBLE_DEVICES takes them; the trainer sees one of them.  For jobs slurm.gpus_per_node says
    how many there are, for a file of your own its available_accelerators."""

    @model_validator(mode="after")
    def _fits_its_executor(self) -> TrainerSettings:
        given = self.model_fields_set & {*ParslSettings.model_fields, "accelerators"}
        if self.executor == "local" and given:
            raise ValueError(f'executor = "local" knows no {", ".join(sorted(given))}; set executor = "parsl"')
        if self.accelerators and (self.slurm is not None or self.config):
            instead = "slurm.gpus_per_node" if self.slurm else f"available_accelerators in {self.config}"
            raise ValueError(f"accelerators are those of a worker on this machine; here {instead} says which there are")
        if self.slurm is not None:
            _holds_one_trainer(self.slurm, self.device)
        return self


def _holds_one_trainer(slurm: Slurm, device: str) -> None:
    if many := [key for key in ("nodes_per_block", "max_blocks", "workers_per_node") if getattr(slurm, key) > 1]:
        raise ValueError(f"the trainer is one process on one node: remove {', '.join(many)} from slurm")
    if slurm.walltime < SHORTEST_TRAINER_JOB:
        raise ValueError(
            f"slurm.walltime is {slurm.walltime:g} s, but an update that its job does not finish is begun again by the next one; "
            f"give at least {SHORTEST_TRAINER_JOB:g} s"
        )
    if device.startswith("cuda") and not slurm.gpus_per_node:
        raise ValueError(f'device = "{device}", but jobs without slurm.gpus_per_node see no GPU; set it to 1')


def _fits(mpi: Mpi, slurm: Slurm) -> None:
    if slurm.nodes_per_block % mpi.nodes:
        raise ValueError(
            f"a label takes {mpi.nodes} nodes (mpi.nodes), but slurm.nodes_per_block = {slurm.nodes_per_block} is no multiple of it"
        )
    if "workers_per_node" in slurm.model_fields_set or slurm.gpus_per_node:
        raise ValueError("with the table mpi a label has whole nodes: remove workers_per_node and gpus_per_node from slurm")
