"""A command that never outlives the process that wants it: guard.py runs it, and watches a pipe to this process."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bnn_driver.errors import EnvironmentProblem, OracleCrashed
from oracles.guard import GRACE, LAST_WAIT

GUARD = Path(__file__).with_name("guard.py")


class Guarded:
    """One running command."""

    def __init__(
        self,
        kind: str,
        command: Sequence[str],
        folder: Path,
        output: str,
        errors: str,
        *,
        environment: Mapping[str, str] | None = None,
        leftover: str = "",
        reads: int | None = None,
    ) -> None:
        """Start it.

        Args: kind: of the oracle, for messages.   folder: where it runs.   output, errors: names of the files that get what it prints.
            environment: None for that of this process.   leftover: a file to remove at its end, such as a socket.
            reads: descriptor of its standard input; None: it finds nothing there.
        """
        self._kind, self._command = kind, command
        facts = [output, errors, leftover, "" if reads is None else str(reads)]
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), *facts, *command],
            cwd=folder,
            env=None if environment is None else dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=() if reads is None else (reads,),
            start_new_session=True,  # or what kills this process would kill the guard
        )
        self._report: bytes | None = None

    @property
    def is_running(self) -> bool:
        """Whether the command still runs."""
        return self._guard.poll() is None

    @property
    def end(self) -> str:
        """How the command ended, such as "exit status 0".

        Raises: EnvironmentProblem if it could not be started; OracleCrashed if its guard was killed.
        """
        if self.is_running:
            return "it still runs"
        report = self._last_report()
        if not report:
            status = _in_words(self._guard.returncode)
            raise OracleCrashed(f"the guard of {self._kind} died ({status}); its words are in this process's log")
        facts = json.loads(report)
        if "error" in facts:
            raise EnvironmentProblem(f"[oracle.{self._kind}] {shlex.join(self._command)} cannot be run: {facts['error']}")
        return _in_words(facts["status"])

    def _last_report(self) -> bytes:
        if self._report is None and self._guard.stdout is not None:
            with self._guard.stdout as pipe:
                self._report = pipe.read()
        return self._report or b""

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the command to end by itself; False when it still runs after `seconds`."""
        try:
            self._guard.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """End the command with all it started; returns within GRACE + LAST_WAIT seconds and a little."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        if not self.wait(GRACE + LAST_WAIT + 2.0):
            self._guard.kill()
            self._guard.wait()
        self._last_report()


def _in_words(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
