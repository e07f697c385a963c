"""One run directory under attack: start the program, let a fault strike, look at what is left, start again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from small_run import command, write_run

from bnn_driver.oracle import read_done
from bnn_driver.store import weights
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import read_events

INSIDE = Path(__file__).parent / "inside"
LIMIT = float(os.environ.get("BNN_FAULTS_LIMIT", "300"))
"""s within which any start must have ended; more on a machine that is busy with other work."""
ORPHANS = 5.0
"""s after which nothing of an ended or killed run may live."""
EXECUTORS = {"local": ""}
"""Where labels are computed -> what the config needs for it; every fault of a worker is tried with each."""
TIMES = int(os.environ.get("BNN_FAULTS", "1"))
"""How many times as many random faults: BNN_FAULTS=20 for a campaign of an hour."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong where: the n-th call, in one process of that role, of a function whose arguments contain `match`."""

    name: str
    """Row of the table."""
    role: str
    """driver, trainer, worker or ipi."""
    place: str
    """module:function or module:Class.method."""
    when: str
    """before, after, or torn: half of the bytes are written first."""
    call: int = 1
    match: str = ""
    action: str = "kill"
    """kill, full (no space on the disk), hang, stop (SIGSTOP), jump (of the clock, in all processes)."""
    lasting: bool = False
    """True: every later call too."""
    ends: tuple[int, ...] = (-signal.SIGKILL,)
    """How the program may end."""
    says: str = ""
    """What its message must contain."""


class Table:
    """Fault -> how often tried, how often survived; printed at the end of the tests."""

    tried: ClassVar[Counter[str]] = Counter()
    survived: ClassVar[Counter[str]] = Counter()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def attempt(cls, name: str, times: int = 1) -> None:
        """A fault strikes."""
        with cls._lock:
            cls.tried[name] += times

    @classmethod
    def survive(cls, name: str) -> None:
        """The run went on to its end, and all its books agree."""
        with cls._lock:
            cls.survived[name] += 1

    @classmethod
    def rows(cls) -> list[str]:
        """One line per fault."""
        width = max((len(name) for name in cls.tried), default=5)
        head = f"{'fault':<{width}} | tried | survived"
        lines = [f"{name:<{width}} | {cls.tried[name]:5d} | {cls.survived[name]:8d}" for name in cls.tried]
        total = f"{'all':<{width}} | {cls.tried.total():5d} | {cls.survived.total():8d}"
        return [head, "-" * len(head), *lines, total]


