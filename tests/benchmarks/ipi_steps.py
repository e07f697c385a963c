"""Steps per second of a real i-PI with ethanol: our driver, i-PI's own mace driver, a driver that does nothing.

    python tests/benchmarks/ipi_steps.py [--quick | --full] [--modes plain batched shm] [--beads 1 32] [--json FILE]

Ours: `loops.driver.Driver` behind `ipi.client.Client` with every part of a step (sanity, ensemble, noise head, decision, extras,
events) but an accuracy so wide that the oracle is never asked.  Alternative: `i-pi-py_driver -m mace` with the same eight models
as a committee, 89 elements as shipped.  Floor: `i-pi-py_driver -m dummy`, which answers zeros: i-PI itself and its protocol.
Modes: "plain" sends one structure per request through a Unix socket (32 requests a step for 32 beads), "batched" all beads in one
request (<batch_size>; for one bead the same as plain and left out), "shm" the same with the numbers in shared memory.  Times are wall
ms per step by i-PI's own clock, medians over the steps of all turns.  `overhead_ms`: from POSDATA received to reply sent, all
requests of a step together, less the time in our ensemble; `of_floor`: the same over the whole step of i-PI with its dummy.
`overhead_cpu_ms` counts CPU time instead: on a busy machine a process that computes waits for its turn, one that sleeps does not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from protocol import XML

from bnn_driver.active.criteria import EnergyCriterion
from bnn_driver.active.policy import Policy
from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.bayes.likelihood import NoiseHead, NoiseModel
from bnn_driver.ipi.client import Client
from bnn_driver.ipi.connection import Answer, Asked, Connection
from bnn_driver.ipi.simulation import IpiInput, IpiProcess, read_input
from bnn_driver.loops.assembly import settle
from bnn_driver.loops.counting import StepCounter
from bnn_driver.loops.driver import Driver, DriverSettings
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.quarantine import Quarantine
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.params import repeat_weights
from bnn_driver.records import Frames, Generation, Label, LabelledFrame, Prediction
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import EventLog

MEMBERS = 8
ATOMS = measure.SYSTEMS["ethanol"]()
MODES = {"plain": "unix", "batched": "unix", "shm": "shm"}
"""Name here -> mode of <ffsocket>."""
WIDE = 1e6
"""eV, an accuracy that is always kept."""
COLUMNS = (
    "system", "model", "members", "frames", "mode", "dtype", "ours_ms:.2f", "alternative_ms:.2f", "ratio:.1f", "floor_ms:.2f",
    "ensemble_ms:.2f", "overhead_ms:.2f", "of_floor:.2f", "overhead_cpu_ms:.2f", "cpu_of_floor:.2f", "steps_per_s:.1f",
    "their_steps_per_s:.1f", "floor_steps_per_s:.0f",
)  # fmt: skip


# ---- the driver's process


class NothingNew:
    """A trainer that has published generation 1 and learns nothing."""

    def newest(self) -> int:
        """The generation that the ensemble already has."""
        return 1

    def load(self, number: int) -> Generation:
        """Never called.  Raises: SystemExit."""
        raise SystemExit(f"generation {number} was asked for, but this benchmark has only the first")

    def wait_until_learnt(self, label_ids: set[str], allowed_lag: int) -> None:
        """Nothing to wait for."""


def make_ensemble(models: Path, compile: str) -> Ensemble:
    """The ensemble of all model files in a folder, with a noise head."""
    modules = [torch.load(path, weights_only=False) for path in sorted(models.glob("*.model"))]
    potential = measure.our_potential(modules[0], ATOMS.numbers, compile)
    head = NoiseHead(potential.n_features, (64, 16))
    weights = measure.our_weights(modules, ATOMS.numbers) | repeat_weights(head.init(potential.dtype), len(modules))
    return Ensemble(potential, weights, 1, NoiseModel(0.004, 0.004, 1.0, head))


def make_driver(ensemble: TimedEnsemble, folder: Path, beads: int) -> Driver:
    """The real driver with one label in its store, so that it has an offset, and no oracle."""
    store = LabelStore(folder / "labels")
    frame = measure.distorted(ATOMS, 1)
    label = Label(0.0, np.zeros((len(ATOMS), 3)), None, "none", "benchmark", "0" * 32, "made up")
    facts = {"step": 0, "bead": 0, "criterion": "first", "audit": False, "generation": 0, "probability": 1.0,
             "predicted_energy": 0.0, "energy_predictive_sd": 1.0, "foundation_energy": 0.0}  # fmt: skip
    arrays = {name: np.zeros((len(ATOMS), 3)) for name in ("predicted_forces", "force_predictive_sd", "foundation_forces")}
    store.write(LabelledFrame(frame, label, facts | arrays))
    labelling = Labelling(store, None, folder / "pending", "benchmark", None, Quarantine(folder / "quarantine", ""))  # type: ignore[arg-type]
    (folder / "events").mkdir()
    settings = DriverSettings(ATOMS.numbers, False, 0, 1, 0.1, WIDE, 0, 10, "scalars", 0, WIDE)
    policy = Policy((EnergyCriterion(WIDE),), 0.95, 0.0)
    counter = StepCounter(beads, 0, beads > 1)
    return Driver(
        settings, ensemble, ensemble, policy, {"energy": GammaCalibration(1.5, 10.0)}, labelling, NothingNew(),
        EventLog(folder / "events"), counter, lambda step, facts: None,
    )  # fmt: skip


def now() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.monotonic(), time.process_time()


@contextmanager
def stopwatch() -> Iterator[tuple[list[tuple[float, float]], list[tuple[float, float]]]]:
    """Times at which a POSDATA began to be read and its reply was sent, of all connections made within."""
    read, answer = Connection._read_posdata, Connection.answer
    received: list[tuple[float, float]] = []
    sent: list[tuple[float, float]] = []

    def timed_read(self: Connection) -> Asked:
        received.append(now())
        return read(self)

    def timed_answer(self: Connection, results: Answer) -> bool:
        delivered = answer(self, results)
        sent.append(now())
        return delivered

    Connection._read_posdata, Connection.answer = timed_read, timed_answer  # type: ignore[method-assign]
    try:
        yield received, sent
    finally:
        Connection._read_posdata, Connection.answer = read, answer  # type: ignore[method-assign]


class TimedEnsemble:
    """An ensemble that takes down how long each prediction takes."""

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble, self.generation = ensemble, ensemble.generation
        self.spent: list[tuple[float, float]] = []

    def predict(self, frames: Frames) -> Prediction:
        """Members' predictions."""
        begin = now()
        prediction = self.ensemble.predict(frames)
        self.spent.append(tuple(np.subtract(now(), begin)))
        return prediction


