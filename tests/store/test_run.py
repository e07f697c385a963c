from __future__ import annotations

import json
import os
import platform
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from bnn_driver.errors import BnnError, ConfigError, EnvironmentProblem, LockedError
from bnn_driver.store.run import EventLog, RunDirectory, read_events, read_segments

PHYSICS = {"oracle": "abc", "numbers": [6, 1, 1, 1, 1], "charge": 0, "model": {"sha256": "f00"}}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def test_a_run_is_created_once_and_opened_ever_after(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="is no run directory"):
        RunDirectory.existing(tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    (run.labels_dir / "x").write_text("kept")
    assert RunDirectory.existing(tmp_path / "run") == RunDirectory(tmp_path / "run") == run
    assert (run.labels_dir / "x").read_text() == "kept"
    folders = {run.labels_dir, run.generations_dir, run.events_dir, run.oracle_dir, run.ipi_dir, run.log_dir}
    assert folders == {p for p in run.path.iterdir() if p.is_dir()}


def test_a_second_driver_is_refused_by_name_and_the_trainer_is_not(run: RunDirectory) -> None:
    with run.lock("driver"), run.lock("trainer"):
        with pytest.raises(LockedError, match=rf"live driver: pid {os.getpid()} on host {platform.node()}.*kill {os.getpid()}"):
            with run.lock("driver"):
                pass
        assert json.loads((run.path / "LOCK.trainer").read_text())["role"] == "trainer"
    with run.lock("driver"):
        assert json.loads((run.path / "LOCK").read_text())["pid"] == os.getpid()
    assert (run.path / "LOCK").read_text() == ""


def test_the_lock_is_free_after_an_error_inside(run: RunDirectory) -> None:
    with pytest.raises(ZeroDivisionError), run.lock("driver"):
        raise ZeroDivisionError
    with run.lock("driver"):
        pass


def test_a_killed_owner_frees_the_lock(run: RunDirectory) -> None:
    pid = os.fork()
    if pid == 0:
        with run.lock("driver"):
            time.sleep(60)
        os._exit(0)
    try:
        deadline = time.monotonic() + 20
        while not (run.path / "LOCK").exists() or not (run.path / "LOCK").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(LockedError, match=f"pid {pid} "), run.lock("driver"):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with run.lock("driver"):
        pass


def test_a_disk_that_takes_no_lock_is_named_with_the_remedy(run: RunDirectory) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no file can grow, as on a full disk
    try:
        with pytest.raises(EnvironmentProblem, match=r"LOCK\.trainer could not be written.*; free space"), run.lock("trainer"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with run.lock("trainer"):
        assert "trainer" in run.lock_file("trainer").read_text()


def test_a_lock_left_by_another_host_is_warned_of(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    run.lock_file("driver").write_text('{"role": "driver", "host": "node17", "pid": 5}')
    with run.lock("driver"):
        assert "pid 5 on host node17" in caplog.text


def test_the_same_settings_start_again_without_a_change(run: RunDirectory) -> None:
    assert run.fix_settings({"a": {"b": 1.0}}, PHYSICS) == {}
    before = run.settings_file.read_bytes()
    assert run.fix_settings({"a": {"b": 1.0}}, {**PHYSICS, "numbers": np.array([6, 1, 1, 1, 1])}) == {}
    assert run.settings_file.read_bytes() == before


def test_another_physics_is_refused_key_by_key(run: RunDirectory) -> None:
    run.fix_settings({"a": 1}, PHYSICS)
    before = run.settings_file.read_bytes()
    new = {**PHYSICS, "oracle": "xyz", "model": {"sha256": "bad"}, "periodic": True}
    with pytest.raises(ConfigError) as error:
        run.fix_settings({"a": 2}, new)
    lines = str(error.value).splitlines()
    assert lines[1:4] == [
        '  model.sha256: was "f00", now "bad"',
        '  oracle: was "abc", now "xyz"',
        '  periodic: was "(absent)", now true',
    ]
    assert "run directory" in lines[-1]
    assert run.settings_file.read_bytes() == before


def test_physics_that_older_runs_left_unsaid_is_what_it_was(run: RunDirectory) -> None:
    run.fix_settings({"a": 1}, PHYSICS)
    with pytest.raises(ConfigError, match='sampled: was "all", now "readout"'):
        run.fix_settings({"a": 1}, {**PHYSICS, "sampled": "readout"})
    assert run.fix_settings({"a": 1}, {**PHYSICS, "sampled": "all"}) == {}
    with pytest.raises(ConfigError, match=r'predicted_noise: was \["forces"\], now \[\]'):
        run.fix_settings({"a": 1}, {**PHYSICS, "predicted_noise": []})
    assert run.fix_settings({"a": 1}, {**PHYSICS, "predicted_noise": ["forces"]}) == {}


def test_other_settings_may_change_and_the_change_is_an_event(run: RunDirectory) -> None:
    run.fix_settings({"trainer": {"lag": 0, "threads": 1}}, PHYSICS)
    with EventLog(run.events_dir) as events:
        changed = run.fix_settings({"trainer": {"lag": 5, "threads": 1}}, PHYSICS, events)
    assert changed == {"trainer.lag": [0, 5]}
    (event,) = read_events(run.events_dir)
    assert event["kind"] == "settings"
    assert event["changed"] == changed
    assert json.loads(run.settings_file.read_text())["effective"] == {"trainer": {"lag": 5, "threads": 1}}


def test_events_come_back_in_order_and_in_full_precision(run: RunDirectory) -> None:
    value = 0.1 + 0.2
    for start in range(3):
        with EventLog(run.events_dir) as events:
            assert events.segment == start
            events.append("decision", step=np.int64(start), sd=np.float64(value), ask=np.bool_(True), atom=None)
            events.append("stop", reason="wall é\n")
    found = list(read_events(run.events_dir))
    assert [e["kind"] for e in found] == ["decision", "stop"] * 3
    assert [e["step"] for e in found[::2]] == [0, 1, 2]
    assert all(e["sd"] == value and e["ask"] is True and e["atom"] is None for e in found[::2])
    assert found[1]["reason"] == "wall é\n"
    assert [len(list(segment)) for segment in read_segments(run.events_dir)] == [2, 2, 2]


def test_an_event_is_on_file_before_the_next_one_is_made(run: RunDirectory) -> None:
    events = EventLog(run.events_dir)
    events.append("swap", generation=1)
    assert [e["kind"] for e in read_events(run.events_dir)] == ["swap"]
    events.close()


@pytest.mark.parametrize("bad", [float("nan"), np.float64("inf"), {"x": [float("nan")]}])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(run: RunDirectory, bad: object) -> None:
    with EventLog(run.events_dir) as events:
        with pytest.raises(BnnError, match="'update' holds a number that is not finite"):
            events.append("update", loss=bad)
        with pytest.raises(BnnError, match="may not have a fact named time"):
            events.append("update", time=1.0)
        events.append("stop")
    assert [e["kind"] for e in read_events(run.events_dir)] == ["stop"]


def test_a_last_line_torn_at_any_byte_is_skipped_in_every_segment(run: RunDirectory) -> None:
    for _ in range(2):
        with EventLog(run.events_dir) as events:
            events.append("a", x=1.5)
            events.append("b", text="torn")
    path = run.events_dir / "000.jsonl"
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in range(second, len(whole) - 1):
        path.write_bytes(whole[:cut])
        kinds = [e["kind"] for e in read_events(run.events_dir)]
        assert kinds == (["a", "a", "b"] if cut < len(whole) - 1 else ["a", "b", "a", "b"])


def test_a_bad_line_before_the_last_is_an_error(run: RunDirectory) -> None:
    (run.events_dir / "000.jsonl").write_bytes(b'{"kind": "a"}\n{"kin\n{"kind": "b"}\n')
    with pytest.raises(EnvironmentProblem, match=r"000\.jsonl:2 is not a JSON object"):
        list(read_events(run.events_dir))


def test_a_log_that_could_not_write_takes_nothing_more(run: RunDirectory) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    events = EventLog(run.events_dir)
    events._file.close()
    events._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(EnvironmentProblem, match=r"could not take the event 'a'.*No space"):
        events.append("a")
    with pytest.raises(EnvironmentProblem, match="'b'"):
        events.append("b")
