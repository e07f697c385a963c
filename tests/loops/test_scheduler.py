"""The end of a job, from the variables and commands of its scheduler; stand-ins print what we know of the real ones."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path

import pytest

from bnn_driver.loops.scheduler import current_job


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An otherwise empty folder of commands, which is the whole PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PBS_", "LSB_")):
            monkeypatch.delenv(name)
    return tmp_path


def command(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def local(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_outside_of_a_job_there_is_none(tools: Path) -> None:
    assert current_job() is None


def test_slurm_says_its_end_in_a_variable(tools: Path) -> None:
    job = current_job({"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": "1900000000"})
    assert job is not None
    assert (job.end, str(job)) == (1900000000.0, "Slurm job 17")


def test_an_older_slurm_is_asked_by_squeue(tools: Path) -> None:
    command(tools, "squeue", '[ "$*" = "-h -j 17 -o %e" ] && echo 2026-11-21T23:30:00')
    job = current_job({"SLURM_JOB_ID": "17"})
    assert job is not None
    assert (job.end, job.source) == (local("2026-11-21T23:30:00"), "squeue")


def test_where_squeue_fails_scontrol_is_asked(tools: Path) -> None:
    command(tools, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    command(tools, "scontrol", "echo '   StartTime=2026-11-21T22:30:00 EndTime=2026-11-21T23:30:00 Deadline=N/A'")
    job = current_job({"SLURM_JOB_ID": "17"})
    assert job is not None
    assert (job.end, job.source) == (local("2026-11-21T23:30:00"), "scontrol")


def test_a_job_without_limit_has_no_end(tools: Path) -> None:
    command(tools, "squeue", "echo N/A")
    command(tools, "scontrol", "echo ' EndTime=Unknown '")
    job = current_job({"SLURM_JOB_ID": "17"})
    assert job is not None
    assert job.end is None
    assert "squeue" in job.source


PBS = """Job Id: 42.server
    Job_Name = bnn
    resources_used.walltime = 00:12:00
    Resource_List.walltime = 02:30:00
    stime = Sat Nov 21 22:00:00 2026
"""


def test_pbs_tells_start_and_limit(tools: Path) -> None:
    command(tools, "qstat", f"printf '%s' '{PBS}'")
    job = current_job({"PBS_JOBID": "42.server"})
    assert job is not None
    assert job.end == local("2026-11-22T00:30:00")


def test_torque_without_qstat_counts_from_the_first_shell(tools: Path) -> None:
    job = current_job({"PBS_JOBID": "42", "PBS_WALLTIME": "3600"})
    assert job is not None
    assert job.end is not None
    assert job.source == "PBS_WALLTIME"
    assert job.end <= time.time() + 3600, "the job began before this process"


def test_lsf_tells_what_is_left(tools: Path) -> None:
    command(tools, "bjobs", "echo '1:30 L'")
    job = current_job({"LSB_JOBID": "9"})
    assert job is not None
    assert job.end == pytest.approx(time.time() + 5400, abs=5)
    command(tools, "bjobs", "echo '-'")
    unknown = current_job({"LSB_JOBID": "9"})
    assert unknown is not None
    assert unknown.end is None
