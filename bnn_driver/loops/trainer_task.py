"""What a worker of Parsl runs for the chains: the trainer, as a process of its own, for as long as the worker has its job."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil

from bnn_driver.store.files import write_atomic
from bnn_driver.threads import THREADS

POLL_SECONDS = 0.5
AFTER_DRAIN = 5.0
"""Seconds for which the trainer outlives the moment from which on its pool takes no more tasks, so that the next one goes to a new job."""


@dataclass(frozen=True)
class TrainerOrder:
    """What a worker has to know to run the trainer; JSON-able."""

    run: str
    log: str
    """File that the trainer's output is added to."""
    mark: str
    """File that says which attempt has begun, and where."""
    attempt: str
    threads: int
    lifetime: float | None
    """s after the start of the pool of workers at which it takes no more tasks; None: never."""


def run_trainer(text: str) -> str:
    """Run the trainer until it ends, its worker's pool is gone, or the job nears its end; runs in the main thread of a worker.

    Args: text: JSON of a TrainerOrder.   Returns: how it ended.   Raises: OSError where this node cannot reach the run directory.
    """
    order, pool = TrainerOrder(**json.loads(text)), os.getppid()
    deadline = _deadline(order.lifetime, pool)
    with Path(order.log).open("ab") as output:
        place = {"host": platform.node(), "accelerator": os.environ.get("CUDA_VISIBLE_DEVICES"), "worker": os.getpid()}
        output.write(f"the trainer is a task of Parsl: {json.dumps(place)}\n".encode())
        output.flush()
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "bnn_driver.loops.trainer_main", order.run],
            stdin=subprocess.PIPE,  # it closes with this process, however that ends, and the trainer ends with it
            stdout=output,
            stderr=output,
            env=os.environ | dict.fromkeys(THREADS, str(order.threads)),
        )

    def end(number: int, frame: FrameType | None) -> None:
        child.kill()
        os._exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        write_atomic(Path(order.mark), json.dumps({"attempt": order.attempt, "pid": child.pid} | place).encode())
        return _watch(child, pool, deadline)
    finally:
        child.kill()
        child.wait()
        signal.signal(signal.SIGTERM, before)
        if child.stdin is not None:
            child.stdin.close()


def order_text(order: TrainerOrder) -> str:
    """What `run_trainer` is given."""
    return json.dumps(asdict(order))


def _deadline(lifetime: float | None, pool: int) -> float:
    """By the monotonic clock; the job is about as old as the pool of its workers, which is the parent of this process."""
    if lifetime is None:
        return float("inf")
    age = time.time() - psutil.Process(pool).create_time()
    return time.monotonic() + lifetime + AFTER_DRAIN - age


def _watch(child: subprocess.Popen[bytes], pool: int, deadline: float) -> str:
    while True:
        try:
            return f"ended with status {child.wait(POLL_SECONDS)}"
        except subprocess.TimeoutExpired:
            pass
        if os.getppid() != pool:  # a worker in a task outlives its pool otherwise
            return "lost the pool of its worker"
        if time.monotonic() > deadline:
            return "was ended in time for the end of its job"
