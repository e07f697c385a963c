"""Faults inside the program's own processes: every Python that starts with this folder on PYTHONPATH reads them from BNN_FAULT.

The program itself has no hooks.  BNN_FAULT is JSON of a list of `campaign.Fault`: in the process of that role, the n-th call of one
function is struck.  BNN_COMPUTED names a file in which every computation of a label leaves a line, so that two are seen.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

JUMP = 90_000.0
"""s, by which the clock of every process jumps, there and back, every few calls."""


def role() -> str:
    """What this process is in a run; a worker is what computes labels, wherever it runs."""
    words = sys.orig_argv
    signs = {
        "bnn_driver.cli": "driver",
        "bnn_driver.loops.trainer_main": "trainer",
        "bnn_driver.oracle_worker": "worker",
        "process_worker_pool.py": "pool",
        "--multiprocessing-fork": "parsl worker",
        "i-pi": "ipi",
    }
    return next((name for sign, name in signs.items() if any(w.rpartition("/")[2] == sign for w in words)), "other")


class Fault:
    """Counts the calls of one function, and strikes."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.module, _, self.path = facts["place"].partition(":")
        self.calls = 0

    def patch(self, module: ModuleType) -> None:
        owner: Any = module
        *parents, name = self.path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, self._struck(getattr(owner, name)))

    def _struck(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def struck(*args: Any, **kwargs: Any) -> Any:
            if not self._due(args, kwargs):
                return function(*args, **kwargs)
            if self.facts["action"] == "full" and hasattr(args[0], "_file"):
                args[0]._file = _FullFile()
                return function(*args, **kwargs)
            if self.facts["when"] == "before":
                self._act()
            if self.facts["when"] == "torn":
                args = _halved(args)
            result = function(*args, **kwargs)
            if self.facts["when"] != "before":
                self._act()
            return result

        return struck

    def _due(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self.facts["match"] not in " ".join(str(x)[:300] for x in (*args, *kwargs.values())):
            return False
        self.calls += 1
        if self.calls < self.facts["call"]:
            return False
        try:
            os.close(os.open(self.facts["marker"], os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return bool(self.facts["lasting"])
        return True

    def _act(self) -> None:
        match self.facts["action"]:
            case "kill" if self.facts["victim"]:
                _kill_others(self.facts["victim"])
                while self.facts["until"] and not os.path.exists(self.facts["until"]):
                    time.sleep(0.1)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "hang":
                while True:
                    time.sleep(1.0)
            case "unconverged":
                from bnn_driver.errors import SCFNotConverged

                raise SCFNotConverged("no rung of the ladder converged")
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)


def _kill_others(word: str) -> None:
    """Kill -9 the processes of this run with the word in their command line."""
    mark = f"BNN_COMPUTED={os.environ['BNN_COMPUTED']}".encode()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                environment, words = (pathlib.Path(entry, name).read_bytes() for name in ("environ", "cmdline"))
                if mark in environment.split(b"\0") and word.encode() in words:
                    os.kill(int(entry.name), signal.SIGKILL)


class _HalfFile:
    """A file of which only half of what is written arrives."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        return int(self._file.write(data[: len(data) // 2]))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _FullFile:
    """A file for which there is no space left."""

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _halved(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with half of the bytes; for a log, whose lines are made inside, half of the file's next write."""
    if hasattr(args[0], "_file"):
        args[0]._file = _HalfFile(args[0]._file)
        return args
    return tuple(x[: len(x) // 2] if isinstance(x, bytes) else x for x in args)


class _AfterImport:
    """Calls back when a module has been imported, before anybody else sees it."""

    def __init__(self, callbacks: dict[str, list[Callable[[ModuleType], None]]]) -> None:
        self.callbacks = callbacks

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in self.callbacks:
            return None
        callbacks = self.callbacks.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def run(module: ModuleType) -> None:
            execute(module)
            for callback in callbacks:
                callback(module)

        spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec


def _record(module: ModuleType) -> None:
    """Every begin of a computation, and every label that reached the disk, leaves a line."""

    def line(word: str, frame_id: str) -> None:
        log = os.open(os.environ["BNN_COMPUTED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, f"{word} {frame_id}\n".encode())
        os.close(log)

    label, write_done = module.label, module.write_done

    def recorded_label(oracle: Any, frame: Any, *args: Any) -> Any:
        line("begin", frame.content_id(module.fingerprint(oracle)))
        return label(oracle, frame, *args)

    def recorded_write_done(spool: Any, result: Any) -> None:
        write_done(spool, result)
        line("written", result.frame_id)

    module.label, module.write_done = recorded_label, recorded_write_done  # type: ignore[attr-defined]


def _let_clock_jump() -> None:
    """time.time as after somebody set the clock: a day ahead and back, again and again."""
    true_time, calls = time.time, iter(range(10**12))

    def jumping() -> float:
        return true_time() + JUMP * (0, 1, 0, -1)[next(calls) // 5 % 4]

    time.time = jumping
    time.time_ns = lambda: int(jumping() * 1e9)


def _begin() -> None:
    callbacks: dict[str, list[Callable[[ModuleType], None]]] = {}
    for facts in json.loads(os.environ.get("BNN_FAULT", "[]")):
        if facts["action"] == "jump":
            _let_clock_jump()
        elif facts["role"] == role():
            fault = Fault(facts)
            if fault.module in sys.modules:
                fault.patch(sys.modules[fault.module])
            else:
                callbacks.setdefault(fault.module, []).append(fault.patch)
    if "BNN_COMPUTED" in os.environ:
        # Parsl's interchange would write its title over its environment, by which the processes of a run are found
        sys.modules["setproctitle"] = None  # type: ignore[assignment]
        # first, so that a fault strikes before and after what is recorded as well
        callbacks.setdefault("bnn_driver.oracle", []).insert(0, _record)
    if callbacks:
        sys.meta_path.insert(0, _AfterImport(callbacks))  # type: ignore[arg-type]


_begin()
