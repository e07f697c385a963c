"""Several simulations of one run: each walker is a driver of its own, started here, watched and stopped together."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from bnn_driver.config import read_config
from bnn_driver.errors import BnnError, CleanStop
from bnn_driver.ipi.simulation import LAUNCH
from bnn_driver.store.run import RunDirectory

log = logging.getLogger(__name__)

CLEAN_STOP = CleanStop.exit_code


class WalkersFailed(BnnError):
    """Some walkers ended with an error; the others went on to their end."""

    def __init__(self, codes: Mapping[str, int], run: RunDirectory) -> None:
        failed = {name: code for name, code in codes.items() if code not in (0, CLEAN_STOP)}
        self.exit_code = next(iter(failed.values()))
        names = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        super().__init__(
            f"{len(failed)} of {len(codes)} walkers failed: {names}; what they said stands above, their logs are in {run.path}/walkers/; "
            "the same command goes on"
        )


def run_walkers(config_file: Path, extra_arguments: Sequence[str] = ()) -> Path:
    """Run every walker of [ipi.walkers] to its last step, side by side, and return the run directory; the same call resumes.

    A walker that fails does not end the others.
    Args: extra_arguments: of the command line, passed on to every walker.
    Raises: CleanStop when a walker was stopped on request and none failed; WalkersFailed.
    """
    config = read_config(config_file)
    run = RunDirectory(config_file.absolute().parent / config.run.directory)
    command = [sys.executable, "-m", "bnn_driver.cli", "run", str(config_file), *extra_arguments]
    with _stopped_together() as (started, stop):
        for name in config.ipi.walkers:
            started[name] = _start([*command, "--walker", name])
        threads = [threading.Thread(target=_repeat, args=(name, process.stderr)) for name, process in started.items()]
        for thread in threads:
            thread.start()
        codes = {name: process.wait() for name, process in started.items()}
        for thread in threads:
            thread.join()
    codes = {name: _exit_code(code, stop.is_set()) for name, code in codes.items()}
    if any(code not in (0, CLEAN_STOP) for code in codes.values()):
        raise WalkersFailed(codes, run)
    if stopped := [name for name, code in codes.items() if code == CLEAN_STOP]:
        raise CleanStop(f"stopped on request: {', '.join(stopped)}; the same command goes on")
    return run.path


def _exit_code(code: int, asked: bool) -> int:
    """Of a walker, as a shell gives it.  Args: asked: it was told to end, which it may have been before it could listen."""
    if asked and code == -signal.SIGTERM:
        return CLEAN_STOP
    return 128 - code if code < 0 else code


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C comes here, and is passed on once
    )


def _repeat(name: str, stream: IO[str] | None) -> None:
    """Show what a walker says, line by line, under its name."""
    for line in stream or ():
        sys.stderr.write(f"[{name}] {line}")
        sys.stderr.flush()


@contextlib.contextmanager
def _stopped_together() -> Iterator[tuple[dict[str, subprocess.Popen[str]], threading.Event]]:
    """Processes that get every SIGINT and SIGTERM of this one as SIGTERM, and whether they got any; this one then waits for them."""
    started: dict[str, subprocess.Popen[str]] = {}
    stop = threading.Event()

    def pass_on(number: int, frame: FrameType | None) -> None:
        stop.set()
        for process in started.values():
            process.terminate()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield started, stop
    except BaseException:
        pass_on(0, None)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
