"""A guarded command ends with all it started, whoever dies first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from oracles import guarded
from oracles.guarded import Guarded

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

    def one(*command: str, leftover: Path | None = None) -> Guarded:
        made.append(Guarded(command, tmp_path, os.environ, tmp_path / "out", tmp_path / "err", leftover))
        return made[-1]

    yield one
    for command in made:
        command.stop()


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def number_in(file: Path) -> int:
    end = time.monotonic() + 60.0
    while time.monotonic() < end:
        if file.exists() and (text := file.read_text()):
            return int(text)
        time.sleep(0.02)
    raise AssertionError(f"{file} was not written")


def is_gone(process: int, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
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


def test_a_command_that_cannot_start_says_so(start: Start, tmp_path: Path) -> None:
    command = start("./no-such-program")
    assert command.wait(60.0)
    assert command.end == "exit status 127"
    assert "cannot start './no-such-program'" in (tmp_path / "err").read_text()


def test_stop_ends_a_stubborn_tree_over_two_sessions(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = start(*python(TREE, STUBBORN))
    processes = [number_in(tmp_path / name) for name in ("child", "grandchild")]
    begin = time.monotonic()
    command.stop()
    assert time.monotonic() - begin < guarded.GRACE + guarded.LAST_WAIT
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
    assert time.monotonic() - begin < guarded.GRACE - 0.5


def test_what_the_command_left_running_ends_with_it(start: Start, tmp_path: Path) -> None:
    command = start(*python(TREE.replace("time.sleep(1000)", "time.sleep(1.0)"), STUBBORN))
    grandchild = number_in(tmp_path / "grandchild")
    assert command.wait(guarded.GRACE + 60.0)
    assert is_gone(grandchild, 0.1)


def test_the_command_dies_with_a_guard_that_is_killed(start: Start, tmp_path: Path) -> None:
    command = start(*python(STUBBORN, "child"))
    child = number_in(tmp_path / "child")
    command._guard.kill()
    assert is_gone(child)


def test_the_leftover_is_removed_also_when_its_owner_is_killed(tmp_path: Path) -> None:
    leftover = tmp_path / "socket"
    leftover.write_text("")
    owner = START + (
        "from pathlib import Path\nfrom oracles.guarded import Guarded\nhere = Path(sys.argv[1])\n"
        "g = Guarded([sys.executable, '-c', sys.argv[2], 'child'], here, os.environ, here / 'out', here / 'err', here / 'socket')\n"
        "time.sleep(1000)"
    )
    process = subprocess.Popen(python(owner, str(tmp_path), STUBBORN))
    child = number_in(tmp_path / "child")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert is_gone(child, guarded.GRACE + 60.0)
    end = time.monotonic() + 30.0
    while leftover.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not leftover.exists()
