"""i-PI as a process of ours: started on an input or on where it stopped, watched, ended cleanly.

i-PI's exit code is 0 in every case, so what happened is read from its RESTART and its log.  A clean exit leaves RESTART; a
kill leaves only the last <checkpoint>: the furthest readable file of both is where it goes on.  i-PI empties a checkpoint before it
writes it anew, so copies of the last whole ones are kept.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import psutil

from bnn_driver.errors import ConfigError, EnvironmentProblem, IpiGone
from bnn_driver.ipi.inputs import IpiInput, read_input
from bnn_driver.ipi.preparing import reseeded
from bnn_driver.ipi.transport import Endpoint, has_listener, remove_stale_socket

__all__ = ["IpiInput", "IpiProcess", "read_input"]

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
KEEP_SECONDS = 20.0
"""How often the newest checkpoint is copied."""
KEPT = "kept.checkpoint"
OLDER = ("older_1.checkpoint", "older_2.checkpoint", "older_3.checkpoint")
"""The copies before that one, from new to old."""
MARK = "# i-PI started on "
PROCESS = Path(__file__).with_name("ipi_main.py")


class IpiProcess:
    """One i-PI in one working folder."""

    def __init__(self, xml: Path, folder: Path, log_file: Path) -> None:
        """Nothing is started yet.

        Args: xml: the user's input.   folder: i-PI's working folder, made if need be: RESTART, EXIT and all outputs lie there.
            log_file: i-PI's own messages, appended.
        """
        self.xml = Path(xml).absolute()
        self.folder = Path(folder).absolute()
        self.log_file = Path(log_file).absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._endpoints: tuple[Endpoint, ...] = ()
        self._checkpoints: tuple[str, ...] = ()
        self._ended = threading.Event()
        self._copying: threading.Thread | None = None

    def start(self) -> IpiInput:
        """Start i-PI on the user's input, or where an earlier run in this folder stopped; returns what it runs on.

        Call it from a thread that lives as long as the driver: i-PI is told to end when that thread does.
        Raises: ConfigError, also when all steps are done; EnvironmentProblem when i-PI or its socket cannot be had.
        """
        if self.is_running:
            raise EnvironmentProblem(f"i-PI already runs in {self.folder} (pid {self._process.pid if self._process else '?'})")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._end_previous()
        source = self._prepare()
        effective = read_input(source)
        if effective.step >= effective.total_steps:
            raise ConfigError(
                f"i-PI in {self.folder} has done all {effective.total_steps} steps; raise <total_steps> in {self.xml} to go on"
            )
        self._endpoints, self._checkpoints = effective.endpoints, effective.checkpoint_files
        self._remove_stale_sockets()
        (self.folder / "EXIT").unlink(missing_ok=True)
        self._spawn(source)
        return effective

    def _remove_stale_sockets(self) -> None:
        for endpoint in self._endpoints:
            if endpoint.kind == "unix":
                remove_stale_socket(endpoint.path)

    def _spawn(self, source: Path) -> None:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", str(PROCESS), str(os.getpid()), str(ipi_script()), source.name]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        with self.log_file.open("ab") as stream:
            stream.write(f"{MARK}{source} at {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            stream.flush()
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the driver, which then ends i-PI
            )
        self._pid_file.write_text(json.dumps({"pid": self._process.pid}))
        self._ended.clear()
        self._copying = threading.Thread(target=self._keep_checkpoints, daemon=True, name="checkpoints")
        self._copying.start()
        log.info("i-PI started on %s in %s (pid %d)", source.name, self.folder, self._process.pid)

    def _keep_checkpoints(self) -> None:
        while not self._ended.wait(KEEP_SECONDS):
            try:
                self.keep_checkpoint()
            except OSError as error:
                log.warning("the last checkpoint in %s could not be copied: %s", self.folder, error)

    def keep_checkpoint(self) -> None:
        """Copy the newest whole checkpoint: a kill while i-PI writes it would leave none.  Raises: OSError."""
        files = [file for pattern in self._checkpoints for file in self.folder.glob(pattern)]
        kept = self.folder / KEPT
        newest = max(files, key=lambda file: file.stat().st_mtime_ns, default=None)
        if newest is None or (kept.exists() and newest.stat().st_mtime_ns == kept.stat().st_mtime_ns):
            return
        time_ns, content = newest.stat().st_mtime_ns, newest.read_bytes()
        if not content.rstrip().endswith(b"</simulation>"):
            return  # it is being written
        partial = kept.with_name(kept.name + ".part")
        partial.write_bytes(content)
        os.utime(partial, ns=(time_ns, time_ns))
        if kept.exists():
            self._shift()
        partial.replace(kept)

    def _shift(self) -> None:
        """Make room for a new copy; the newest stays where it is until it is replaced."""
        files = [self.folder / name for name in OLDER]
        for newer, older in reversed(list(itertools.pairwise(files))):
            if newer.exists():
                newer.replace(older)
        _put(files[0], (self.folder / KEPT).read_text())

    def rewind(self, below: int, seed: int) -> int | None:
        """Have the next start begin at the furthest checkpoint before a step, with other random numbers; i-PI must have ended.

        Args: below: a step.   Returns: the step of that checkpoint; None when there is none, and nothing is changed.
        """
        if self._copying is not None:
            self._copying.join()
        files = self._restarts()
        begun, given = self.folder / "input.xml", read_input(self.xml)
        if given.checkpoint_files and _restart_number(begun, "step") is not None:  # without checkpoints it is all that was done
            files[begun] = given.step
        target = max((file for file, step in files.items() if step < below), key=lambda file: files[file], default=None)
        if target is None:
            return None
        step = files[target]
        _put(self.folder / KEPT, reseeded(target.read_text(), seed))
        for file, reached in files.items():
            if reached >= step and file.name not in (KEPT, begun.name):
                file.unlink()
        return step

    @property
    def _pid_file(self) -> Path:
        return self.folder / "ipi.pid"

    def _end_previous(self) -> None:
        """End an i-PI of an earlier driver in this folder; a pid that belongs to another program by now is left alone."""
        try:
            record = json.loads(self._pid_file.read_text())
            previous = psutil.Process(int(record["pid"]))
            if self._is_ours(previous):
                log.warning("ending the i-PI that an earlier driver left in %s (pid %d)", self.folder, previous.pid)
                _end(previous, terminate_seconds=10.0)
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            pass
        self._pid_file.unlink(missing_ok=True)

    def _is_ours(self, process: psutil.Process) -> bool:
        """Whether it is an i-PI in this folder; times of creation do not tell, for they follow the clock when that is set."""
        return Path(process.cwd()) == self.folder.resolve() and any(Path(word).name == "i-pi" for word in process.cmdline())

    def _prepare(self) -> Path:
        """The file to run, in the folder, with the files it names."""
        restart = self._furthest_restart()
        text = copy_named_files(self.xml.read_text(), self.xml.parent, self.folder, overwrite=restart is None)
        if restart is None:
            target = self.folder / "input.xml"
            if self.xml.suffix == ".json":
                target = target.with_suffix(".json")
        else:
            total = read_input(self.xml).total_steps  # the user may have raised it
            text = re.sub(r"<total_steps>[^<]*</total_steps>", f"<total_steps> {total} </total_steps>", restart.read_text())
            target = self.folder / "restart.xml"
            log.info("i-PI goes on from %s at step %s", restart.name, _restart_number(restart, "step"))
        if target.exists() and target.samefile(self.xml):
            return target
        _put(target, text)
        return target

    def _furthest_restart(self) -> Path | None:
        """RESTART or the checkpoint with the largest step, or what this start began with; a torn file is passed over."""
        steps = self._restarts()
        return max(steps, key=lambda file: (steps[file], file.name == "RESTART", file.name == KEPT), default=None)

    def _restarts(self) -> dict[Path, int]:
        """Files that i-PI could go on from, and their steps."""
        patterns = ("RESTART", KEPT, *OLDER, "restart.xml", *read_input(self.xml).checkpoint_files)
        files = {file for pattern in patterns for file in self.folder.glob(pattern)}
        return {file: step for file in sorted(files) if (step := _restart_number(file, "step")) is not None}

    @property
    def is_running(self) -> bool:
        """Whether the i-PI started here is alive."""
        return self._process is not None and self._process.poll() is None

    def wait_until_listening(self, effective: IpiInput, timeout: float, given_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until i-PI listens on all its sockets, or the caller has given it up.

        Raises: IpiGone with the end of its log when it died, or does not listen within `timeout` (s).
        """
        end = time.monotonic() + timeout
        while not given_up() and not all(self._listens(endpoint) for endpoint in effective.endpoints):
            if not self.is_running:
                raise IpiGone(f"i-PI ended before it listened; the end of {self.log_file}:\n{self.tail(15)}")
            if time.monotonic() > end:
                raise IpiGone(f"i-PI does not listen after {timeout:g} s; the end of {self.log_file}:\n{self.tail(15)}")
            time.sleep(POLL_SECONDS)

    def _listens(self, endpoint: Endpoint) -> bool:
        if endpoint.kind == "unix":
            return has_listener(endpoint.path)
        try:
            connections = psutil.Process(self._process.pid if self._process else -1).net_connections(kind="inet")
        except (psutil.Error, ValueError):
            return False
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == endpoint.port for c in connections)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for i-PI to end; False when it still runs after `timeout` (s; None: for ever)."""
        if self._process is None:
            return True
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        self._ended.set()
        self._pid_file.unlink(missing_ok=True)
        with contextlib.suppress(EnvironmentProblem):  # another i-PI has taken the address
            self._remove_stale_sockets()
        return True

    def stop(self, exit_seconds: float, terminate_seconds: float) -> bool:
        """Ask by an EXIT file, then SIGTERM, then SIGKILL; True when i-PI ended by itself and so left a RESTART.

        Close the client first: i-PI ends only when no call is in flight.
        """
        if self._process is None or not self.is_running:
            return self.wait()
        exit_file = self.folder / "EXIT"
        exit_file.touch()
        clean = self.wait(exit_seconds)
        if not clean:
            log.warning("i-PI did not end within %g s of EXIT: terminating it", exit_seconds)
            clean = _end(psutil.Process(self._process.pid), terminate_seconds)
        self.wait()
        exit_file.unlink(missing_ok=True)
        return clean

    def tail(self, lines: int) -> str:
        """The last lines of i-PI's log."""
        return "\n".join(self._log_since_start().splitlines()[-lines:])

    def _log_since_start(self) -> str:
        if not self.log_file.is_file():
            return ""
        return self.log_file.read_text(errors="replace").rpartition(MARK)[2]

    def reached(self) -> int:
        """Step at which i-PI goes on: that of RESTART or of the furthest checkpoint, or of the input."""
        restart = self._furthest_restart()
        return read_input(self.xml).step if restart is None else _restart_number(restart, "step") or 0

    def stopped_on_request(self) -> bool:
        """Whether i-PI ended before its last step because it was told to: by an EXIT file or its wall-clock limit."""
        text = self._log_since_start()
        return any(words in text for words in ("EXIT file detected", "Wall clock time expired", "Maximum wallclock"))

    def finished(self) -> bool:
        """Whether the simulation is complete: all steps done, or ended by itself before (a converged optimisation).

        i-PI logs "reports success" after an EXIT file too, so that line counts only without one.
        """
        restart = self._furthest_restart()
        step = None if restart is None else _restart_number(restart, "step")
        if restart is not None and step is not None:
            total = read_input(self.xml).total_steps
            if step >= total:
                return True
            if total != _restart_number(restart, "total_steps"):
                return False  # whatever the log says, it was before the user changed <total_steps>
        text = self._log_since_start()
        cut_short = ("EXIT file detected", "Wall clock time expired", "Maximum wallclock", "Kill signal", "Client shutdown")
        return not self.is_running and "I-PI reports success" in text and not any(words in text for words in cut_short)


