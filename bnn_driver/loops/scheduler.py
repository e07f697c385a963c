"""The job that this process runs in, and when its scheduler will end it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

COMMAND_SECONDS = 20.0
"""How long a scheduler may take to answer."""


@dataclass(frozen=True)
class Job:
    """One job of a scheduler."""

    scheduler: str
    number: str
    end: float | None
    """s since 1970; None: not to be found out, or without limit."""
    source: str
    """What said so, or why nothing did."""

    def __str__(self) -> str:
        return f"{self.scheduler} job {self.number}"


def current_job(environment: Mapping[str, str] | None = None) -> Job | None:
    """The job of this process by the variables that Slurm, PBS and LSF set; None outside of any."""
    known = os.environ if environment is None else environment
    if number := known.get("SLURM_JOB_ID"):
        return _slurm(number, known)
    if number := known.get("PBS_JOBID"):
        return _pbs(number, known)
    if number := known.get("LSB_JOBID"):
        return _lsf(number)
    return None


def _slurm(number: str, known: Mapping[str, str]) -> Job:
    """SLURM_JOB_END_TIME (Slurm 22.05 and later), else squeue, else scontrol."""
    text = known.get("SLURM_JOB_END_TIME", "")
    if text.isdigit():
        return Job("Slurm", number, float(text), "SLURM_JOB_END_TIME")
    said = _asked(["squeue", "-h", "-j", number, "-o", "%e"])
    if (end := _date(said, datetime.fromisoformat)) is not None:
        return Job("Slurm", number, end, "squeue")
    found = re.search(r"EndTime=(\S+)", _asked(["scontrol", "show", "job", number]))
    if found and (end := _date(found[1], datetime.fromisoformat)) is not None:
        return Job("Slurm", number, end, "scontrol")
    return Job("Slurm", number, None, "neither SLURM_JOB_END_TIME nor squeue nor scontrol tells its end")


def _pbs(number: str, known: Mapping[str, str]) -> Job:
    """The start and the wall time that qstat prints, else PBS_WALLTIME (Torque) from the start of the job's shell."""
    said = _asked(["qstat", "-f", number])
    limit = re.search(r"Resource_List\.walltime = (\d+):(\d+):(\d+)", said)
    begun = re.search(r"(?:stime|start_time) = (\S.*)", said)
    start = _date(begun[1], lambda text: datetime.strptime(text, "%a %b %d %H:%M:%S %Y")) if begun else None
    if limit and start is not None:
        hours, minutes, seconds = (int(x) for x in limit.groups())
        return Job("PBS", number, start + 3600 * hours + 60 * minutes + seconds, "qstat")
    text = known.get("PBS_WALLTIME", "")
    if text.isdigit():
        return Job("PBS", number, _first_shell() + int(text), "PBS_WALLTIME")
    return Job("PBS", number, None, "neither qstat nor PBS_WALLTIME tells its end")


def _lsf(number: str) -> Job:
    """What bjobs says is left before the hard limit, in hours and minutes."""
    left = re.match(r"\s*(\d+):(\d+) L", _asked(["bjobs", "-noheader", "-o", "time_left", number]))
    if left:
        return Job("LSF", number, time.time() + 3600 * int(left[1]) + 60 * int(left[2]), "bjobs")
    return Job("LSF", number, None, "bjobs does not tell its end")


def _asked(command: list[str]) -> str:
    """What a command of the scheduler prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _date(text: str, parse: Callable[[str], datetime]) -> float | None:
    """s since 1970 of a local time; None for "N/A", "Unknown" and other words."""
    try:
        return parse(text.strip()).timestamp()
    except ValueError:
        return None


def _first_shell() -> float:
    """s since 1970 when the oldest ancestor of this process that belongs to its user began: the job's own shell."""
    import psutil  # here, as `doctor` uses this file also where it is not installed

    user, here = os.getuid(), psutil.Process()
    return min(p.create_time() for p in [here, *here.parents()] if p == here or p.uids().real == user)
