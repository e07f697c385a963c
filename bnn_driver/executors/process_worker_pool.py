"""Parsl's pool of workers, with no process left when it is killed: `python -P process_worker_pool.py` and Parsl's own arguments.

The pool keeps the server of a multiprocessing manager, which would go on for ever.
"""

from __future__ import annotations

import multiprocessing.managers
import os
import runpy
from collections.abc import Callable
from typing import Any

from bnn_driver.executors.tether import end_with

POOL = "parsl.executors.high_throughput.process_worker_pool"


def _with_an_end(start: Callable[..., None]) -> Callable[..., None]:
    """`BaseManager.start` whose server ends with the process that started it."""

    def start_with_an_end(self: Any, initializer: Callable[..., object] | None = None, initargs: Any = ()) -> None:
        if initializer is None:
            initializer, initargs = end_with, (os.getpid(),)
        start(self, initializer, initargs)

    return start_with_an_end


if __name__ == "__main__":
    multiprocessing.managers.BaseManager.start = _with_an_end(multiprocessing.managers.BaseManager.start)  # type: ignore[method-assign]
    runpy.run_module(POOL, run_name="__main__", alter_sys=True)