def copy_named_files(text: str, source: Path, folder: Path, overwrite: bool) -> str:
    """Copy every relative file that an input names into another folder; names that leave its own folder become absolute.

    Args: text: of the input.   source: folder that its names are seen from.   Returns: the text for the other folder.
    """
    if source == folder:
        return text
    for name in sorted(set(re.findall(r"[^\s<>='\",:;{}()\[\]]+", text)), key=len, reverse=True):
        file = source / name
        if Path(name).is_absolute() or not file.is_file():
            continue
        if ".." in Path(name).parts:
            text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w/-])", str(file.resolve()), text)
        elif overwrite or not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)  # not its mode: the umask rules
    return text


def ipi_script() -> Path:
    """The `i-pi` of this environment.  Raises: EnvironmentProblem without one."""
    beside = Path(sysconfig.get_path("scripts")) / "i-pi"
    found = beside if beside.is_file() else shutil.which("i-pi")
    if found is None:
        raise EnvironmentProblem("i-PI is not installed in this environment (no script `i-pi`): pip install 'ipi>=3.3'")
    return Path(found)


def _restart_number(file: Path, tag: str) -> int | None:
    """Integer of a RESTART or checkpoint, such as its step; None for a torn or empty file."""
    try:
        text = ET.parse(file).getroot().findtext(tag)
        return 0 if text is None else int(text)
    except (OSError, ET.ParseError, ValueError):
        return None


def _put(file: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    partial = file.with_name(file.name + ".part")
    partial.write_text(text)
    partial.replace(file)


def _end(process: psutil.Process, terminate_seconds: float) -> bool:
    """SIGTERM, then SIGKILL; True when SIGTERM was enough."""
    process.terminate()
    try:
        process.wait(terminate_seconds)
    except psutil.TimeoutExpired:
        log.warning("i-PI (pid %d) does not end by itself: killed, and only its last checkpoint is left", process.pid)
        process.kill()
        process.wait(10)
        return False
    return True