@dataclass
class Place:
    """A small run in a folder of its own; every process of it carries the folder's name in its environment."""

    folder: Path
    steps: int = 12
    options: dict[str, Any] = field(default_factory=dict)
    executor: str = "local"
    starts: int = 0
    hits: list[str] = field(default_factory=list)
    """Faults whose survival is not proved before the run has ended well."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = write_run(self.folder, steps=self.steps, **self.options)
        text = self.config.read_text().replace("[accuracy]", "temperature_range = [1e-3, 1e3]\nloss_margin = 1e3\n[accuracy]")
        # a tight promise and many audits: something is asked in most steps
        text = text.replace('"400 meV"', '"150 meV"').replace("probability = 0.1", "probability = 0.25")
        self.config.write_text(text + EXECUTORS[self.executor])

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    @property
    def computed(self) -> Path:
        """The log of all computations."""
        return self.folder / "computed.log"

    def forget(self, frame_id: str) -> None:
        """Allow that a label is computed again, because the test has taken it away."""
        with self.computed.open("a") as log:
            log.write(f"lost {frame_id}\n")

    def edit(self, old: str, new: str) -> None:
        """Change the config."""
        text = self.config.read_text()
        assert old in text, f"{old!r} is not in {self.config}"
        self.config.write_text(text.replace(old, new))

    def lengthen(self, steps: int) -> None:
        """Raise <total_steps> to go on."""
        file = self.folder / "input.xml"
        file.write_text(file.read_text().replace(f"<total_steps>{self.steps}<", f"<total_steps>{steps}<"))
        self.steps = steps

    def start(self, fault: Fault | None = None, *arguments: str) -> subprocess.Popen[str]:
        """Begin `bnn-driver run` (or another verb) in the background."""
        self.starts += 1
        path = os.pathsep.join(filter(None, [str(INSIDE), os.environ.get("PYTHONPATH", "")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "BNN_COMPUTED": str(self.computed)}
        if fault is not None:
            environment["BNN_FAULT"] = json.dumps(asdict(fault) | {"marker": str(self.marker)})
        words = command(*(arguments or ("run", str(self.config))))
        with self.output.open("w") as output:
            return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment)

    @property
    def marker(self) -> Path:
        """Exists when the fault of this start has struck."""
        return self.folder / f"struck-{self.starts}"

    @property
    def output(self) -> Path:
        """What the program printed in this start."""
        return self.folder / f"output-{self.starts}.txt"

    def end(self, process: subprocess.Popen[str], limit: float = LIMIT) -> tuple[int, str]:
        """Wait for the end of a start, and that nothing of it lives on.  Returns: exit status and what it printed."""
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill_all()
            process.wait(10)
            raise AssertionError(f"start {self.starts} did not end within {limit:g} s:\n{self._story()}") from None
        try:
            until(lambda: not self.processes(), ORPHANS)
        except AssertionError:
            left = self.processes()
            self.kill_all()
            raise AssertionError(
                f"{ORPHANS:g} s after the end of start {self.starts} there live {left}\n{self._story()}"
            ) from None
        return process.returncode, self.output.read_text()

    def _story(self) -> str:
        return (
            f"{self.output.read_text()[-3000:]}\n{tail(self.run / 'log' / 'trainer.log')}\n{tail(self.run / 'log' / 'ipi.log')}"
        )

    def processes(self, role: str = "") -> dict[int, str]:
        """Live processes of this run, found by their environment.  Args: role: a word of their command line."""
        mark = f"BNN_COMPUTED={self.computed}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return {pid: words for pid, words in found.items() if role in words}

    def kill_all(self) -> None:
        """Clear up after a failure."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def strike(self, fault: Fault) -> str:
        """One start in which the fault strikes; what is left on disk must be sound.  Returns: what the program printed."""
        Table.attempt(fault.name)
        code, said = self.end(self.start(fault))
        assert self.marker.exists(), f"{fault} was never reached; the run ended with {code}:\n{self._story()}"
        assert code in fault.ends, f"{fault} ended the run with {code}, expected {fault.ends}:\n{self._story()}"
        assert fault.says in said, f"{fault}: expected {fault.says!r} in\n{said}"
        assert "Traceback" not in said, said
        self.hits.append(fault.name)
        self.check_disk()
        return said

    def check_disk(self) -> None:
        """What must hold at every moment, also with a run that was just killed."""
        labels = LabelStore(self.run / "labels").all() if (self.run / "labels").is_dir() else []
        names = sorted(p.name for p in (self.run / "labels").glob("*.extxyz"))
        assert names == [f"{n:06d}.extxyz" for n in range(len(labels))]
        ids = [item.label.frame_id for item in labels]
        assert len(ids) == len(set(ids)), "a frame has two labels"
        list(read_events(self.run / "events"))
        spool = self.run / "oracle" / "spool"
        done = {file.stem for file in (spool / "done").glob("*.json") if read_done(spool, file.stem)}
        assert set(ids) <= done, "a label without the oracle's own record of it"
        newest = weights.latest(self.run / "generations")
        if newest is not None:
            weights.load(self.run / "generations", newest)
        self.check_computations()

    def check_computations(self) -> None:
        """No computation begins of a label that was written."""
        written = set()
        for line in self.computed.read_text().splitlines() if self.computed.exists() else []:
            word, frame_id = line.split()
            assert word != "begin" or frame_id not in written, f"frame {frame_id} was computed again though it was written"
            if word == "written":
                written.add(frame_id)
            if word == "lost":
                written.discard(frame_id)


def until(condition: Callable[[], Any], seconds: float, interval: float = 0.05) -> None:
    """Wait.  Raises: AssertionError when it lasts longer."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain"
        time.sleep(interval)


def tail(file: Path, lines: int = 25) -> str:
    """The end of a log."""
    return f"--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-lines:]) if file.exists() else ""


def chains_of(faults: list[Fault], length: int) -> Iterator[list[Fault]]:
    """The faults in groups that strike one run directory after the other."""
    for start in range(0, len(faults), length):
        yield faults[start : start + length]
