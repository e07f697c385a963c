"""Selecting from a labelled pool: learn a few frames, ask the committee about the rest, learn those it disagrees on, again and again.

Every step leaves one file and is skipped when that is there, so the same call goes on after a kill at any moment:
    selection/round_000.json  the start frames, round_001.json the first ones chosen...    labels/  the same frames, in order
    generations/000001/       what was learnt from round 0; n: from the rounds below n     selection/test_001.json  its errors
    baseline/0/               the same for frames drawn by lot, with the same numbers of frames and the same effort
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bnn_driver.active.stopping import Plateau, Stop
from bnn_driver.loops.assembly import TOY, effective_settings, load_model, settle
from bnn_driver.loops.chains import BASELINE, Chains, Note, of_baseline
from bnn_driver.loops.division import Division, check_elements, divide, gallery_of, open_pool
from bnn_driver.loops.effort import STEPS, check_equal_effort, effort
from bnn_driver.loops.known import pooled_label
from bnn_driver.loops.scratch import FromScratch
from bnn_driver.loops.screening import Committee, choose, descriptors, judge
from bnn_driver.loops.seeds import generator
from bnn_driver.loops.walltime import stop_noted
from bnn_driver.pool_config import SelectConfig, read_select_config
from bnn_driver.potential.mace import load_mace
from bnn_driver.records import Array, LabelledFrame
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.files import read_json, read_series, write_atomic, write_json
from bnn_driver.store.pool import Pool
from bnn_driver.store.run import EventLog, RunDirectory, announced_labels

log = logging.getLogger(__name__)

SELECTION = "selection"


def select(config_file: Path) -> Path:
    """Select from the pool until a criterion of [pool] says enough, then learn the baselines; returns the run directory.

    Raises: ConfigError before any work for a pool that cannot be used; DivergedError.
    """
    config, base = read_select_config(config_file), config_file.absolute().parent
    settle(config.potential.threads)
    pool = open_pool(config, base)
    checksum = _model_checksum(config, base, pool)
    division = divide(pool, config)
    run = RunDirectory(base / config.run.directory)
    with run.lock("driver"), ExitStack() as stack:
        known = announced_labels(run.events_dir)
        events = stack.enter_context(EventLog(run.events_dir))
        run.fix_settings(effective_settings(config, base), _physics(config, pool, checksum), events)
        write_atomic(run.path / "bnn.toml", config_file.read_bytes())
        events.append("start", config=str(config_file), frames=len(pool), candidates=len(division.candidates))
        make = partial(_committee, config, base, pool)
        selection = Rounds(config, pool, division, make(run.generations_dir, events.append), run.path / SELECTION, events.append)
        selection.store, selection.announced, selection.tell = LabelStore(run.labels_dir), known, _tell
        with stop_noted(events.append):
            reason = selection.select()
            for number in range(config.pool.baseline):
                folder = run.path / BASELINE / str(number)
                note = of_baseline(events.append, number)
                arm = Rounds(config, pool, division, make(folder / "generations", note), folder, note)
                arm.draw_as(selection, number)
        events.append("stop", reason=reason)
    return run.path


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def check_selection(config_file: Path, say: Callable[[str, str], None]) -> None:
    """Everything that can be validated without learning anything.  Args: say: hears of each finding.   Raises: ConfigError, ModelError."""
    config, base = read_select_config(config_file), config_file.absolute().parent
    pool = open_pool(config, base)
    _model_checksum(config, base, pool)
    division = divide(pool, config)
    drawn = f"{len(division.test)} test frames, {len(division.start)} to start with, {len(division.candidates)} to choose from"
    say("pool", f"{pool.first[1]} frames of {len(pool.kinds)} kinds; {drawn}")
    say("committee", f"{config.ensemble.members} members, {config.committee.kind}")
    say("", "everything that can be checked without running is in order")


@dataclass
class Rounds:
    """One way of choosing, in a folder of its own."""

    config: SelectConfig
    pool: Pool
    division: Division
    committee: Committee
    folder: Path
    note: Note
    store: LabelStore | None = None
    """Where labels are counted; None: those of a baseline, which would not have been needed."""
    announced: set[str] | None = None
    """Labels whose event is written."""
    tell: Callable[[str], None] = log.info
    """Says what was done."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fingerprint = _fingerprint(self.pool, self.config)

    def records(self) -> list[dict[str, Any]]:
        """Of all rounds chosen so far."""
        return read_series(self.folder, "round")

    def select(self) -> str:
        """Choose by the committee's disagreement; returns why it ended."""
        p = self.config.pool
        plateau = Plateau(p.plateau_rounds, p.plateau_fall, p.plateau_approach) if p.plateau else None
        stop = Stop(p.rounds, p.max_labels, p.target, plateau)
        self._begin()
        while True:
            records = self.records()
            errors = self._learn_and_test(records)
            labels = sum(len(record["chosen"]) for record in records)
            means = [[record[name] for record in records[1:]] for name in ("selected", "remaining")]
            reason = stop.reason(labels, errors, *means) or self._choose(records, labels)
            if reason:
                return reason

    def draw_as(self, chosen: Rounds, number: int) -> None:
        """Take as many frames as were chosen, by lot, and learn them with the same effort.

        Raises: ConfigError when the steps of an update are not what they were then.
        """
        check_equal_effort(self.config, [*chosen.tests(), *self.tests()])
        self.draw([len(record["chosen"]) for record in chosen.records()], number)

    def draw(self, sizes: list[int], number: int) -> None:
        """Take as many frames as another way of choosing did, by lot.  Args: sizes: of all rounds, the start first."""
        self._begin()
        division, seed = self.division, self.config.run.seed
        order = generator(seed, "baseline", number).permutation(division.candidates)
        allowed = list(islice(self._allowed(order.tolist()), sum(sizes[1:])))
        for done in range(len(self.records()), len(sizes)):
            begin = sum(sizes[1:done])
            self._write(done, {"chosen": allowed[begin : begin + sizes[done]], "generation": done})
        for count in range(1, len(sizes) + 1):
            if not self._test_file(count).exists():
                self._learn_and_test(self.records()[:count])

    def _allowed(self, order: Sequence[int]) -> Iterator[int]:
        """Frames that are not nearly test frames, each structure once."""
        held = gallery_of(self.pool, self.division.test, self.config.pool.duplicates)
        seen = {self.pool.one(int(i)).frames.content_id("") for i in self.division.start}
        for i in order:
            frame = self.pool.one(i).frames
            name = frame.content_id("")
            if name not in seen and not held.has(frame):
                seen.add(name)
                yield i

    def _begin(self) -> None:
        """The record of the start frames, with the constants between their energies and those of the model."""
        if self.records():
            return
        start = self.division.start
        difference = np.zeros(len(start))
        for row, index in enumerate(start.tolist()):
            one = self.pool.one(index)
            energy = self.committee.foundation_energy(one.frames)
            difference[row] = 0.0 if energy is None else energy[0] - one.energy[0]
        atoms = self.pool.atoms()[start]
        constants = np.linalg.lstsq(atoms.astype(float), difference, rcond=None)[0]
        facts = {"chosen": start, "generation": 0, "elements": self.pool.elements, "constants": constants}
        self._write(0, facts | {"test": self.division.test})

    def _offsets(self, index: Array) -> Array:
        """eV, added to the labels' energies to have them on the model's scale."""
        return self.pool.atoms()[index] @ np.array(read_json(self.folder / "round_000.json")["constants"])

    def _learn_and_test(self, records: list[dict[str, Any]]) -> list[float]:
        """Learn all rounds so far; returns the force errors on the test frames after each round, eV/Å."""
        rounds = [self._labelled(number, record) for number, record in enumerate(records)]
        self.committee.learn(rounds)
        file = self._test_file(len(records))
        if not file.exists():
            facts = self._tested(sum(len(some) for some in rounds), len(records))
            write_json(file, facts)
            told = {key: value for key, value in facts.items() if not isinstance(value, np.ndarray)}
            self.note("test", **told)
            self.tell(f"{facts['labels']} labels learnt: force error {1e3 * facts['force_error']:.1f} meV/Å on the test frames")
        found = [self._test_file(n) for n in range(1, len(records) + 1)]
        return [float(read_json(path)["force_error"]) for path in found if path.exists()]

    def tests(self) -> list[dict[str, Any]]:
        """Of all generations so far."""
        return read_series(self.folder, "test")

    def _test_file(self, generation: int) -> Path:
        return self.folder / f"test_{generation:03d}.json"

    def _tested(self, labels: int, generation: int) -> dict[str, Any]:
        """Errors and disagreement on the test frames."""
        test = self.division.test
        found = judge(self.committee, self.pool, test)
        energy_error = found.mean_energy - (self.pool.energy[test] + self._offsets(test))
        return {
            "labels": labels,
            "generation": generation,
            "force_error": float(found.force_error.mean()),
            "force_rmse": float(np.sqrt(np.mean(found.force_error**2))),
            "energy_rmse": float(np.sqrt(np.mean(energy_error**2))),
            "disagreement": float(found.force.mean()),
            STEPS: effort(self.config)[1],
            "frame_force_error": found.force_error,
            "frame_disagreement": found.force,
            "frame_energy_error": energy_error,
            "frame_energy_sd": found.energy_sd,
        }

    def _choose(self, records: list[dict[str, Any]], labels: int) -> str:
        """Write the record of the next round; returns why there is none, or nothing."""
        p = self.config.pool
        number = len(records)
        begin = time.monotonic()
        learnt = np.concatenate([record["chosen"] for record in records]).astype(np.int64)
        passed = {i for record in records for i in record.get("near_duplicates", [])}
        left = np.setdiff1d(self.division.candidates, [*learnt.tolist(), *passed])
        if not len(left):
            return "the pool is used up"
        found = judge(self.committee, self.pool, left)
        taken = gallery_of(self.pool, np.concatenate([self.division.test, learnt]), p.duplicates)
        k = p.batch if p.max_labels is None else min(p.batch, p.max_labels - labels)
        choice = choose(self.committee, self.pool, found, p, k, taken, partial(descriptors, self.committee, self.pool, learnt))
        if not len(choice.rows):
            return "the pool is used up: what remains is nearly the same as labels or test frames"
        others = np.setdiff1d(np.arange(len(left)), np.concatenate([choice.rows, choice.near_duplicates]))
        chosen = left[choice.rows]
        facts = {
            "chosen": chosen,
            "generation": number,
            "rank": p.rank,
            "selected": float(found.force[choice.rows].mean()),
            "remaining": float(found.force[others].mean()) if len(others) else 0.0,
            "frame_disagreement": found.force[choice.rows],
            "frame_force_error": found.force_error[choice.rows],
            "frame_energy_error": found.mean_energy[choice.rows] - (self.pool.energy[chosen] + self._offsets(chosen)),
            "frame_energy_sd": found.energy_sd[choice.rows],
            "near_duplicates": left[choice.near_duplicates],
            "pool_quantiles": np.quantile(found.force, [0.05, 0.5, 0.95]),
        }
        self._write(number, facts)
        self.note(
            "selection", round=number, chosen=chosen, selected=facts["selected"], remaining=facts["remaining"],
            near_duplicates=len(choice.near_duplicates), seconds=time.monotonic() - begin,
        )  # fmt: skip
        self.tell(
            f"round {number}: {len(chosen)} of {len(left)} frames chosen, disagreement {1e3 * facts['selected']:.1f} meV/Å; "
            f"of the remaining {1e3 * facts['remaining']:.1f}"
        )
        return ""

    def _labelled(self, number: int, record: dict[str, Any]) -> list[LabelledFrame]:
        """The labels of a round; counted once where they are counted."""
        index = np.array(record["chosen"], dtype=np.int64)
        items = [self._label(number, int(i), float(offset)) for i, offset in zip(index, self._offsets(index), strict=True)]
        if self.store is None or self.announced is None:
            return items
        numbers = [self.store.write(item) for item in items]
        for place, item in zip(numbers, items, strict=True):
            if item.label.frame_id not in self.announced:
                self.note("label", number=place, frame_id=item.label.frame_id, round=number, frame=item.context["frame"])
                self.announced.add(item.label.frame_id)
        return [self.store.read(place) for place in dict.fromkeys(numbers)]

    def _label(self, number: int, index: int, offset: float) -> LabelledFrame:
        criterion = "selected" if number else "start"
        facts = {"round": number, "step": number, "generation": number, "energy_offset": offset}
        return pooled_label(self.pool, index, self.fingerprint, criterion, facts)

    def _write(self, number: int, facts: dict[str, Any]) -> None:
        write_json(self.folder / f"round_{number:03d}.json", {"round": number, **facts})


