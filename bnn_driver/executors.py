"""Labels on this machine: persistent child processes that can be killed hard, fed by priority.

A child (`bnn_driver.oracle_worker`) writes its label to the spool before it answers, so a lost driver loses no finished label.
Messages between driver and child are JSON after 8 bytes of length (big endian).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from bnn_driver import errors
from bnn_driver.errors import BnnError, OracleCrashed, OracleError, OracleInconsistent, OracleTimeout
from bnn_driver.oracle import Limits, fingerprint, load_oracle, read_done, write_failed
from bnn_driver.records import Frames, Label

log = logging.getLogger(__name__)

START_LIMIT = 300.0
"""Seconds for a child to start and import its code (slow disks); not part of a label's own limit."""
DEATHS = 2
"""How often a frame is tried again after its child died."""
PATIENCE = 2
"""Factor on the time limit when a frame is tried again after a timeout."""
LONGEST = 1 + PATIENCE
"""Time limits that a frame whose code hangs may take."""
RECYCLE = 500
"""Labels of one child before it is replaced, against slow leaks of memory in a code."""
_LENGTH = struct.Struct("!Q")


class LocalExecutor:
    """Labels frames on `workers` child processes; the order is priority (lower first), then submission.

    A label that lies in the spool is returned at once; frames of one content id in flight share one future.  A child that dies
    is replaced and its frame tried twice more; after a timeout it is tried once more with twice the limit; a failure that the
    oracle reports is final.
    """

    def __init__(
        self,
        kind: str,
        settings: dict[str, Any],
        workers: int,
        timeout: float,
        work_directory: Path,
        threads: int,
        spool: Path,
        *,
        limits: Limits | None = None,
    ) -> None:
        """Nothing is started before the first frame comes.

        Args: kind, settings: as for `load_oracle`.   timeout: s per label.   work_directory: scratch and logs of the children.
            threads: of one child.   spool: folder of finished and failed labels.   limits: what `oracle.label` refuses.
        """
        self.fingerprint = fingerprint(load_oracle(kind, settings))
        self.spool, self._timeout = spool, timeout
        hello = {
            "kind": kind,
            "settings": settings,
            "spool": str(spool.resolve()),
            "limits": dataclasses.asdict(limits or Limits()),
        }
        self._queue: queue.PriorityQueue[tuple[float, int, _Task | None]] = queue.PriorityQueue()
        self._lock = threading.Lock()
        self._in_flight: dict[str, _Task] = {}
        self._submitted, self._closed, self._killed = 0, False, threading.Event()
        self._slots = [_Slot(work_directory / f"worker-{n}", hello, threads) for n in range(workers)]
        # a child dies with the thread that started it (PR_SET_PDEATHSIG), so each thread keeps its own child for life
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), daemon=True, name=slot.directory.name) for slot in self._slots
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, frame: Frames, *, priority: int = 0) -> Future[Label]:
        """Label one frame.  A frame that waits already gets the more urgent of both priorities.

        Raises: OracleError after shutdown.   The future: OracleError, or EnvironmentProblem, when there is no label.
        """
        name = frame.content_id(self.fingerprint)
        with self._lock:
            if self._closed:
                raise OracleError(f"frame {name} was submitted after the executor was shut down")
            task = self._in_flight.get(name)
            if task is None or task.future.cancelled():
                known = read_done(self.spool, name)
                task = _Task(frame, name, Future(), priority)
                if known is not None:
                    task.future.set_result(known)
                    return task.future
                self._in_flight[name] = task
                self._put(task, priority)
            elif priority < task.priority:
                task.priority = priority
                self._put(task, priority)
            return task.future

    def shutdown(self, wait: bool = True) -> None:
        """Stop.  wait: finish everything that was submitted; otherwise waiting frames are cancelled and running ones killed."""
        with self._lock:
            already, self._closed = self._closed, True
            waiting = list(self._in_flight.values())
            if not already:
                for _ in self._threads:
                    self._put(None, float("inf"))
        if not wait:
            self._killed.set()
            for task in waiting:
                task.future.cancel()
            for slot in self._slots:
                slot.interrupt()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown(wait=error is None)

    def _put(self, task: _Task | None, priority: float) -> None:
        self._submitted += 1
        self._queue.put((priority, self._submitted, task))

    def _serve(self, slot: _Slot) -> None:
        try:
            while (task := self._queue.get()[2]) is not None:
                if self._claim(task):
                    self._settle(task, slot)
        finally:
            slot.kill()

    def _claim(self, task: _Task) -> bool:
        """False when the frame was cancelled, or was taken before under its other priority."""
        with self._lock:
            if task.started:
                return False
            task.started = True
            if task.future.set_running_or_notify_cancel():
                return True
            self._forget(task)
            return False

    def _settle(self, task: _Task, slot: _Slot) -> None:
        result: Label | BaseException
        try:
            result = self._compute(task, slot)
        except BnnError as error:
            result = error
        except Exception as error:  # the border of a thread: the future must hear of it
            log.exception("labelling frame %s", task.name)
            result = OracleCrashed(f"frame {task.name}: {type(error).__name__}: {error}")
        with self._lock:
            self._forget(task)
        if isinstance(result, Label):
            task.future.set_result(result)
        else:
            task.future.set_exception(result)

    def _forget(self, task: _Task) -> None:
        if self._in_flight.get(task.name) is task:
            del self._in_flight[task.name]

    def _compute(self, task: _Task, slot: _Slot) -> Label:
        deaths, limit = 0, self._timeout
        while True:
            failure = self._attempt(task, slot, limit)
            # looked for also after a failure: it may have been written in the moment before the end
            found = read_done(self.spool, task.name)
            if found is not None:
                return found
            if failure is None:
                failure = OracleInconsistent(
                    f"the oracle finished frame {task.name}, but {self.spool / 'done'} has no label of it"
                )
            if self._killed.is_set():
                raise failure
            if isinstance(failure, OracleCrashed) and deaths < DEATHS:
                deaths += 1
            elif isinstance(failure, OracleTimeout) and limit == self._timeout:
                limit *= PATIENCE
            else:
                raise failure
            log.warning("frame %s: %s; trying again with a fresh process", task.name, failure)
            slot.kill()

    def _attempt(self, task: _Task, slot: _Slot, limit: float) -> BnnError | None:
        """None when the child says it is done; failures that it reports are in the spool already."""
        try:
            return slot.label(task.frame, limit, self._killed)
        except (OracleTimeout, OracleCrashed) as error:
            if not self._killed.is_set() and read_done(self.spool, task.name) is None:
                write_failed(self.spool, task.name, error)
            return error


