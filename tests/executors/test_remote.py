"""Answers that are lost on the way back: what counts is what lies in the spool."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from third_party import calls, helium, install

from bnn_driver.errors import BnnError, WorkerLost
from bnn_driver.executors import task
from bnn_driver.executors.children import Job
from bnn_driver.executors.remote import RemoteExecutor
from bnn_driver.oracle import Limits, fingerprint, load_oracle


class Losing:
    """One worker, a thread beside the driver, whose answers are lost after the first one."""

    def __init__(self) -> None:
        self.begun = 0
        self._worker = ThreadPoolExecutor(max_workers=1)  # a child ends with the thread that started it

    def submit(self, text: str, priority: int) -> Future[str]:
        self.begun += 1
        answer = self._worker.submit(task.label_task, text)
        if self.begun == 1:
            return answer
        answer.result()  # it has begun and ended before the driver looks for the first time
        return Future()

    def problem(self) -> str:
        return ""

    def overdue(self, waited: float) -> str:
        return ""

    def meaning(self, error: Exception) -> BnnError:
        return WorkerLost(str(error))

    def close(self) -> None:
        for child in task._children.values():
            child.kill()
        task._children.clear()
        self._worker.shutdown()


def test_a_label_whose_answer_is_lost_is_found_though_it_was_never_seen_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", monkeypatch)
    name = fingerprint(load_oracle("faulty", {}))
    job = Job("faulty", {}, name, str(tmp_path / "spool"), 20.0, 1, Limits(min_distance=0.01, covalent_fraction=0.0))
    workers = Losing()
    with RemoteExecutor(job, workers, 1, tmp_path / "work") as executor:
        assert executor.submit(helium()).result(timeout=60).energy == 0.0
        future = executor.submit(helium(x=1.0))
        try:
            assert future.result(timeout=20).energy == 0.0
        finally:
            executor.shutdown(wait=False)
    assert workers.begun == 2
    assert calls(tmp_path / "work") == 2
