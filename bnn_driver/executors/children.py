"""A persistent child process (`bnn_driver.oracle_worker`) that can be killed hard; it writes its label to the spool before it answers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bnn_driver.errors import BnnError, OracleCrashed, OracleTimeout
from bnn_driver.executors.claims import claim
from bnn_driver.executors.messages import error_from_facts, frame_to_facts, receive, send
from bnn_driver.oracle import Limits, read_done, write_failed
from bnn_driver.records import Frames
from bnn_driver.threads import THREADS

log = logging.getLogger(__name__)

START_LIMIT = 300.0
"""Seconds for a child to start and import its code (slow disks); not part of a label's own limit."""
RECYCLE = 500
"""Labels of one child before it is replaced, against slow leaks of memory in a code."""


@dataclass(frozen=True)
class Job:
    """What every child of one executor has to know; JSON-able."""

    kind: str
    settings: dict[str, Any]
    fingerprint: str
    """Of the oracle as the driver knows it: the child refuses to work with another one."""
    spool: str
    timeout: float
    """s, of one label."""
    threads: int
    limits: Limits

    @staticmethod
    def from_facts(facts: dict[str, Any]) -> Job:
        """Inverse of `dataclasses.asdict`."""
        return Job(**facts | {"limits": Limits(**facts["limits"])})


class Child:
    """The place of one child: starts it when needed, kills it with all it started, replaces it."""

    def __init__(self, directory: Path, job: Job) -> None:
        """Args: directory: its own, for scratch and its log."""
        self.directory = directory
        self._job, self._spool = job, Path(job.spool)
        self._environment = dict.fromkeys(THREADS, str(job.threads)) | {"OMP_WAIT_POLICY": "passive"}
        self._child: subprocess.Popen[bytes] | None = None
        self._labels = 0
        self._lock = threading.RLock()  # a handler of signals calls `interrupt` in the thread that may hold it

    def label(
        self, frame: Frames, name: str, stop: threading.Event, limit: float, *, attempt: str = "", own: tuple[str, ...] = ()
    ) -> BnnError | None:
        """Have the label of a frame in the spool, computed unless it is there already.

        Args: limit: s.   attempt: see `claim`.   own: names of variables of the environment that the child has to see as they are now.
        Returns: None, or why there is none; failures are in the spool then.   Raises: FrameBusy, EnvironmentProblem, see `claim`.
        """
        with claim(self._spool, name, attempt):
            if read_done(self._spool, name) is not None:
                return None
            try:
                failure = self._compute(frame, stop, limit, own)
            except (OracleTimeout, OracleCrashed) as error:
                failure = error
                if not stop.is_set() and read_done(self._spool, name) is None:
                    write_failed(self._spool, name, error)
            if isinstance(failure, OracleCrashed):
                self.kill()
            return failure

    def _compute(self, frame: Frames, stop: threading.Event, limit: float, own: tuple[str, ...]) -> BnnError | None:
        if self._child is not None and (self._labels >= RECYCLE or not _lives(self._child)):
            self.kill()
        if self._child is None:
            self._start(stop)
            failure = self._ask({"job": asdict(self._job)}, START_LIMIT)
            if failure is not None:
                self.kill()
                return failure
        self._labels += 1
        environment = {variable: os.environ.get(variable) for variable in own}
        return self._ask({"frame": frame_to_facts(frame), "environment": environment}, limit)

    def _start(self, stop: threading.Event) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._lock, (self.directory / "stderr.log").open("ab") as stderr:
            if stop.is_set():
                raise OracleCrashed("the executor was shut down")
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "bnn_driver.oracle_worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                cwd=self.directory,
                env=os.environ | self._environment,
                start_new_session=True,
            )
        self._labels = 0

    def _ask(self, message: dict[str, Any], limit: float) -> BnnError | None:
        child, deadline = self._child, time.monotonic() + limit
        if child is None or child.stdin is None or child.stdout is None:
            raise OracleCrashed("the process of the oracle was not started")
        try:
            os.set_blocking(child.stdin.fileno(), False)
            send(child.stdin.fileno(), message, deadline)
            answer = receive(child.stdout.fileno(), deadline)
        except TimeoutError:
            self.kill()
            raise OracleTimeout(
                f"killed after {limit:g} s, its time limit; raise [oracle] timeout or see {self.directory}"
            ) from None
        except (EOFError, OSError) as error:
            self.kill()
            code = child.returncode
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            raise OracleCrashed(
                f"the process of the oracle died ({how}); its last words are in {self.directory / 'stderr.log'}"
            ) from error
        return error_from_facts(answer)

    def interrupt(self) -> None:
        """Kill the child, from another thread or a handler of signals; its own thread sees it and cleans up."""
        with self._lock:
            if self._child is not None:
                _kill_group(self._child)

    def kill(self) -> None:
        """Kill the child and its whole group, whatever it does; it holds nothing that is not on disk."""
        with self._lock:
            child = self._child
            if child is None:
                return
            _kill_group(child)
            child.wait()
            self._child = None  # not before: a handler of signals that comes in between must find it
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def _lives(child: subprocess.Popen[bytes]) -> bool:
    # not poll(): a child that is not yet waited for keeps the number of its group for _kill_group
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    if child.returncode is not None:
        return  # its number may be another's by now
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