def serve(folder: Path, xml: Path, models: Path, compile: str) -> None:
    """Drive i-PI to its end and leave the medians of the parts of a step in ours.json."""
    settle(1)
    effective = read_input(xml)
    ensemble = TimedEnsemble(make_ensemble(models, compile))
    frames = measure.distorted(ATOMS, effective.batch_size)
    for _ in range(3):
        ensemble.ensemble.predict(frames)
    driver = make_driver(ensemble, folder, effective.n_beads)
    client = Client(
        effective.endpoints,
        driver.respond,
        shared_memory=effective.shared_memory,
        connect_timeout=30.0,
        reconnects=0,
        gather_seconds=0.0,
    )
    with stopwatch() as (received, sent):
        client.serve()
    requests = effective.n_beads // effective.batch_size
    count = len(sent) // requests * requests
    inside = 1e3 * np.array(ensemble.spent[:count])
    beside = 1e3 * (np.array(sent[:count]) - np.array(received[:count])) - inside
    parts = {"ensemble_ms": inside[:, 0], "overhead_ms": beside[:, 0], "overhead_cpu_ms": beside[:, 1]}
    medians = {name: float(np.median(x.reshape(-1, requests).sum(axis=1)[2:])) for name, x in parts.items()}
    (folder / "ours.json").write_text(json.dumps(medians))


# ---- the simulation


def command(which: str, folder: Path, effective: IpiInput, models: Path, compile: str) -> list[str]:
    """The command of a driver."""
    if which == "ours":
        return [sys.executable, __file__, "--serve", str(folder), str(effective.path), str(models), "--compile", compile]
    script = Path(sysconfig.get_path("scripts")) / "i-pi-py_driver"
    base = [sys.executable, str(script), "--shm" if effective.shared_memory else "-u", "-a", effective.endpoints[0].address]
    if which == "dummy":
        return [*base, "-m", "dummy"]
    return [*base, "-m", "mace", "-o", f"template={folder / 'template.xyz'},model={models}/*.model"]


