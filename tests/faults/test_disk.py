"""A disk that is full, a run directory that is read-only, files that are torn: an error that names the file and the remedy."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
from campaign import Fault, Place, Table
from test_kill_points import FILES, RUN, STORE
from verify import resumes

from bnn_driver.store import weights

pytestmark = pytest.mark.ipi
ENVIRONMENT = (3,)


def full(name: str, role: str, place: str, match: str = "", call: int = 1) -> Fault:
    return Fault(
        f"disk full: {name}",
        role,
        place,
        "before",
        call,
        match,
        action="full",
        lasting=True,
        ends=ENVIRONMENT,
        says="No space left",
    )


@dataclass(frozen=True)
class FullDisk:
    """No space for what one process writes, in one start; then there is."""

    name: str
    faults: list[Fault]

    def attack(self, folder: Path) -> None:
        """Strike, each time on what the last one left."""
        place = Place(folder)
        for fault in self.faults:
            place.strike(fault)
        resumes(place)


@dataclass(frozen=True)
class SmallDisk:
    """A real file system that runs full somewhere, and is made a little larger for the next start."""

    name: str = "a real full disk"

    def attack(self, folder: Path) -> None:
        """The driver, the trainer, the worker and i-PI all hit the wall, wherever it happens to be."""
        place = Place(folder)
        with mounted(place.run, "-t", "tmpfs", "-o", "size=24k", "none"):
            for size in (24, 56, 100, 140):
                subprocess.run(["mount", "-o", f"remount,size={size}k", place.run], check=True)
                row = "disk full: tmpfs"
                Table.attempt(row)
                code, said = place.end(place.start())
                assert code in (3, 6), f"with {size} kB the run ended with {code}:\n{said}"
                assert "Traceback" not in said, said
                assert "No space left" in said or code == 6, said
                place.hits.append(row)
            subprocess.run(["mount", "-o", "remount,size=50m", place.run], check=True)
            resumes(place)


@dataclass(frozen=True)
class ReadOnly:
    """Nothing can be written, at the start or from some moment on."""

    name: str = "a read-only run directory"

    def attack(self, folder: Path) -> None:
        """Refused with the folder's name; goes on when it can be written again."""
        place, row = Place(folder), "read-only run directory"
        place.strike(
            Fault(
                "kill driver: after its third reply", "driver", "bnn_driver.ipi.transport:Channel.write", "after", 3, "FORCEREADY"
            )
        )
        Table.attempt(row)
        with read_only(place.run):
            code, said = place.end(place.start())
        assert code == 3, said
        assert str(place.run) in said
        assert "Traceback" not in said, said
        place.hits.append(row)
        resumes(place)


@dataclass(frozen=True)
class TornFiles:
    """Files cut in the middle, as by a failing disk: no kill of ours can do that."""

    name: str = "torn files"

    def attack(self, folder: Path) -> None:
        """One kind after the other is refused and repaired; what may be skipped is skipped."""
        place = Place(folder)
        code, said = place.end(place.start())
        assert code == 0, said
        for row, file in self._refused(place):
            Table.attempt(row)
            place.lengthen(place.steps + 2)
            whole = file.read_bytes() if file.exists() else None
            file.write_bytes(_torn(whole, amid=row.startswith("torn line")))
            code, said = place.end(place.start())
            assert code in (3, 4), f"{row}: the run ended with {code}:\n{said}"
            assert str(file) in said, f"{row}: {file} is not named in\n{said}"
            assert "Traceback" not in said, said
            _put(file, whole)
            place.hits.append(row)
        resumes(place)
        self._skipped(place)

    def _refused(self, place: Place) -> list[tuple[str, Path]]:
        return [
            ("torn label", place.run / "labels" / "000001.extxyz"),
            ("torn line amid the events", place.run / "events" / "000.jsonl"),
            ("torn settings.json", place.run / "settings.json"),
            ("torn pending frame", place.run / "oracle" / "pending" / f"{'0' * 32}.json"),
        ]

    def _skipped(self, place: Place) -> None:
        """Damage that costs nothing: the program goes on by itself."""
        generations, ipi = place.run / "generations", place.run / "ipi"
        newest = weights.latest(generations)
        assert newest
        damage: dict[str, Callable[[], object]] = {
            "torn last line of events": lambda: _append(sorted((place.run / "events").iterdir())[-1], b'{"kind": "dec'),
            "torn newest generation": lambda: _cut(generations / f"{newest:06d}" / "weights.safetensors"),
            "torn RESTART of i-PI": lambda: (_cut(ipi / "RESTART"), _cut(ipi / "simulation.restart")),
            "garbage in LOCK": lambda: (place.run / "LOCK").write_bytes(b"\x00\xff{"),
            "left-over temporary files": lambda: [
                (place.run / where / name).write_bytes(b"half")
                for where, name in [("labels", ".000009.extxyz.0123.tmp"), ("generations", ".current.0123.tmp")]
            ],
            "torn record of a failure": lambda: _write(place.run / "oracle" / "spool" / "failed" / f"{'1' * 32}.json", b"{"),
            "torn i-PI pid": lambda: (ipi / "ipi.pid").write_bytes(b'{"pi'),
        }
        for row, do in damage.items():
            Table.attempt(row)
            do()
            place.hits.append(row)
        place.lengthen(place.steps + 4)
        resumes(place)


