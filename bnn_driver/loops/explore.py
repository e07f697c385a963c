"""Exploring a system: dynamics with the mean of the members, the frames on which they disagree are labelled and learnt, again and again.

Every step leaves one file and is skipped when that is there, so the same call goes on after a kill at any moment:
    generations/000001/                      what was learnt from [explore] known, or from round 0; then from every round
    exploration/round_000/NAME.extxyz .json  frames of a walker, and how it ended     exploration/screened_000.json  what is said of them
    exploration/chosen_000.json              which of them are to be labelled         exploration/labelled_000.json  their labels, and how
    labels/                                  the labels                               wrong the weights were before
    exploration/baseline/                    frames by lot instead: see `by_lot`
    exploration/along_001.json               the first trajectory, judged by the first weights with a spread and by the last
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bnn_driver.active.criteria import Calibration
from bnn_driver.active.stopping import Explored
from bnn_driver.errors import GuardStop
from bnn_driver.explore_config import ExploreConfig, read_explore_config
from bnn_driver.loops.assembly import (
    TOY,
    Model,
    effective_settings,
    foundation_elements,
    foundation_generation,
    load_model,
    make_ensemble,
    make_policy,
    physics,
    settle,
)
from bnn_driver.loops.by_lot import GENERATIONS, ByLot, lot_labelling
from bnn_driver.loops.chains import BASELINE, Chains, Note, of_baseline
from bnn_driver.loops.division import check_elements
from bnn_driver.loops.effort import STEPS, check_equal_effort, effort
from bnn_driver.loops.execution import make_labelling
from bnn_driver.loops.harvest import Harvest
from bnn_driver.loops.known import Known, read_known
from bnn_driver.loops.screening import Screen, screen
from bnn_driver.loops.trial import label_trial
from bnn_driver.loops.walks import System, Walks, read_explored
from bnn_driver.loops.walltime import WallClock, find_end, stop_noted
from bnn_driver.loops.zero import Zero
from bnn_driver.oracle import Oracle, absolute_paths, check_capabilities, fingerprint, load_oracle
from bnn_driver.store import weights
from bnn_driver.store.files import plain, read_json, read_series, write_atomic, write_json
from bnn_driver.store.run import EventLog, RunDirectory, announced_labels

log = logging.getLogger(__name__)

EXPLORATION = "exploration"
IN_A_ROW = 2
"""Rounds that must be as certain as their labels where nothing else is known."""
AUDIT_CONFIDENCE = 0.95
"""Of the interval of the share of audits beyond the accuracy."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What can be made, and refused, before any work is spent."""

    config: ExploreConfig
    base: Path
    system: System
    options: dict[str, Any]
    """Of [oracle.KIND], paths absolute."""
    oracle: Oracle
    known: Known | None
    model: Model
    elements: tuple[int, ...]
    """Of the system and of what is known, rising."""


def gather(config_file: Path) -> Parts:
    """Raises: ConfigError, ModelError, OracleConfigError for anything that cannot work."""
    config, base = read_explore_config(config_file), config_file.absolute().parent
    settle(config.potential.threads)
    system = read_explored(config, base)
    options = absolute_paths(config.oracle.kind, config.oracle.options, base)
    oracle = load_oracle(config.oracle.kind, options)
    check_capabilities(oracle, system.like)
    oracle.check(system.like)
    make_policy(config, system.like.numbers, 0.0)
    known = read_known(config, base, fingerprint(oracle))
    elements = tuple(sorted({*(() if known is None else known.pool.elements), *system.like.numbers.tolist()}))
    if known is not None and config.potential.model != TOY:
        check_elements(known.pool, foundation_elements(config, base), config.potential.model)
    model = load_model(config, base, np.array(elements), config.potential.device)
    return Parts(config, base, system, options, oracle, known, model, elements)


