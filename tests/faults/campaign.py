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
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from small_run import command, write_run

from bnn_driver.loops.quarantine import RESTART_TOLERANCE
from bnn_driver.oracle import read_done
from bnn_driver.store import weights
from bnn_driver.store.dataset import LabelStore, distance
from bnn_driver.store.run import read_events

INSIDE = Path(__file__).parent / "inside"
LIMIT = float(os.environ.get("BNN_FAULTS_LIMIT", "300"))
"""s within which any start must have ended; more on a machine that is busy with other work."""
ORPHANS = 5.0 * LIMIT / 300.0
"""s after which nothing of an ended or killed run may live, where it needs no heartbeat to notice."""
LONGER = 3
"""How many times a run that ended before a fault could strike goes on for some more steps."""
EXECUTORS = {"local": "", "parsl": '[executor]\nkind = "parsl"\nheartbeat = "{heartbeat:g} s"\n'}
"""Where labels are computed -> what the config needs for it."""
POOL, INTERCHANGE = "process_worker_pool", "high_throughput.interchange"
"""Words of the command lines of Parsl's processes: the manager of the workers, and what stands between it and the driver."""
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
    """kill, full (no space on the disk), hang, stop (SIGSTOP), jump (of the clock, in all processes), unconverged (an SCF)."""
    victim: str = ""
    """Whom to kill instead of the process itself: a word of a command line."""
    until: str = ""
    """A file for which the process then waits, before it goes on as if nothing had been."""
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
    heartbeat: float = 4.0
    """s after which Parsl's workers notice that their driver is gone; 4 is the least that the config allows."""
    digits: bool = True
    """Whether i-PI writes all digits; False: its default of nine, by which it asks for the same structure with other numbers."""
    starts: int = 0
    hits: list[str] = field(default_factory=list)
    """Faults whose survival is not proved before the run has ended well."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = write_run(self.folder, steps=self.steps, **self.options)
        text = self.config.read_text().replace("[accuracy]", "temperature_range = [1e-3, 1e3]\nloss_margin = 1e3\n[accuracy]")
        # a tight promise and many audits: something is asked in most steps
        text = text.replace('"400 meV"', '"150 meV"').replace("probability = 0.1", "probability = 0.25")
        self.config.write_text(text + EXECUTORS[self.executor].format(heartbeat=self.heartbeat))
        if not self.digits:
            self._leave_digits_to_ipi()

    def _leave_digits_to_ipi(self) -> None:
        file, start = self.folder / "input.xml", self.folder / "init.xyz"
        text, given = file.read_text(), " floatformat='%24.16e'"
        assert given in text
        file.write_text(text.replace(given, ""))
        head, atoms = start.read_text().splitlines()[:2], np.loadtxt(start, skiprows=2, usecols=(1, 2, 3))
        names = [line.split()[0] for line in start.read_text().splitlines()[2:]]
        # so far from the origin the ninth digit changes the content id of nearly every frame
        moved = [f"{name} {x:.3f} {y:.3f} {z:.3f}" for name, (x, y, z) in zip(names, atoms + 90.0, strict=True)]
        start.write_text("\n".join([*head, *moved]) + "\n")

    @property
    def grace(self) -> float:
        """s after which nothing of an ended or killed start may live."""
        return ORPHANS if self.executor == "local" else ORPHANS + 2 * self.heartbeat

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

    def start(self, *faults: Fault, arguments: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Begin `bnn-driver run` (or another verb) in the background."""
        self.starts += 1
        path = os.pathsep.join(filter(None, [str(INSIDE), os.environ.get("PYTHONPATH", "")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "BNN_COMPUTED": str(self.computed)}
        environment["BNN_FAULT"] = json.dumps([asdict(x) | {"marker": str(self.marker(n))} for n, x in enumerate(faults)])
        words = command(*(arguments or ("run", str(self.config))))
        with self.output.open("w") as output:
            return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment)

    def marker(self, number: int = 0) -> Path:
        """Exists when that fault of this start has struck."""
        return self.folder / f"struck-{self.starts}-{number}"

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
            until(lambda: not self.processes(), self.grace)
        except AssertionError:
            left = self.processes()
            self.kill_all()
            raise AssertionError(
                f"{self.grace:g} s after the end of start {self.starts} there live {left}\n{self._story()}"
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

    def strike(self, *faults: Fault) -> str:
        """One start in which each fault strikes; what is left on disk must be sound.  Returns: what the program printed."""
        for fault in faults:
            Table.attempt(fault.name)
        code, said = self.end(self.start(*faults))
        for _ in range(LONGER):  # after a restart i-PI's seed is the time, so it is chance whether some steps need a label
            if code != 0 or all(self.marker(number).exists() for number in range(len(faults))):
                break
            self.lengthen(self.steps + 16)
            code, said = self.end(self.start(*faults))
        for number, fault in enumerate(faults):
            assert self.marker(number).exists(), f"{fault} was never reached; the run ended with {code}:\n{self._story()}"
            assert code in fault.ends, f"{fault} ended the run with {code}, expected {fault.ends}:\n{self._story()}"
            assert fault.says in said, f"{fault}: expected {fault.says!r} in\n{said}"
        assert "Traceback" not in said, said
        self.hits += [fault.name for fault in faults]
        self.check_disk()
        return said

    def check_disk(self) -> None:
        """What must hold at every moment, also with a run that was just killed."""
        labels = LabelStore(self.run / "labels").all() if (self.run / "labels").is_dir() else []
        names = sorted(p.name for p in (self.run / "labels").glob("*.extxyz"))
        assert names == [f"{n:06d}.extxyz" for n in range(len(labels))]
        ids = [item.label.frame_id for item in labels]
        assert len(ids) == len(set(ids)), "a frame has two labels"
        twins = [
            (a, b) for (a, x), (b, y) in combinations(enumerate(labels), 2) if distance(x.frame, y.frame) < RESTART_TOLERANCE
        ]
        assert not twins, f"the same structure has two labels: {twins}"
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