@dataclass(frozen=True)
class LostTruth:
    """What holds the truth is torn: the only record of a label, and every generation of weights."""

    name: str = "lost truth"

    def attack(self, folder: Path) -> None:
        """Refused with the file and what to do; done, the run goes on from what is left."""
        place = Place(folder)
        computed = Fault("kill driver: label computed, not written", "driver", f"{STORE}:LabelStore.write", "before", 3)
        place.strike(computed)
        spool = place.run / "oracle" / "spool" / "done"
        (pending,) = (place.run / "oracle" / "pending").glob("*.json")
        self._refused(place, "torn result of the oracle", [spool / pending.name], spool / pending.name)
        (spool / pending.name).unlink()  # what the message says
        place.forget(pending.stem)
        generations = place.run / "generations"
        self._refused(place, "all generations torn", list(generations.glob("*/weights.safetensors")), generations)
        shutil.rmtree(generations)
        resumes(place)

    def _refused(self, place: Place, row: str, files: list[Path], named: Path) -> None:
        Table.attempt(row)
        for file in files:
            _cut(file)
        code, said = place.end(place.start())
        assert code in (3, 4), f"{row}: the run ended with {code}:\n{said}"
        assert str(named) in said, said
        assert "remove the file" in said or "delete the folder" in said, said
        assert "Traceback" not in said, said
        place.hits.append(row)


def _torn(whole: bytes | None, amid: bool) -> bytes:
    """The first half, or all but a piece in the middle; of a file that is not there the beginning."""
    if whole is None:
        return b'{"frame": {"numbers": [8'
    half = len(whole) // 2
    return whole[:half] + (whole[half + 10 :] if amid else b"")


def _put(file: Path, content: bytes | None) -> None:
    """The documented repair: restore the file, or remove what was never needed."""
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


def _append(file: Path, content: bytes) -> None:
    file.write_bytes(file.read_bytes() + content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


@contextlib.contextmanager
def mounted(target: Path, *options: str) -> Iterator[None]:
    """A file system at `target` for as long as the context lasts; skips where mounting is not allowed."""
    target.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, target], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", target], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """By permissions, which do not bind root, who mounts instead."""
    if os.geteuid() == 0:
        with mounted(folder, "--bind", str(folder)):
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
            yield
        return
    places = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    files = [p for p in folder.rglob("*") if p.is_file()]
    for path in [*files, *places]:
        path.chmod(path.stat().st_mode & ~0o222)
    yield
    for path in [*places, *files]:
        path.chmod(path.stat().st_mode | 0o200)


TRIALS = [
    FullDisk(
        "driver",
        [
            full("settings", "driver", f"{FILES}:write_synced", "settings.json"),
            full("generation 0", "driver", f"{FILES}:write_synced", "state.json"),
            full("pending frame", "driver", f"{FILES}:write_synced", "pending"),
            full("label", "driver", f"{FILES}:write_synced", "labels"),
            full("event", "driver", f"{RUN}:EventLog.append", "decision"),
        ],
    ),
    FullDisk(
        "helpers",
        [
            full("the oracle's result", "worker", "bnn_driver.oracle:_replace", "done"),
            full("generation", "trainer", f"{FILES}:write_synced", "weights"),
        ],
    ),
    SmallDisk(),
    ReadOnly(),
    TornFiles(),
    LostTruth(),
]


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_the_disk_fails(trials: dict[str, Future[None]], trial: FullDisk) -> None:
    trials[trial.name].result()