def explore(config_file: Path, until: str | None = None) -> Path:
    """Explore until a criterion of [explore] says enough; returns the run directory.

    Args: until: when to stop, as --until has it; None: in time for the end of the scheduler's job, where there is one.
    Raises: ConfigError before any work for what cannot work; WallLimit before the end; every other error of `bnn_driver.errors`;
        KeyboardInterrupt, which `stop_on_signals` makes of SIGTERM too, after the books are closed.
    """
    parts = gather(config_file)
    config = parts.config
    clock = WallClock(find_end(until), config.run.margin)
    run = RunDirectory(parts.base / config.run.directory)
    with clock.armed(), run.lock("driver"), ExitStack() as stack:
        announced = announced_labels(run.events_dir)
        events = stack.enter_context(EventLog(run.events_dir))
        run.fix_settings(effective_settings(config, parts.base), _physics(parts), events)
        write_atomic(run.path / "bnn.toml", config_file.read_bytes())
        events.append("start", config=str(config_file), walkers=list(config.walkers()))
        chains = Chains(parts.model, config, run.generations_dir, events.append)
        labelling = make_labelling(config, parts.options, parts.base, run, parts.oracle, stack)
        policy, calibrations = make_policy(config, parts.system.like.numbers, 0.0)
        walks = Walks(config, parts.base, parts.system, run.path / EXPLORATION, run.log_dir, policy)
        harvest = Harvest(config, labelling, policy, chains, clock, announced, events.append, _tell)
        zero = Zero(run.path / EXPLORATION, parts.elements, parts.system.like.numbers, parts.known, chains.foundation_energy)
        rounds = Exploration(parts, walks, harvest, zero, calibrations, run.path / EXPLORATION, events.append, _tell)
        clock.progressed = rounds.progressed
        with stop_noted(events.append):
            reason = rounds.run()
            for number in range(config.explore.baseline):
                _by_lot(number, rounds, run, events.append)
        events.append("stop", reason=reason)
    return run.path


def _by_lot(number: int, rounds: Exploration, run: RunDirectory, note: Note) -> None:
    """Learn frames drawn by lot, for comparison."""
    parts, folder, note = rounds.parts, rounds.folder / BASELINE, of_baseline(note, number)
    learnt = [*rounds.records("screened"), *read_series(folder / str(number), "tested")]
    check_equal_effort(parts.config, [record for record in learnt if record["generation"]])
    chains = Chains(parts.model, parts.config, folder / str(number) / GENERATIONS, note)
    desk = lot_labelling(rounds.harvest.labelling, folder / "labels", run.oracle_dir / BASELINE, run.spool_dir)
    arm = ByLot(number, rounds.walks, rounds.zero, rounds.harvest, chains, desk, folder / str(number), note)
    arm.learn(rounds.records("chosen"), rounds.records("labelled"))


def check_exploration(config_file: Path, say: Callable[[str, str], None], *, label: bool = False) -> None:
    """Everything that can be validated without running anything.

    Args: say: hears of each finding.   label: also have the oracle label the start structure and displaced copies of it; the labels go
        to the run directory's spool, so a run does not compute them again.
    Raises: as `gather`; OracleInconsistent when energies, forces and stress do not belong together.
    """
    parts = gather(config_file)
    config, like = parts.config, parts.system.like
    known = "nothing" if parts.known is None else f"{len(parts.known.pool)} frames of {len(parts.known.pool.kinds)} kinds"
    kind = "periodic" if like.periodic else "molecule"
    say("atoms", f"{len(like.numbers)}, {kind}, charge {like.charge:+d}, multiplicity {like.multiplicity}")
    say("walkers", ", ".join(config.walkers()))
    say("known", known)
    say("oracle", f"{parts.oracle.code}, fingerprint {fingerprint(parts.oracle)[:12]}")
    say("potential", f"{config.potential.model}: {parts.model.potential.path}; {config.ensemble.members} members")
    if label:
        foundation = make_ensemble(parts.model, foundation_generation(parts.model, 1), config)
        run = (parts.base / config.run.directory).absolute()
        label_trial(config, parts.options, parts.base, parts.oracle, like, foundation.predict(like), run, say)
    say("", "everything that can be checked without running is in order" if not label else "everything is in order")


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _physics(parts: Parts) -> dict[str, Any]:
    """What must stay the same for as long as a run directory lives."""
    known = parts.known.pool.checksums if parts.known else []
    facts = physics(parts.config, parts.system.like, parts.model, parts.oracle.physics(), fingerprint(parts.oracle))
    return facts | {
        "known": known,
        "elements": list(parts.elements),
        "seed": parts.config.run.seed,
        "walkers": list(parts.config.walkers()),
    }