@dataclass(eq=False)
class _Task:
    frame: Frames
    name: str
    future: Future[Label]
    priority: int
    started: bool = False


class _Slot:
    """The place of one child: starts it when needed, kills it with all it started, replaces it."""

    def __init__(self, directory: Path, hello: dict[str, Any], threads: int) -> None:
        self.directory = directory
        self._hello = hello
        self._environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self._environment["OMP_WAIT_POLICY"] = "passive"
        self._child: subprocess.Popen[bytes] | None = None
        self._labels = 0
        self._lock = threading.Lock()

    def label(self, frame: Frames, timeout: float, stop: threading.Event) -> BnnError | None:
        """Have the child write the label of a frame.

        Returns: None, or the failure that the child reports.   Raises: OracleTimeout or OracleCrashed when the child is gone.
        """
        if self._child is not None and (self._labels >= RECYCLE or not _lives(self._child)):
            self.kill()
        if self._child is None:
            self._start(stop)
            failure = self._ask(self._hello, START_LIMIT)
            if failure is not None:
                self.kill()
                return failure
        self._labels += 1
        return self._ask({"frame": frame_to_facts(frame)}, timeout)

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
        return _error(answer["error"], answer["message"]) if "error" in answer else None

    def interrupt(self) -> None:
        """Kill the child from another thread; the slot's own thread sees it and cleans up."""
        with self._lock:
            if self._child is not None:
                _kill_group(self._child)

    def kill(self) -> None:
        """Kill the child and its whole group, whatever it does; it holds nothing that is not on disk."""
        with self._lock:
            child, self._child = self._child, None
            if child is None:
                return
            _kill_group(child)
            child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def _lives(child: subprocess.Popen[bytes]) -> bool:
    # not poll(): a child that is not yet waited for keeps the number of its group for _kill_group
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _error(name: str, message: str) -> BnnError:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, BnnError):
        return kind(message)
    return OracleCrashed(f"the oracle raised {name}: {message}")


def send(descriptor: int, message: dict[str, Any], deadline: float | None = None) -> None:
    """Write one message.  deadline: by time.monotonic().  Raises: TimeoutError; BrokenPipeError if nobody reads."""
    body = json.dumps(message).encode()
    data = memoryview(_LENGTH.pack(len(body)) + body)
    while data:
        _wait(descriptor, select.POLLOUT, deadline)
        with contextlib.suppress(BlockingIOError):
            data = data[os.write(descriptor, data) :]


def receive(descriptor: int, deadline: float | None = None) -> dict[str, Any]:
    """Read one message.  Raises: TimeoutError; EOFError if the other side is gone."""
    (length,) = _LENGTH.unpack(_read(descriptor, _LENGTH.size, deadline))
    message: dict[str, Any] = json.loads(_read(descriptor, length, deadline))
    return message


def _read(descriptor: int, length: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < length:
        _wait(descriptor, select.POLLIN, deadline)
        part = os.read(descriptor, min(length - len(data), 1 << 20))
        if not part:
            raise EOFError(f"the other side is gone after {len(data)} of {length} bytes")
        data += part
    return bytes(data)


def _wait(descriptor: int, event: int, deadline: float | None) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1e3
    if not poll.poll(left):
        raise TimeoutError


def frame_to_facts(frame: Frames) -> dict[str, Any]:
    """JSON-able, exact."""
    return {
        "numbers": frame.numbers.tolist(),
        "positions": frame.positions.tolist(),
        "cell": None if frame.cell is None else frame.cell.tolist(),
        "charge": frame.charge,
        "multiplicity": frame.multiplicity,
    }


def frame_from_facts(facts: dict[str, Any]) -> Frames:
    """Inverse of `frame_to_facts`."""
    cell = None if facts["cell"] is None else np.array(facts["cell"], dtype=float)
    positions = np.array(facts["positions"], dtype=float)
    return Frames(np.array(facts["numbers"], dtype=int), positions, cell, facts["charge"], facts["multiplicity"])