def _committee(config: SelectConfig, base: Path, pool: Pool, folder: Path, note: Note) -> Committee:
    """The members that learn in a folder of their own."""
    if config.committee.kind == "scratch":
        return FromScratch(config, config.committee, pool.elements, folder, note)
    model = load_model(config, base, np.array(pool.elements), config.potential.device)
    return Chains(model, config, folder, note)


def _model_checksum(config: SelectConfig, base: Path, pool: Pool) -> str:
    """What names the foundation potential; checked against the elements of the pool.  Raises: ConfigError, ModelError."""
    if config.committee.kind == "scratch":
        FromScratch(config, config.committee, pool.elements, base, lambda kind, **facts: None)
        return "from scratch"
    if config.potential.model == TOY:
        return TOY
    file = base / config.potential.model
    loaded = load_mace(file if file.is_file() else config.potential.model, config.potential.head)
    check_elements(pool, loaded.elements, config.potential.model)
    return loaded.sha256


def _fingerprint(pool: Pool, config: SelectConfig) -> str:
    """Of the level of theory of the labels: the pool that they came from, and its keys."""
    facts = [pool.checksums[0], config.pool.energy_key, config.pool.forces_key, config.pool.stress_key]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _physics(config: SelectConfig, pool: Pool, model: str) -> dict[str, Any]:
    """What must stay the same for as long as a run directory lives."""
    p, e = config.pool, config.ensemble
    start = list(p.start) if isinstance(p.start, tuple) else p.start
    keys = {name: getattr(p, name) for name in type(p).model_fields if name.endswith("_key")}
    return {
        "pool": pool.checksums, "keys": keys, "test": p.test, "start": start, "duplicates": p.duplicates, "seed": config.run.seed,
        "committee": config.committee.kind, "mace": dict(config.committee.mace), "model": model, "head": config.potential.head,
        "members": e.members, "sampled": e.sampled, "predicted_noise": list(e.predicted_noise),
        "noise_head": list(e.noise_head) if e.predicted_noise else [], "numbers": list(pool.elements),
        "charge": config.system.charge, "multiplicity": config.system.multiplicity,
    }  # fmt: skip
