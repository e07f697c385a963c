"""An i-PI that somebody else started: found by its socket, asked to stop through its own EXIT file."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from bnn_driver.ipi.transport import Endpoint

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1


def ask_to_stop(endpoints: Iterable[Endpoint], seconds: float) -> list[Path]:
    """Have each i-PI that listens there, on this machine and as this user, write its RESTART and end; returns their folders.

    EXIT appears in its working folder, and is removed when it has ended, as the next one there would take it for its own; one that
    still runs after `seconds` keeps it.  An i-PI that cannot be found is told of.
    """
    asked: dict[int, tuple[psutil.Process, Path]] = {}
    for endpoint in endpoints:
        found = _process_at(endpoint)
        if found is None:
            log.warning("the i-PI at %s was not found here: it waits for a driver until EXIT appears in its folder", endpoint)
            continue
        asked[found.pid] = (found, Path(found.cwd()))
    for _, folder in asked.values():
        (folder / "EXIT").touch()
    end = time.monotonic() + seconds
    for process, folder in asked.values():
        while not (ended := _has_ended(process)) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        if ended:
            (folder / "EXIT").unlink(missing_ok=True)
    return [folder for _, folder in asked.values()]


def _has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or only waits for its parent to notice."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _process_at(endpoint: Endpoint) -> psutil.Process | None:
    """The i-PI that listens at an endpoint."""
    for pid in _owners(endpoint):
        try:
            process = psutil.Process(pid)
            if any(Path(word).name.startswith("i-pi") for word in process.cmdline()[:3]):
                return process
        except psutil.Error:
            continue
    return None


def _owners(endpoint: Endpoint) -> list[int]:
    """Processes that hold the socket of an endpoint."""
    try:
        found = psutil.net_connections(kind="unix" if endpoint.kind == "unix" else "tcp")
    except (psutil.Error, OSError):
        return []
    if endpoint.kind == "unix":
        return [c.pid for c in found if c.pid and c.laddr == endpoint.path]
    return [c.pid for c in found if c.pid and c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == endpoint.port]
