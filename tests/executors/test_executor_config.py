"""[executor] says what it means, or is refused with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnn_driver.config import read_config
from bnn_driver.errors import ConfigError

HEAD = """
[system]
periodic = false
[accuracy]
energy = "1 kcal/mol"
[oracle]
kind = "toy"
timeout = "10 min"
"""
SLURM = """
[executor]
kind = "parsl"
jobs_per_hour = 12
[executor.slurm]
partition = "short"
walltime = "4 h"
nodes_per_block = 4
max_blocks = 2
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "bnn.toml"
    path.write_text(HEAD + text, encoding="utf-8")
    return path


def test_labels_are_computed_here_unless_something_else_is_said(tmp_path: Path) -> None:
    assert read_config(written(tmp_path, "")).executor.kind == "local"


def test_units_end_at_the_config(tmp_path: Path) -> None:
    executor = read_config(written(tmp_path, SLURM + "[executor.mpi]\nnodes = 2\nranks_per_node = 64\n")).executor
    assert executor.slurm is not None
    assert executor.mpi is not None
    assert (executor.slurm.walltime, executor.idle, executor.heartbeat, executor.jobs_per_hour) == (14400.0, 600.0, 60.0, 12)
    assert executor.queue_timeout == 7 * 86400.0
    assert (executor.mpi.nodes, executor.mpi.launcher) == (2, "srun")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[executor]\nkind = "dask"\n', "executor.kind: Input should be 'local' or 'parsl'"),
        ("[executor]\njobs_per_hour = 3\n", 'knows no jobs_per_hour; set kind = "parsl"'),
        (SLURM.replace('walltime = "4 h"', ""), "executor.slurm.walltime is missing"),
        (SLURM.replace('"4 h"', "4"), "unit is missing"),
        (SLURM.replace('"4 h"', '"5 min"'), "a job of 300 s is too short for labels of up to 600 s"),
        (SLURM.replace('"4 h"', '"11 min"'), "walltime must be at least 750 s"),
        (SLURM.replace("partition", "partitoin"), "did you mean 'partition'"),
        (SLURM.replace("max_blocks = 2", "exclusive = false"), "one core unless cores_per_node is given"),
        (SLURM.replace("max_blocks = 2", "gpus_per_node = 2\nworkers_per_node = 3"), "each worker has a GPU of its own"),
        (SLURM.replace("jobs_per_hour = 12", 'config = "parsl.py"'), "and not both"),
        (SLURM + "[executor.mpi]\nnodes = 3\nranks_per_node = 64\n", "is no multiple of it"),
        (SLURM + "workers_per_node = 2\n[executor.mpi]\nranks_per_node = 64\n", "remove workers_per_node"),
        (SLURM + "[executor.mpi]\nnodes = 2\n", "executor.mpi.ranks_per_node is missing"),
        ('[executor]\nkind = "parsl"\n[executor.mpi]\nranks_per_node = 4\n', "needs nodes to run on"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(written(tmp_path, text))
    assert says in str(caught.value)


@pytest.mark.parametrize("form", [SLURM, '[executor]\nkind = "parsl"\nconfig = "parsl.py"\n'])
def test_workers_are_counted_in_one_place(tmp_path: Path, form: str) -> None:
    path = tmp_path / "bnn.toml"
    path.write_text(HEAD.replace('kind = "toy"', 'kind = "toy"\nworkers = 4') + form)
    with pytest.raises(ConfigError, match=r"\[oracle\] workers counts processes of one machine.*remove it") as caught:
        read_config(path)
    assert "got {" not in str(caught.value)


CHAINS = """
[trainer]
executor = "parsl"
device = "cuda"
[trainer.slurm]
walltime = "8 h"
gpus_per_node = 1
"""


def test_chains_move_here_unless_something_else_is_said(tmp_path: Path) -> None:
    trainer = read_config(written(tmp_path, "")).trainer
    assert (trainer.executor, trainer.slurm, trainer.accelerators) == ("local", None, ())
    trainer = read_config(written(tmp_path, CHAINS)).trainer
    assert trainer.slurm is not None
    assert (trainer.slurm.walltime, trainer.slurm.gpus_per_node, trainer.heartbeat) == (28800.0, 1, 60.0)
    here = read_config(written(tmp_path, '[trainer]\nexecutor = "parsl"\naccelerators = ["1", "GPU-5fa2"]\n')).trainer
    assert here.accelerators == ("1", "GPU-5fa2")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[trainer]\nexecutor = "dask"\n', "trainer.executor: Input should be 'local' or 'parsl'"),
        (CHAINS.replace('executor = "parsl"', ""), 'executor = "local" knows no slurm; set executor = "parsl"'),
        ('[trainer]\naccelerators = ["0"]\n', 'knows no accelerators; set executor = "parsl"'),
        (CHAINS.replace("[trainer.slurm]", 'config = "parsl.py"\n[trainer.slurm]'), "and not both"),
        (CHAINS.replace("[trainer.slurm]", 'accelerators = ["0"]\n[trainer.slurm]'), "here slurm.gpus_per_node says which"),
        ('[trainer]\nexecutor = "parsl"\nconfig = "p.py"\naccelerators = ["0"]\n', "available_accelerators in p.py says"),
        (CHAINS + "max_blocks = 2\n", "one process on one node: remove max_blocks from slurm"),
        (CHAINS.replace('"8 h"', '"2 min"'), "give at least 300 s"),
        (CHAINS.replace("gpus_per_node = 1", ""), 'device = "cuda", but jobs without slurm.gpus_per_node see no GPU'),
        (CHAINS.replace("walltime", "waltime"), "did you mean 'walltime'"),
    ],
)
def test_a_trainer_that_cannot_work_is_refused_with_the_way_out(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(written(tmp_path, text))
    assert says in str(caught.value)
