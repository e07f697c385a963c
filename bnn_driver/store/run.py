"""The run directory: its folders, its locks, its fixed settings, and the log of events."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnn_driver.errors import BnnError, ConfigError, EnvironmentProblem, LockedError, writing
from bnn_driver.store.files import holder, plain, read_json, write_atomic

__all__ = ["EventLog", "RunDirectory", "read_events", "read_json", "read_segments", "write_atomic"]

_log = logging.getLogger(__name__)
_UNSAID = {"sampled": "all", "predicted_noise": ["forces"]}
"""Physics that runs of older versions have without recording it."""
WALKERS = "walkers"
_SEGMENT = re.compile(r"^(\d{3,})\.jsonl$")


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run; creates what is missing and changes nothing that is there.

    Walkers are simulations that share labels, generations, settings and the oracle's results; each has its own events, i-PI folder,
    logs, frames in flight and driver's lock in `walkers/NAME/`.

    Raises: EnvironmentProblem when the folder cannot be made.
    """

    path: Path
    walker: str = ""
    """Name of the walker whose own folders are meant; empty: those of the run itself."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).absolute())
        own = (self.events_dir, self.oracle_dir, self.ipi_dir, self.log_dir)
        folders = (self.labels_dir, self.generations_dir, self.path / "events", *own)
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"the run directory {self.path} cannot be made: {error}") from error

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """Open a run for reading.  Raises: EnvironmentProblem when `path` holds no run."""
        if not (Path(path) / "events").is_dir() or not (Path(path) / "labels").is_dir():
            raise EnvironmentProblem(f"{path} is no run directory: expected the folders events/ and labels/ in it")
        return cls(Path(path))

    @property
    def home(self) -> Path:
        """Folder of what belongs to one simulation alone."""
        return self.path / WALKERS / self.walker if self.walker else self.path

    def walkers(self) -> list[str]:
        """Names of the walkers that have been started, in order."""
        return sorted(folder.parent.name for folder in (self.path / WALKERS).glob("*/events"))

    @property
    def labels_dir(self) -> Path:
        """One extxyz per label, see dataset.LabelStore."""
        return self.path / "labels"

    @property
    def generations_dir(self) -> Path:
        """Weights of all members, see weights.publish."""
        return self.path / "generations"

    @property
    def events_dir(self) -> Path:
        """One JSON lines file per start, see EventLog."""
        return self.home / "events"

    @property
    def oracle_dir(self) -> Path:
        """Work folders and pending frames of the oracle."""
        return self.home / "oracle"

    @property
    def spool_dir(self) -> Path:
        """Results of the oracle, of all walkers."""
        return self.spool_of(self.path)

    @staticmethod
    def spool_of(path: Path) -> Path:
        """The same for a run directory that may not exist yet."""
        return path / "oracle" / "spool"

    @property
    def ipi_dir(self) -> Path:
        """i-PI's working folder."""
        return self.home / "ipi"

    @property
    def log_dir(self) -> Path:
        """Text logs of all processes."""
        return self.home / "log"

    @property
    def settings_file(self) -> Path:
        """Effective settings and the physics that must not change."""
        return self.path / "settings.json"

    def lock_file(self, role: str) -> Path:
        """LOCK of the driver of this walker, LOCK.trainer of the one trainer of the run."""
        return self.home / "LOCK" if role == "driver" else self.path / f"LOCK.{role}"

    @contextlib.contextmanager
    def lock(self, role: str, wait: bool = False) -> Iterator[None]:
        """Own the run as `role` ("driver", "trainer") while the context lasts; a killed owner frees it at once.

        Args: wait: until the owner is gone, for a process that stands by and is ended from outside.
        Raises: LockedError naming the live owner, EnvironmentProblem when the file system has no locks or no space.
        """
        path = self.lock_file(role)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise EnvironmentProblem(f"{path} cannot be opened: {error}") from error
        try:
            before = os.pread(descriptor, 4096, 0).decode(errors="replace")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockedError(_locked_message(self.home, role, before)) from None
            except OSError as error:
                raise EnvironmentProblem(
                    f"{path} lies on a file system without locks ({error}); put the run directory on one that has them"
                ) from error
            _warn_of_other_host(path, before)
            # Never deleted: a second process could hold the old file while a third locks a new one.
            with writing(path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder(role) | {"start": _now()}).encode(), 0)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # a disk that failed meanwhile: the lock ends with the descriptor all the same
                    os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def fix_settings(
        self, effective: dict[str, Any], physics: dict[str, Any], events: EventLog | None = None
    ) -> dict[str, list[Any]]:
        """Write the settings at the first start; at later ones refuse another physics and note every other change.

        Args: effective: all settings in use.   physics: what must stay (oracle fingerprint, model checksum, numbers, periodic,
            charge, multiplicity, ...).   events: log that gets one "settings" event with the changes.
        Returns: dotted key -> [old, new] of every other setting that changed.
        Raises: ConfigError naming each physics key that differs, with both values.
        """
        new = {"effective": plain(effective), "physics": plain(physics)}
        content = json.dumps(new, indent=1).encode() + b"\n"
        if not self.settings_file.exists():
            write_atomic(self.settings_file, content)
            return {}
        old = self.refuse_other_physics(physics)
        changed = _differences(old["effective"], new["effective"])
        if changed:
            write_atomic(self.settings_file, content)
            if events is not None:
                events.append("settings", changed=changed)
        return changed

    def refuse_other_physics(self, physics: dict[str, Any]) -> dict[str, Any]:
        """The settings with which the run was begun.  Raises: ConfigError naming each physics key that differs, with both values."""
        old: Any = read_json(self.settings_file)
        if not isinstance(old, dict) or not {"effective", "physics"} <= old.keys():
            raise EnvironmentProblem(
                f"{self.settings_file} has no tables effective and physics; restore it from a copy or start a new run directory"
            )
        unsaid = {key: value for key, value in _UNSAID.items() if key in physics}
        forbidden = _differences(unsaid | old["physics"], plain(physics))
        if forbidden:
            lines = "\n".join(f"  {key}: was {_short(a)}, now {_short(b)}" for key, (a, b) in forbidden.items())
            raise ConfigError(
                f"{self.path} was begun with other physics, and its labels and weights cannot be mixed with the new:\n{lines}\n"
                "Restore the old values, or give the new ones a run directory of their own ([run] directory)."
            )
        return old

    def live_owner(self, role: str) -> str | None:
        """Who holds the lock of `role` now, in words; None when nobody does."""
        try:
            descriptor = os.open(self.lock_file(role), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _owner(os.pread(descriptor, 4096, 0).decode(errors="replace"))
        finally:
            os.close(descriptor)
        return None


class EventLog:
    """Facts of one start, one JSON line each, in a segment NNN.jsonl of its own.

    Raises: EnvironmentProblem when the segment cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        last = max((n for n, _ in _segments(folder)), default=-1)
        try:
            for number in itertools.count(last + 1):
                with contextlib.suppress(FileExistsError):  # another process took that number between listing and opening
                    self.path = folder / f"{number:03d}.jsonl"
                    self._file = open(self.path, "xb")  # noqa: SIM115 - lives as long as the log
                    self.segment = number
                    break
        except OSError as error:
            raise EnvironmentProblem(f"no event log can be opened in {folder}: {error}") from error

    def append(self, kind: str, /, **facts: Any) -> None:
        """Write one line {"kind", "time" (s since 1970), facts...} and hand it to the system; a killed process loses none.

        Raises: BnnError for a number that is not finite, EnvironmentProblem when the disk refuses; the log is then closed,
            so that a torn line can only be the last.
        """
        if clash := {"kind", "time"} & facts.keys():
            raise BnnError(f"the event {kind!r} may not have a fact named {' or '.join(sorted(clash))}: the log sets it")
        try:
            line = json.dumps({"kind": kind, "time": time.time(), **plain(facts)}, allow_nan=False)
        except ValueError:
            raise BnnError(
                f"the event {kind!r} holds a number that is not finite: {facts!r}; events take finite numbers only"
            ) from None
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError):
                self._file.close()
            raise EnvironmentProblem(
                f"{self.path} could not take the event {kind!r}: {error}; free space and start again"
            ) from error

    def close(self) -> None:
        """Flush and close; closing twice is allowed."""
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Events of all starts in order; a torn last line of any segment is skipped.

    Raises: EnvironmentProblem naming file and line for damage elsewhere.
    """
    for segment in read_segments(folder):
        yield from segment


def announced_labels(folder: Path) -> set[str]:
    """Frame ids of the labels that have their event."""
    return {event["frame_id"] for event in read_events(folder) if event["kind"] == "label"}


def read_segments(folder: Path) -> Iterator[Iterator[dict[str, Any]]]:
    """The same events, one iterator per start."""
    for _, path in _segments(folder):
        yield _read_segment(path)


def _read_segment(path: Path) -> Iterator[dict[str, Any]]:
    torn: int | None = None
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if torn is not None:
                raise EnvironmentProblem(
                    f"{path}:{torn} is not a JSON object, though lines follow it: the file was edited or the disk is damaged. "
                    "Restore the file, or delete that line."
                )
            event = _parsed(line)
            if event is None:
                torn = number
            else:
                yield event
    if torn is not None:
        _log.info("%s:%d is torn (the process was killed while writing); skipped", path, torn)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _segments(folder: Path) -> list[tuple[int, Path]]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), folder / name) for name in names if (match := _SEGMENT.match(name)))