@contextmanager
def prepared(mode: str, beads: int, steps: int) -> Iterator[tuple[Path, IpiProcess]]:
    """A folder with an input, and an i-PI that is ended whatever happens."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ATOMS.write(folder / "template.xyz", format="extxyz")
        lines = (f"{s} {x:.8f} {y:.8f} {z:.8f}" for s, (x, y, z) in zip(ATOMS.symbols, ATOMS.positions, strict=True))
        head = f"{len(ATOMS)}\n# CELL(abcABC): 30 30 30 90 90 90 positions{{angstrom}} cell{{angstrom}}\n"
        (folder / "init.xyz").write_text(head + "\n".join(lines) + "\n")
        batch = 1 if mode == "plain" else beads
        xml = XML.format(steps=steps, mode=MODES[mode], batch=batch, beads=beads, name=uuid.uuid4().hex[:8])
        (folder / "user.xml").write_text(xml.replace("'medium'", "'high'"))
        ipi = IpiProcess(folder / "user.xml", folder / "run", folder / "ipi.log")
        try:
            yield folder, ipi
        finally:
            ipi.stop(0.0, 5.0)


def run(which: str, mode: str, beads: int, steps: int, models: Path, compile: str) -> tuple[list[float], dict[str, float]]:
    """Milliseconds of every step but the first three, and the parts of ours.  Raises: SystemExit when the driver fails."""
    with prepared(mode, beads, steps) as (folder, ipi):
        effective = ipi.start()
        ipi.wait_until_listening(effective, 60.0)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
        arguments = command(which, folder, effective, models, compile)
        with (folder / "driver.log").open("wb") as log:
            driver = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment, cwd=folder)
            try:
                while not (ended := ipi.wait(0.1)) and driver.poll() is None:
                    pass
                ended = ended or ipi.wait(5.0)
            finally:
                driver.kill()
                driver.wait()
        text = (folder / "ipi.log").read_text()
        times = [1e3 * float(t) for t in re.findall(r"t/step:\s*(\S+)", text)]
        if not ended or len(times) < steps:
            raise SystemExit(f"{which} made {len(times)} of {steps} steps:\n{(folder / 'driver.log').read_text()[-2000:]}")
        report = folder / "ours.json"
        return times[3:], json.loads(report.read_text()) if report.exists() else {}


def turns(size: str, mode: str, beads: int, seconds: float) -> dict[str, int]:
    """Steps of each driver in one turn of about so many seconds."""
    cost = measure.COSTS[size]
    pairs = measure.edges(ATOMS, measure.SIZES[size]["r_max"])
    requests = beads if mode == "plain" else 1
    theirs = 1e-3 * MEMBERS * (requests * cost.ms + beads * (cost.ms_per_atom * len(ATOMS) + cost.ms_per_edge * pairs))
    steps = {"ours": max(8, min(300, int(4 * seconds / theirs))), "dummy": 200 if beads == 1 else 60}
    if (mode, beads) == ("shm", 1):
        return steps  # the mace driver of i-PI 3.3.1 fails on one structure in shared memory
    return steps | {"i-PI": max(8, min(300, int(seconds / theirs)))}


def case(size: str, mode: str, beads: int, options: argparse.Namespace) -> dict[str, Any]:
    """All three drivers, two turns each (--quick: one)."""
    per_turn = turns(size, mode, beads, 2.0 if options.quick else options.seconds)
    order = sorted(per_turn)
    times: dict[str, list[float]] = {which: [] for which in per_turn}
    parts: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        models = Path(name)
        for m, module in enumerate(measure.committee(size, ATOMS.numbers, MEMBERS, getattr(torch, options.dtype))):
            torch.save(module, models / f"member_{m}.model")
        for which in order if options.quick else order + order[::-1]:
            found, own = run(which, mode, beads, per_turn[which], models, options.compile)
            times[which] += found
            parts += [own] if own else []
    ours, floor = (float(np.median(times[which])) for which in ("ours", "dummy"))
    alternative = float(np.median(times["i-PI"])) if "i-PI" in times else None
    own = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
    return {
        "system": "ethanol",
        "model": size,
        "members": MEMBERS,
        "frames": beads,
        "mode": mode,
        "ours_ms": ours,
        "alternative": "i-pi-py_driver -m mace, the same models",
        "alternative_ms": alternative,
        "ratio": alternative and alternative / ours,
        "single_ms": None,
        "over_one_member": None,
        "floor_ms": floor,
        **own,
        "of_floor": own["overhead_ms"] / floor,
        "cpu_of_floor": own["overhead_cpu_ms"] / floor,
        "steps_per_s": 1e3 / ours,
        "their_steps_per_s": alternative and 1e3 / alternative,
        "floor_steps_per_s": 1e3 / floor,
        "steps": per_turn,
    }


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Options of the benchmark and of its driver process."""
    measure.add_cases(parser)
    parser.add_argument("--beads", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--seconds", type=float, default=15.0, help="of one turn of i-PI's driver, at least 8 steps")
    parser.add_argument("--serve", nargs=3, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Every case that is cheap enough."""
    options = options_of(measure.arguments(__doc__))
    if options.serve:
        serve(*options.serve, options.compile)
        return
    settle(1)
    table = measure.Table(COLUMNS)
    for size, beads, mode in itertools.product(options.models, options.beads, options.modes):
        if (mode == "batched" and beads == 1) or (options.quick and (size, beads) != ("small", 1)):
            continue
        if (size, beads) == ("medium", 32) and not options.full:
            print("left out: medium, 32 beads: about half a minute a step of i-PI's driver (--full)")
            continue
        table.add(measure.rounded({"dtype": options.dtype, "compile": options.compile} | case(size, mode, beads, options)))
    measure.write_json(options.json, table.rows)


if __name__ == "__main__":
    main()
