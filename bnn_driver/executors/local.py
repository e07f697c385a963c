"""Labels on this machine, by persistent child processes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from bnn_driver.errors import BnnError
from bnn_driver.executors.children import Child, Job
from bnn_driver.executors.pool import Pool
from bnn_driver.executors.retries import PATIENCE
from bnn_driver.oracle import Limits, fingerprint, load_oracle
from bnn_driver.records import Frames


class _ChildPlace:
    def __init__(self, child: Child) -> None:
        self._child = child
        self.interrupt, self.close = child.interrupt, child.kill

    def label(self, frame: Frames, name: str, priority: int, stop: threading.Event, limit: float) -> BnnError | None:
        return self._child.label(frame, name, stop, limit)


class LocalExecutor(Pool):
    """Labels frames on `workers` child processes; after a timeout a frame is tried once more with twice the limit."""

    def __init__(
        self,
        kind: str,
        settings: dict[str, Any],
        workers: int,
        timeout: float,
        work_directory: Path,
        threads: int,
        spool: Path,
        *,
        limits: Limits | None = None,
    ) -> None:
        """Nothing is started before the first frame comes.

        Args: kind, settings: as for `load_oracle`.   timeout: s per label.   work_directory: scratch and logs of the children.
            threads: of one child.   spool: folder of finished and failed labels.   limits: what `oracle.label` refuses.
        """
        name = fingerprint(load_oracle(kind, settings))
        job = Job(kind, settings, name, str(spool.resolve()), timeout, threads, limits or Limits())
        super().__init__(job, [_ChildPlace(Child(work_directory / f"worker-{n}", job)) for n in range(workers)], 0.0, PATIENCE)