@dataclass
class Exploration:
    """The rounds."""

    parts: Parts
    walks: Walks
    harvest: Harvest
    zero: Zero
    calibrations: dict[str, Calibration] | Mapping[str, Calibration]
    """Before the first label."""
    folder: Path
    note: Note
    tell: Callable[[str], None]
    generation: int = field(default=0, init=False)
    """In use."""
    _at_first: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config, self.chains = self.parts.config, self.harvest.chains
        self._at_first = self._done()

    def progressed(self) -> bool:
        """Whether this start has brought the run forward."""
        return self._done() > self._at_first

    def _done(self) -> int:
        """Finished steps, labels, generations, and what walkers have kept and baselines had labelled (by size of their files)."""
        frames = sum(path.stat().st_size for path in self.folder.glob("**/*.extxyz"))
        steps = sum(1 for path in self.folder.glob("**/*.json") if GENERATIONS not in path.parts)
        beside = sum(weights.latest(path) or 0 for path in self.folder.glob(f"{BASELINE}/*/{GENERATIONS}"))
        return frames + steps + len(self.harvest.labelling.store) + self.chains.newest() + beside

    def run(self) -> str:
        """Go on until it is enough; returns why."""
        e, number = self.config.explore, 0
        while self._record("labelled", number) is not None:  # weights of finished rounds are not needed, and may be deleted
            number += 1
        in_a_row = IN_A_ROW if self.parts.known is None else 1
        enough = Explored(e.approach, in_a_row, self.config.accuracy.confidence, e.rounds, self.config.oracle.max_labels)
        while True:
            self._learn(number)
            self._simulate(number)
            screened = self._screened(number)
            sofar = [self._record("screened", i) or {} for i in range(number + 1)]
            last = self._record("labelled", number - 1) or {}
            reason = ""
            if self._record("chosen", number) is None:  # else labels of this round may be there, and are to be learnt
                reason = enough.reason(
                    len(self.harvest.labelling.store), [x["fresh"] for x in sofar], [x["known"] for x in sofar],
                    [not x["stopped"] for x in sofar], last.get("audited", 0) if last.get("generation") else 0, last.get("beyond_at_most", 1.0),
                )  # fmt: skip
            reason = reason or self._choose_and_label(number, screened)
            if reason:
                self._along(self.generation)
                return reason
            number += 1

    # ------------------------------------------------------------------ the parts of a round
    def _learn(self, number: int) -> None:
        """Weights that have learnt all that is known before this round."""
        rounds = [self.harvest.labels(self._record("labelled", i)) for i in range(number)]
        sets = ([] if self.parts.known is None else [self.zero.known_labels()]) + [self.zero.shifted(some) for some in rounds]
        self.chains.learn(sets)
        self.generation = len(sets)
        if self.generation == 1 and number == 1:  # the first weights with a spread, on the trajectory that went before them
            self._along(1)

    def _simulate(self, number: int) -> None:
        def ended(facts: dict[str, Any]) -> None:
            self.note("dynamics", round=number, generation=self.generation, **facts)
            if facts["stopped"]:
                self.tell(
                    f"round {number}: walker {facts['walker']} left the sanity window at step {facts['step']}: {facts['stopped']}"
                )

        self.walks.run(number, self.chains.predict, self._calibrated(number), ended, self.harvest.clock.disarm)

    def _calibrated(self, number: int) -> Mapping[str, Calibration]:
        """What the errors at all labels before this round say of the trust in the predicted sds."""
        found: Mapping[str, Calibration] = self.calibrations
        for i in range(number):
            for item in self.harvest.labels(self._record("labelled", i)):
                found = self.walks.policy.observe(found, item, self.zero.constants().of(item.frame.numbers))
        return found

    def _screened(self, number: int) -> dict[str, Any]:
        """What the members say of all frames of the round, and of those that are known."""
        if (done := self._record("screened", number)) is not None:
            return done
        begin, kept = time.monotonic(), self.walks.kept(number)
        if not len(kept):
            raise GuardStop(
                f"no walker of round {number} has kept a frame: all left the sanity window at once, in {self.folder / f'round_{number:03d}'}. "
                "Delete that folder to try again with other settings: a wider window, more start frames, longer updates"
            )
        found = screen(self.chains, kept, np.arange(len(kept)))
        ended = [self.walks.done(number, name) or {} for name in self.config.walkers()]
        facts = {
            "generation": self.generation, "frames": len(kept), "fresh": float(found.force.mean()),
            "known": self.harvest.level(self.parts.known) if self.generation else None, STEPS: effort(self.config)[1],
            "stopped": [facts["walker"] for facts in ended if facts["stopped"]], "uncertain": self._uncertain(number, found),
            "force": found.force, "atom": found.atom, "energy": found.energy, "mean_energy": found.mean_energy,
            "energy_sd": found.energy_sd, "seconds": time.monotonic() - begin,
        }  # fmt: skip
        return self._write("screened", number, facts)

    def _uncertain(self, number: int, found: Screen) -> float | None:
        """Share of frames whose energy could not be promised."""
        if not self.generation:
            return None
        a = self.config.accuracy
        chance = self._calibrated(number)["energy"].probability_exceeds(found.energy_sd, a.energy)
        return float(np.mean(chance > 1.0 - a.confidence))

    def _choose_and_label(self, number: int, screened: dict[str, Any]) -> str:
        """Returns why there is nothing to label, or nothing."""
        kept = self.walks.kept(number)
        chosen = self._record("chosen", number)
        if chosen is None:
            columns = [np.array(screened[name]) for name in ("force", "atom", "energy", "mean_energy", "energy_sd")]
            found = Screen(np.arange(len(kept)), *columns)
            facts = self.harvest.choose(number, self.generation, kept, found, self.parts.known)
            if not len(facts["chosen"]):
                return "every frame of the fresh dynamics is nearly one that is labelled"
            chosen = self._write("chosen", number, facts)
            self.note("selection", round=number, **{k: chosen[k] for k in ("chosen", "audits", "selected", "remaining")})
            self.tell(
                f"round {number}: {len(chosen['chosen'])} of {len(kept)} frames chosen, disagreement {1e3 * chosen['selected']:.1f} meV/Å; "
                f"of the remaining {1e3 * chosen['remaining']:.1f}, of what is known {_milli(screened['known'])}"
            )
        if self._record("labelled", number) is None:
            begin = time.monotonic()
            before = {name for i in range(number) for name in (self._record("labelled", i) or {})["labels"]}
            facts = self.harvest.label(number, kept, chosen, before)
            self.zero.fix(self.harvest.labels(facts))
            facts |= self.harvest.judged(facts, self.zero.constants(), AUDIT_CONFIDENCE) | {"seconds": time.monotonic() - begin}
            self._write("labelled", number, facts)
            self.note("labelled", round=number, labels=len(facts["labels"]), failed=facts["failed"], beyond=facts["beyond"])
            self.tell(
                f"round {number}: {len(self.harvest.labelling.store)} labels; force error before they are learnt "
                f"{_milli(facts['chosen_error'])} meV/Å at the chosen, {_milli(facts['audit_error'])} at the audited frames"
            )
        return ""

    def _along(self, generation: int) -> None:
        """The first trajectory, judged by some weights."""
        if generation and not (self.folder / f"along_{generation:03d}.json").exists():
            kept = self.walks.kept(0)
            found = screen(self.chains, kept, np.arange(len(kept)))
            self._write("along", generation, {"force": found.force})

    def records(self, name: str) -> list[dict[str, Any]]:
        """Of all rounds that have labels."""
        count = sum(1 for _ in self.folder.glob("labelled_*.json"))
        return [read_json(self.folder / f"{name}_{number:03d}.json") for number in range(count)]

    def _record(self, name: str, number: int) -> dict[str, Any] | None:
        file = self.folder / f"{name}_{number:03d}.json"
        return read_json(file) if file.exists() else None

    def _write(self, name: str, number: int, facts: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = plain({"round": number, **facts})
        write_json(self.folder / f"{name}_{number:03d}.json", found)
        return found


def _milli(value: float | None) -> str:
    return "-" if value is None else f"{1e3 * value:.1f}"
