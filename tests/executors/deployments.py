"""Real Parsl deployments for tests, and the processes that they consist of."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from bnn_driver.executors.children import Job
from bnn_driver.executors.pace import HourlyCap
from bnn_driver.executors.parsl import Deployment, Layout, on_this_machine
from bnn_driver.executors.remote import RemoteExecutor
from bnn_driver.oracle import Limits, fingerprint, load_oracle

HEARTBEAT = 4.0
LIMITS = Limits(min_distance=0.01, covalent_fraction=0.0, max_force=1e6)


def make_job(folder: Path, kind: str, settings: dict[str, Any], timeout: float) -> Job:
    name = fingerprint(load_oracle(kind, settings))
    return Job(kind, settings, name, str(folder / "spool"), timeout, 1, LIMITS)


def deploy(
    folder: Path,
    kind: str = "toy",
    settings: dict[str, Any] | None = None,
    *,
    timeout: float = 20.0,
    workers: int = 1,
    layout: Layout | None = None,
    jobs_per_hour: int = 30,
    heartbeat: float = HEARTBEAT,
) -> RemoteExecutor:
    """An executor of one worker pool on this machine, or of another layout; its processes carry the folder's name."""
    job = make_job(folder, kind, settings or {}, timeout)
    layout = layout or on_this_machine(workers, folder / "parsl", heartbeat)
    return RemoteExecutor(job, Deployment(layout, HourlyCap(jobs_per_hour), heartbeat), layout.places, folder / "work")


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or not alive(psutil.Process(pid))


def pools(folder: Path) -> list[psutil.Process]:
    """The worker pools of a deployment (Parsl's managers)."""
    found = []
    for process, line in _all():
        text = " ".join(line)
        if str(folder) in text and "process_worker_pool" in text and "python" in Path(line[0]).name:
            found.append(process)
    return found


def oracles(folder: Path) -> list[psutil.Process]:
    """The processes that compute labels."""
    found = []
    for process, line in _all():
        try:
            if "bnn_driver.oracle_worker" in line and str(folder) in process.cwd():
                found.append(process)
        except psutil.Error:
            continue
    return found


def family(folder: Path, driver: int | None = None) -> list[psutil.Process]:
    """Everything that belongs to a deployment: what names its folder, the children of its driver, and all their descendants."""
    roots = [p for p, line in _all() if str(folder) in " ".join(line) and p.pid != os.getpid()]
    if driver:
        # Python's own tracker of shared memory lives as long as the driver
        roots += [p for p in psutil.Process(driver).children() if "resource_tracker" not in " ".join(p.cmdline())]
    found = {p.pid: p for p in roots}
    for process in roots:
        try:
            found |= {p.pid: p for p in process.children(recursive=True)}
        except psutil.Error:
            continue
    return [p for p in found.values() if alive(p)]


def _all() -> list[tuple[psutil.Process, list[str]]]:
    found = []
    for process in psutil.process_iter():
        try:
            found.append((process, process.cmdline()))
        except psutil.Error:
            continue
    return [(p, line) for p, line in found if alive(p)]


def eventually(condition: Callable[[], object], seconds: float = 90.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())
