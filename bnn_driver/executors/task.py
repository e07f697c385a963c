"""What a worker of Parsl runs: one label, by a child process that it keeps for the next one.

Text comes and text goes; the label itself lies in the spool before the worker answers.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from bnn_driver.errors import BnnError
from bnn_driver.executors.children import Child, Job
from bnn_driver.executors.messages import error_from_facts, error_to_facts, frame_from_facts, frame_to_facts
from bnn_driver.records import Frames

MPI_VARIABLES = ("PARSL_MPI_PREFIX", "PARSL_MPI_NODELIST")
"""What Parsl says anew for each task about the nodes that it may use."""
_NEVER = threading.Event()
_children: dict[str, Child] = {}
"""One process of a worker computes one frame after the other; what it needs for the next one has nowhere else to wait."""


def order(job: dict[str, Any], work: Path, frame: Frames, name: str, attempt: str) -> str:
    """What `label_task` is given.

    Args: job: facts of a Job.   work: the folder in which workers make their own.   attempt: see `claims.claim`.
    """
    return json.dumps({"job": job, "work": str(work), "frame": frame_to_facts(frame), "name": name, "attempt": attempt})


def answer(text: str) -> BnnError | None:
    """Why there is no label, by the answer of `label_task`; None if there is one."""
    return error_from_facts(json.loads(text))


def label_task(text: str) -> str:
    """Have the label of a frame in the spool; runs in the main thread of a worker.

    Args: text: of `order`.   Returns: for `answer`.   Raises: OSError where this node cannot reach the spool or start a process.
    """
    facts = json.loads(text)
    child = _child(facts["job"], Path(facts["work"]))
    try:
        failure = child.label(
            frame_from_facts(facts["frame"]),
            facts["name"],
            _NEVER,
            facts["job"]["timeout"],
            attempt=facts["attempt"],
            own=MPI_VARIABLES,
        )
    except BnnError as error:
        failure = error
    return json.dumps({"frame": facts["name"]} | ({} if failure is None else error_to_facts(failure)))


def _child(job: dict[str, Any], work: Path) -> Child:
    key = json.dumps([job, str(work)])
    if key not in _children:
        for other in _children.values():
            other.kill()
        _children.clear()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end)
        place = (
            f"{platform.node()}-{os.environ.get('PARSL_WORKER_POOL_ID', os.getpid())}-{os.environ.get('PARSL_WORKER_RANK', 0)}"
        )
        _children[key] = Child(work / place, Job.from_facts(job))
    return _children[key]


def _end(number: int, frame: FrameType | None) -> None:
    """With the worker ends what its child has started, too."""
    try:
        for child in _children.values():
            child.interrupt()
    finally:
        os._exit(128 + number)
