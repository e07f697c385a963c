"""A real Slurm, of one node if need be: `apt-get install slurmctld slurmd munge`, then `pytest -m slurm`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from third_party import MPI, SLOW, calls, helium, install

pytest.importorskip("parsl")
from deployments import deploy, ended, eventually

from bnn_driver.executor_config import Mpi, Slurm
from bnn_driver.executors.pace import HourlyCap
from bnn_driver.executors.parsl import Deployment, Layout, on_slurm
from bnn_driver.executors.remote import RemoteExecutor
from bnn_driver.loops.remote_trainer import MARK, OnParsl
from bnn_driver.loops.trainer_task import run_trainer
from bnn_driver.store.run import RunDirectory, read_json


def answers() -> bool:
    return shutil.which("sbatch") is not None and subprocess.run(["sinfo"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(not answers(), reason="no Slurm answers here"),
    # Parsl leaves sockets open where it looks for the addresses of this machine
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]


def jobs() -> set[str]:
    listed = subprocess.run(["squeue", "--noheader", "--format=%i %j"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if "parsl." in line}


def layout(tmp_path: Path, timeout: float, mpi: Mpi | None = None, **options: object) -> Layout:
    slurm = Slurm.model_validate({"walltime": "30 min", **options})
    return on_slurm(slurm, mpi, timeout, tmp_path / "parsl", 8.0, 60.0)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    install(tmp_path / "site", monkeypatch)
    started: list[RemoteExecutor] = []
    before = jobs()

    def begin(timeout: float = 20.0, mpi: Mpi | None = None, **options: object) -> RemoteExecutor:
        shape = layout(tmp_path, timeout, mpi, **options)
        started.append(deploy(tmp_path, "faulty", timeout=timeout, layout=shape, heartbeat=8.0))
        return started[-1]

    yield begin
    for executor in started:
        executor.shutdown(wait=False)
    assert eventually(lambda: not jobs() - before)


def test_labels_through_sbatch(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    executor = start(workers_per_node=2)
    assert executor.workers == 2
    futures = [executor.submit(helium(x=float(n))) for n in range(6)]
    assert [f.result(timeout=180).energy for f in futures] == [0.0] * 6
    assert len(jobs()) == 1


def test_a_cancelled_job_is_replaced(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    executor = start()
    future = executor.submit(helium(SLOW))
    assert eventually(lambda: (tmp_path / "work" / "calls").exists())
    first = jobs()
    subprocess.run(["scancel", *first], check=True)
    assert future.result(timeout=240).energy == -8.0
    assert calls(tmp_path / "work") == 2
    assert jobs().isdisjoint(first)


def test_no_label_is_cut_by_the_end_of_a_job(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    executor = start(timeout=10.0, walltime="2 min")
    futures = [executor.submit(helium(SLOW, x=float(n))) for n in range(36)]  # 4 s each: more than one job has
    assert [f.result(timeout=400).energy for f in futures] == [-8.0] * 36
    assert calls(tmp_path / "work") == 36
    assert len(list((tmp_path / "parsl" / "000" / "submit_scripts").glob("*.stdout"))) > 1


def test_a_label_on_several_ranks_starts_them_with_parsls_prefix(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    executor = start(mpi=Mpi(nodes=1, ranks_per_node=2))
    evidence = executor.submit(helium(MPI)).result(timeout=180).evidence
    prefix, ranks = evidence.split(";")
    assert prefix.startswith("srun --ntasks 2 --ntasks-per-node 2")
    assert sorted(ranks.split()) == ["0", "1"]


def test_the_trainer_runs_in_a_job_and_is_submitted_again_when_that_is_cancelled(tmp_path: Path) -> None:
    before = jobs()

    def deploy() -> Deployment:
        slurm = Slurm.model_validate({"walltime": "30 min"})
        return Deployment(on_slurm(slurm, None, 30.0, tmp_path / "parsl", 8.0, 60.0, "chains"), HourlyCap(30), 8.0, run_trainer)

    def begun() -> bool:
        assert place.ended() == ""
        return not place.waits()

    place = OnParsl(RunDirectory(tmp_path / "run"), 1, deploy)
    with place.run.lock("trainer"):  # it stands by in its job
        try:
            place.start()
            assert eventually(begun)
            first, mark = jobs() - before, read_json(tmp_path / "run" / MARK)
            assert len(first) == 1
            subprocess.run(["scancel", *first], check=True)
            assert eventually(lambda: ended(mark["pid"]), 30)
            assert eventually(lambda: place.ended().startswith("was lost: "), 60)
            place.start()
            assert eventually(begun, 180)
            assert (jobs() - before).isdisjoint(first)
            assert read_json(tmp_path / "run" / MARK)["attempt"] != mark["attempt"]
        finally:
            place.stop()
    assert eventually(lambda: not jobs() - before)
