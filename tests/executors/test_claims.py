"""Whoever shares a spool, one frame is computed by one process at a time, and nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from third_party import SLEEPS, SLOW, calls, helium, install

from bnn_driver.errors import FrameBusy, OracleConfigError, OracleCrashed, OracleTimeout
from bnn_driver.executors import LocalExecutor, pool
from bnn_driver.executors.children import Child, Job
from bnn_driver.executors.claims import claim, holder, is_claimed
from bnn_driver.oracle import Limits, read_failures

HOLDER = """
import sys, time
from pathlib import Path
from bnn_driver.executors.claims import claim
with claim(Path(sys.argv[1]), "frame", "theirs"):
    print("held", flush=True)
    time.sleep(60)
"""


def local(tmp_path: Path, timeout: float = 20.0) -> LocalExecutor:
    return LocalExecutor("faulty", {}, 1, timeout, tmp_path / "work", 1, tmp_path / "spool")


@pytest.fixture(autouse=True)
def _faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch)


def test_a_claim_is_exclusive_between_threads_too_and_leaves_nothing(tmp_path: Path) -> None:
    with claim(tmp_path, "frame", "mine"):
        assert is_claimed(tmp_path, "frame")
        assert not is_claimed(tmp_path, "another")
        assert (holder(tmp_path, "frame")["pid"], holder(tmp_path, "frame")["attempt"]) == (os.getpid(), "mine")
        with pytest.raises(FrameBusy, match=r"frame\.lock"), claim(tmp_path, "frame"):
            pass
        assert holder(tmp_path, "frame")["attempt"] == "mine"
    assert not is_claimed(tmp_path, "frame")
    assert list((tmp_path / "running").iterdir()) == []


def test_a_killed_holder_frees_its_frame_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert is_claimed(tmp_path, "frame")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert holder(tmp_path, "frame")["attempt"] == "theirs"  # its file is still there, but says nothing any more
        assert not is_claimed(tmp_path, "frame")
    finally:
        process.kill()
        process.communicate()


def test_claims_never_overlap_though_their_file_is_removed_each_time(tmp_path: Path) -> None:
    inside, overlaps, turns = [0], [0], [0]

    def contend() -> None:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            try:
                with claim(tmp_path, "frame"):
                    inside[0] += 1
                    overlaps[0] += inside[0] != 1
                    turns[0] += 1
                    time.sleep(0)
                    inside[0] -= 1
            except FrameBusy:
                pass

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert turns[0] > 20
    assert overlaps[0] == 0


def test_two_drivers_that_share_a_spool_compute_a_frame_once(tmp_path: Path) -> None:
    with local(tmp_path) as first, local(tmp_path) as second:
        futures = [executor.submit(helium(SLOW)) for executor in (first, second)]
        assert [future.result().energy for future in futures] == [-8.0, -8.0]
    assert calls(tmp_path / "work") == 1


def test_who_waits_for_another_process_can_be_shut_down(tmp_path: Path) -> None:
    with local(tmp_path) as executor:
        name = helium().content_id(executor.fingerprint)
        with claim(tmp_path / "spool", name):
            future = executor.submit(helium())
            time.sleep(0.5)
            assert not future.done()
            start = time.monotonic()
            executor.shutdown(wait=False)
            assert time.monotonic() - start < 5
        assert isinstance(future.exception(), OracleCrashed)
    assert read_failures(tmp_path / "spool") == {}


def test_nobody_waits_for_a_stuck_process_without_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "START_LIMIT", 0.5)
    with local(tmp_path, timeout=0.5) as executor:
        with claim(tmp_path / "spool", helium().content_id(executor.fingerprint)):
            with pytest.raises(OracleTimeout, match=rf"another process \(.*pid {os.getpid()}\)"):
                executor.submit(helium()).result(timeout=20)


def test_a_waiting_driver_computes_what_the_other_one_gave_up(tmp_path: Path) -> None:
    with local(tmp_path, timeout=2.0) as first, local(tmp_path) as second:
        hung = first.submit(helium(SLEEPS))
        time.sleep(0.5)
        waiting = second.submit(helium(SLEEPS))
        with pytest.raises(OracleTimeout):
            hung.result()
        while calls(tmp_path / "work") < 2:
            time.sleep(0.05)
        second.shutdown(wait=False)
        assert isinstance(waiting.exception(), OracleCrashed)


def test_a_worker_with_another_code_than_the_drivers_is_refused(tmp_path: Path) -> None:
    job = Job("faulty", {}, "f" * 64, str(tmp_path / "spool"), 20.0, 1, Limits())
    child = Child(tmp_path / "work" / "here", job)
    failure = child.label(helium(), "name", threading.Event(), 20.0)
    assert isinstance(failure, OracleConfigError)
    assert "is not the oracle that the driver checked" in str(failure)
