"""A guarded command ends with all it started, whoever dies first."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bnn_driver.errors import EnvironmentProblem, OracleCrashed
from oracles import guard
from oracles.guarded import Guarded
from oracles.scrutiny import last_words

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")

START = "import os, signal, subprocess, sys, time\n"
STUBBORN = (
    START + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(1000)"
)
TREE = START + (
    "subprocess.Popen([sys.executable, '-c', sys.argv[1], 'grandchild'], start_new_session=True)\n"
    "open('child', 'w').write(str(os.getpid()))\ntime.sleep(1000)"
)
Start = Callable[..., Guarded]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Guarded] = []

    def one(*command: str, **how: Any) -> Guarded:
        made.append(Guarded("code", command, tmp_path, "out", "err", **how))
        return made[-1]

    yield one
    for command in made:
        command.stop()


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def happens(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.02)
    return condition()


def number_in(file: Path) -> int:
    assert happens(lambda: file.exists() and bool(file.read_text()), 60.0), f"{file} was not written"
    return int(file.read_text())


def is_gone(process: int, seconds: float = 60.0) -> bool:
    return happens(lambda: not is_alive(process), seconds)


def is_alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("code", "end"), [("raise SystemExit(7)", "exit status 7"), ("import os; os.kill(os.getpid(), 11)", "signal SIGSEGV")]
)
def test_the_end_of_the_command_is_known(start: Start, code: str, end: str) -> None:
    command = start(*python(code))
    assert command.wait(60.0)
    assert not command.is_running
    assert command.end == end


def test_what_it_prints_goes_to_the_files_and_it_reads_nothing(start: Start, tmp_path: Path) -> None:
    command = start(*python("import sys; print('hello', sys.stdin.read()); print('oh', file=sys.stderr)"))
    assert command.wait(60.0)
    assert ((tmp_path / "out").read_text(), (tmp_path / "err").read_text()) == ("hello \n", "oh\n")


def test_it_reads_what_it_is_given_to_read(start: Start, tmp_path: Path) -> None:
    source, feed = os.pipe()
    command = start(*python("print(input())"), reads=source)
    os.close(source)
    os.write(feed, b"0.1 0.2 0.3\n")
    assert command.wait(60.0)
    assert (tmp_path / "out").read_text() == "0.1 0.2 0.3\n"
    with pytest.raises(BrokenPipeError):  # nobody holds the other end any more
        os.write(feed, b"0.1 0.2 0.3\n")
    os.close(feed)


def test_it_has_the_environment_that_it_was_given(start: Start, tmp_path: Path) -> None:
    command = start(*python("import os; print(os.environ.get('WORD'), os.environ.get('HOME'))"), environment={"WORD": "7"})
    assert command.wait(60.0)
    assert (tmp_path / "out").read_text() == "7 None\n"


def test_a_command_that_cannot_start_says_so(start: Start) -> None:
    command = start("./no such program")
    assert command.wait(60.0)
    with pytest.raises(EnvironmentProblem, match=r"\[oracle\.code\] './no such program' cannot be run: .*No such file"):
        _ = command.end


def test_stop_ends_a_stubborn_tree_over_two_sessions(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = start(*python(TREE, STUBBORN))
    processes = [number_in(tmp_path / name) for name in ("child", "grandchild")]
    begin = time.monotonic()
    command.stop()
    assert time.monotonic() - begin < guard.GRACE + guard.LAST_WAIT
    assert all(is_gone(process, 0.1) for process in processes)
    command.stop()  # once more does no harm


def test_a_command_is_asked_before_it_is_killed(start: Start, tmp_path: Path) -> None:
    polite = START + (
        "def leave(*_):\n  open('last', 'w').write('1')\n  sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, leave)\nopen('ready', 'w').write('1')\ntime.sleep(1000)"
    )
    command = start(*python(polite))
    number_in(tmp_path / "ready")
    begin = time.monotonic()
    command.stop()
    assert number_in(tmp_path / "last") == 1
    assert time.monotonic() - begin < guard.GRACE - 0.5


def test_what_the_command_left_running_ends_with_it(start: Start, tmp_path: Path) -> None:
    command = start(*python(TREE.replace("time.sleep(1000)", "time.sleep(1.0)"), STUBBORN))
    grandchild = number_in(tmp_path / "grandchild")
    assert command.wait(guard.GRACE + 60.0)
    assert is_gone(grandchild, 0.1)


def test_a_signal_to_the_guard_leaves_the_ending_to_it(start: Start, tmp_path: Path) -> None:
    """As from a queue that asks every process of a job to end: the guard stays until the command has ended."""
    command = start(*python(STUBBORN, "child"))
    child = number_in(tmp_path / "child")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        command._guard.send_signal(number)
    assert not command.wait(0.5)
    assert is_alive(child)
    command.stop()
    assert is_gone(child, 0.1)


def test_the_command_dies_with_a_guard_that_is_killed(start: Start, tmp_path: Path) -> None:
    command = start(*python(STUBBORN, "child"))
    child = number_in(tmp_path / "child")
    command._guard.kill()
    assert is_gone(child)
    with pytest.raises(OracleCrashed, match=r"the guard of code died \(signal SIGKILL\)"):
        _ = command.end


#: a worker that runs a launcher with a rank in a session of its own, both deaf to SIGTERM
WORKER = """
import sys
from pathlib import Path
from oracles.one_shot import run
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
rank = deaf + "time.sleep(300)"
launcher = deaf + f"import os, subprocess, sys; rank = subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True); "
launcher += "open('pids.part', 'w').write(f'{os.getpid()} {rank.pid}'); os.rename('pids.part', 'pids'); time.sleep(300)"
run("code", [sys.executable, "-c", launcher], Path(sys.argv[1]), "out.txt")
"""


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_the_code_and_all_its_ranks_die_with_the_worker(tmp_path: Path, death: signal.Signals) -> None:
    worker = subprocess.Popen(python(WORKER, str(tmp_path)), stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert happens((tmp_path / "pids").exists)
        pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
        assert all(psutil.pid_exists(pid) for pid in pids)
        os.killpg(worker.pid, death)
        assert happens(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
def test_the_ranks_of_a_real_launcher_die_with_the_worker(tmp_path: Path) -> None:
    rank = "import os, time; open(f'rank.{os.getpid()}', 'w').close(); time.sleep(300)"
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, "-c", rank]
    code = f"import sys\nfrom pathlib import Path\nfrom oracles.one_shot import run\nrun('code', {command}, Path(sys.argv[1]), 'out.txt')"
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=os.environ | root, start_new_session=True)
    try:
        if not happens(lambda: len(list(tmp_path.glob("rank.*"))) == 2 or worker.poll() is not None, 30.0):
            pytest.fail(f"mpirun started no ranks: {last_words(tmp_path, 'out.txt')}")
        if worker.poll() is not None:
            pytest.skip(f"mpirun does not work here: {last_words(tmp_path, 'out.txt')}")
        pids = [int(path.suffix[1:]) for path in tmp_path.glob("rank.*")]
        worker.kill()
        assert happens(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    finally:
        worker.kill()
        worker.wait()


def test_the_leftover_is_removed_also_when_its_owner_is_killed(tmp_path: Path) -> None:
    leftover = tmp_path / "socket"
    leftover.write_text("")
    owner = START + (
        "from pathlib import Path\nfrom oracles.guarded import Guarded\nhere = Path(sys.argv[1])\n"
        "g = Guarded('code', [sys.executable, '-c', sys.argv[2], 'child'], here, 'out', 'err', leftover=sys.argv[1] + '/socket')\n"
        "time.sleep(1000)"
    )
    process = subprocess.Popen(python(owner, str(tmp_path), STUBBORN))
    child = number_in(tmp_path / "child")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert is_gone(child, guard.GRACE + 60.0)
    assert happens(lambda: not leftover.exists(), 30.0)
