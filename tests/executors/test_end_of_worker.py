"""SIGTERM ends a worker and what its child has started, also when it comes while the worker starts or kills that child."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from third_party import FORKS, SLOW, helium, install

pytest.importorskip("parsl")
from deployments import ended, eventually, make_job

from bnn_driver.executors.task import order

#: the signal comes, from this process itself, inside of what the child's lock guards
WORKER = """
import os, signal, subprocess, sys
from bnn_driver.executors import children
from bnn_driver.executors.task import label_task

def started(*arguments, **named):
    child = popen(*arguments, **named)
    print(child.pid, flush=True)
    if sys.argv[1] == "starts":
        os.kill(os.getpid(), signal.SIGTERM)
    return child

def killed(child):
    if sys.argv[1] == "kills" and not sent:
        sent.append(True)
        os.kill(os.getpid(), signal.SIGTERM)  # the handler runs before this returns
    kill_group(child)

sent, popen, kill_group = [], subprocess.Popen, children._kill_group
subprocess.Popen, children._kill_group = started, killed
label_task(sys.stdin.read())
"""


@pytest.mark.parametrize("moment", ["starts", "kills"])
def test_the_signal_is_heard_while_the_child_is_started_or_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    install(tmp_path / "site", monkeypatch)
    job = make_job(tmp_path, "faulty", {}, 1.0)
    frame = helium(SLOW if moment == "starts" else FORKS)
    text = order(asdict(job), tmp_path / "work", frame, frame.content_id(job.fingerprint), "attempt")
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, moment], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said, errors = worker.communicate(text, timeout=40)
    finally:
        worker.kill()
        worker.communicate()
    assert worker.returncode == 128 + 15, errors
    assert eventually(lambda: ended(int(said.split()[0])), 30)
    if moment == "kills":
        (grandchild,) = (tmp_path / "work").glob("*/grandchild")
        assert eventually(lambda: ended(int(grandchild.read_text())), 30)
