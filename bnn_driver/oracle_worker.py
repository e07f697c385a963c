"""The child process of an executor: one oracle, one frame at a time, until the driver is gone.

Started as `python -m bnn_driver.oracle_worker PARENT_PID`; messages come on standard input and answers leave on what was standard
output, which codes that print can no longer reach.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from bnn_driver.errors import EnvironmentProblem, OracleConfigError
from bnn_driver.executors.children import Job
from bnn_driver.executors.messages import error_to_facts, frame_from_facts, receive, send
from bnn_driver.executors.tether import end_with
from bnn_driver.oracle import Limits, Oracle, fingerprint, label, load_oracle, write_done, write_failed
from bnn_driver.records import Frames


def main() -> None:
    """Serve until the end of standard input or of the parent."""
    questions, answers = _take_channel()
    end_with(int(sys.argv[1]))  # even inside a library that never returns; where that is not Linux, `_listen` must do
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(questions, requests), daemon=True).start()
    job = Job.from_facts(requests.get()["job"])
    try:
        oracle = _same_oracle(job)
    except Exception as error:  # the border of a process: the driver must hear of it
        send(answers, _failure(error))
        return
    send(answers, {})
    while True:
        request = requests.get()
        _set_environment(request["environment"])
        send(answers, _serve(oracle, frame_from_facts(request["frame"]), Path(job.spool), job.limits))


def _same_oracle(job: Job) -> Oracle:
    """The oracle, if it is the one that the driver means.  Raises: OracleConfigError, and as `load_oracle`."""
    oracle = load_oracle(job.kind, job.settings)
    if fingerprint(oracle) != job.fingerprint:
        raise OracleConfigError(
            f"{oracle.code} on {platform.node()} is not the oracle that the driver checked: another version of the code or other files; "
            "give worker and driver the same environment"
        )
    return oracle


def _set_environment(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _serve(oracle: Oracle, frame: Frames, spool: Path, limits: Limits) -> dict[str, Any]:
    try:
        write_done(spool, label(oracle, frame, limits))
    except Exception as error:  # as above
        with contextlib.suppress(EnvironmentProblem):  # a full disk: the driver hears of the failure itself
            write_failed(spool, frame.content_id(fingerprint(oracle)), error)
        return _failure(error)
    return {}


def _failure(error: Exception) -> dict[str, Any]:
    traceback.print_exception(error)
    return error_to_facts(error)


def _take_channel() -> tuple[int, int]:
    """Keep the channel for ourselves: a code that prints reaches the log, one that reads finds nothing."""
    questions, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return questions, answers


def _listen(questions: int, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Hand on the messages; at their end, end the whole group at once."""
    while True:
        try:
            requests.put(receive(questions))
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
