"""Several simulations of one run: each walker is a driver of its own, started here, watched and stopped together."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from bnn_driver.config import read_config
from bnn_driver.errors import BnnError, CleanStop
from bnn_driver.loops.parent import LAUNCH
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
    with _Walkers() as walkers:
        started = walkers.started
        for name in config.ipi.walkers:
            if not walkers.asked_to_end:
                walkers.add(name, _start([*command, "--walker", name]))
        threads = [threading.Thread(target=_repeat, args=(name, process.stderr)) for name, process in started.items()]
        for thread in threads:
            thread.start()
        codes = {name: process.wait() for name, process in started.items()}
        for thread in threads:
            thread.join()
    codes = {name: _exit_code(code, walkers.asked_to_end) for name, code in codes.items()}
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


class _Walkers:
    """Processes that get the first SIGINT or SIGTERM of this one, once, as SIGTERM; this one then waits for them."""

    def __init__(self) -> None:
        self.started: dict[str, subprocess.Popen[str]] = {}
        self.asked_to_end = False
        self._told: set[str] = set()

    def add(self, name: str, process: subprocess.Popen[str]) -> None:
        """One more, which is told at once if the signal came while it was being started."""
        self.started[name] = process
        if self.asked_to_end:
            self.end()

    def end(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Tell all that have not been told."""
        self.asked_to_end = True
        for name, process in self.started.items():
            if name not in self._told:
                self._told.add(name)
                process.terminate()

    def __enter__(self) -> _Walkers:
        self._before = {number: signal.signal(number, self.end) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self.end()
        for number, handler in self._before.items():
            signal.signal(number, handler)
