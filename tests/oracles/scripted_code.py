"""What the tests of the socket oracle share: a code that misbehaves on request, and its processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bnn_driver.oracle import Oracle
from bnn_driver.records import Frames

SCRIPTED = Path(__file__).with_name("inputs") / "scripted"
WATER = Frames(np.array([8, 1, 1]), np.array([[[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]]))
CUBE = 8.0 * np.eye(3)[None]


def scripted(behaviour: str = "ok", **changes: Any) -> dict[str, Any]:
    return {
        "command": f"{sys.executable} spring.py unix:{{path}} {behaviour}",
        "folder": str(SCRIPTED),
        "code": "Spring 1.0",
        "converged": "log: SCF converged in",
        "failed": "log: NOT CONVERGED",
        "templates": ["atoms"],
        "box": "0 A",
        "connect_timeout": "2 min",
        "frame_timeout": "2 min",
        "evidence_timeout": "1 s",
    } | changes


Make = Callable[..., Oracle]


def left(folder: Path) -> list[psutil.Process]:
    """Living processes that run below a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.pid != os.getpid()
                and Path(process.cwd()).is_relative_to(folder)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def moved(distance: float) -> Frames:
    positions = WATER.positions.copy()
    positions[0, 1, 0] += distance
    return replace(WATER, positions=positions)


def expected(frame: Frames) -> tuple[float, np.ndarray]:
    x = frame.positions[0]
    energy, forces = 0.0, np.zeros_like(x)
    for i in range(len(x)):
        for j in range(len(x)):
            if i != j:
                d = x[j] - x[i]
                r = np.linalg.norm(d)
                energy += 0.25 * (r - 1) ** 2
                forces[i] += (r - 1) * d / r
    return energy, forces