def _differences(old: Any, new: Any) -> dict[str, list[Any]]:
    a, b = _flat(old), _flat(new)
    absent = "(absent)"
    return {
        key: [a.get(key, absent), b.get(key, absent)]
        for key in sorted(a.keys() | b.keys())
        if json.dumps(a.get(key, absent)) != json.dumps(b.get(key, absent))
    }


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:150] + f"... ({len(text)} characters)"


def _locked_message(run: Path, role: str, content: str) -> str:
    owner = _parsed(content.encode()) or {}
    return (
        f"{run} already has a live {role}: {_owner(content)}. Wait for it, stop it there with `kill {owner.get('pid', 'PID')}`, "
        "or use another run directory."
    )


def _owner(content: str) -> str:
    owner = _parsed(content.encode()) or {}
    return f"pid {owner.get('pid', 'unknown')} on host {owner.get('host', 'unknown')} (since {owner.get('start', 'unknown')})"


def _warn_of_other_host(path: Path, content: str) -> None:
    owner = _parsed(content.encode())
    here = holder("")["host"]
    if owner and owner.get("host") not in (None, here):
        _log.warning(
            "%s was not released by pid %s on host %s; where hosts do not share file locks, make sure that it is dead",
            path,
            owner.get("pid"),
            owner.get("host"),
        )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
