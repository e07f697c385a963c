"""What an exploration would have learnt from frames drawn by lot: as many of the same dynamics, learnt with the same effort.

Every step leaves one file and is skipped when that is there, so the same call goes on after a kill at any moment:
    baseline/0/tested_000.json  errors at the audited frames of a round, before the round is learnt
    baseline/0/drawn_000.json   frames by lot, as many as were chosen, which are learnt with the audits of the round
    baseline/0/generations/     the weights
    baseline/labels/            labels that only baselines asked for
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnn_driver.active import committee as qbc
from bnn_driver.errors import OracleError
from bnn_driver.loops.chains import Chains, Note
from bnn_driver.loops.effort import STEPS, effort
from bnn_driver.loops.harvest import Harvest
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.seeds import generator
from bnn_driver.loops.walks import Walks
from bnn_driver.loops.zero import Zero
from bnn_driver.records import LabelledFrame
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.files import read_json, write_json
from bnn_driver.store.trajectory import Trajectories

GENERATIONS = "generations"


def lot_labelling(run: Labelling, folder: Path, pending: Path, spool: Path) -> Labelling:
    """A desk before the same oracle whose labels are not those of the run, and do not spend its budget.

    Args: run: the desk of the run.   folder: for the labels.
    """
    desk = Labelling(
        LabelStore(folder), run.executor, pending, run.fingerprint, None, run.quarantine, code=run.code, beside=run.store
    )
    desk.recover(spool)
    return desk


@dataclass(frozen=True, eq=False)
class ByLot:
    """One drawing."""

    number: int
    """Which of several; its lots follow from it and from the root seed."""
    walks: Walks
    zero: Zero
    harvest: Harvest
    """Of the exploration, whose labels are not computed again."""
    chains: Chains
    """Learn what is drawn here."""
    labelling: Labelling
    """See `lot_labelling`."""
    folder: Path
    note: Note

    def learn(self, chosen: Sequence[dict[str, Any]], labelled: Sequence[dict[str, Any]]) -> None:
        """Draw, learn, and be tested as the exploration was.

        Args: chosen, labelled: records of its rounds.   Raises: OracleError, DivergedError; TimeIsUp before labels that cannot finish.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.zero.known_labels()
        sets = [known] if known else []
        learnt: list[LabelledFrame] = []
        for number, (choice, record) in enumerate(zip(chosen, labelled, strict=True)):
            if not (self.folder / f"tested_{number:03d}.json").exists():
                self.chains.learn(sets)
                self._test(number, len(sets), record, learnt)
            if number + 1 < len(labelled):  # after the last round no frames are left to be tested by
                drawn = self._drawn(number, choice, record, learnt)
                sets.append(self.zero.shifted(drawn))
                learnt += drawn

    def _audits(self, record: dict[str, Any]) -> list[LabelledFrame]:
        pairs = zip(self.harvest.labels(record), record["is_audit"], strict=True)
        return [item for item, is_audit in pairs if is_audit]

    def _test(self, number: int, generation: int, record: dict[str, Any], learnt: Sequence[LabelledFrame]) -> None:
        """Force errors at the audited frames that were not learnt (a round starts where the one before ended), eV/Å."""
        before = {item.label.frame_id for item in learnt}
        audits = [item for item in self._audits(record) if item.label.frame_id not in before]
        said = [self.chains.predict(item.frame).mean_forces for item in audits]
        errors = [float(qbc.force_error(f, item.label.forces[None])[0]) for f, item in zip(said, audits, strict=True)]
        mean = float(np.mean(errors)) if errors else None
        facts = {"generation": generation, STEPS: effort(self.harvest.config)[1]}
        self._write("tested", number, facts | {"labels": len(learnt), "force_error": errors, "audit_error": mean})
        self.note("test", round=number, labels=len(learnt), audit_error=mean)

    def _drawn(
        self, number: int, choice: dict[str, Any], record: dict[str, Any], learnt: Sequence[LabelledFrame]
    ) -> list[LabelledFrame]:
        """What is learnt of a round; where nothing was known there was no disagreement to choose by, and its labels are the same."""
        if not choice["generation"]:
            return self.harvest.labels(record)
        file, kept = self.folder / f"drawn_{number:03d}.json", self.walks.kept(number)
        if not file.exists():
            begin = time.monotonic()
            spare = self._lots(number, kept, [*self._audits(record), *learnt])
            wanted, rows = len(record["labels"]) - sum(record["is_audit"]), list[int]()
            while len(rows) < wanted and spare:
                todo, spare = spare[: wanted - len(rows)], spare[wanted - len(rows) :]
                rows += self._label(number, kept, todo)
            self._write("drawn", number, {"rows": rows, "seconds": time.monotonic() - begin})
            self.note("labelled", round=number, labels=len(rows))
        return self._audits(record) + [self._known(kept, i) for i in read_json(file)["rows"]]

    def _lots(self, number: int, kept: Trajectories, taken: Sequence[LabelledFrame]) -> list[int]:
        """Frames in the order of their lots, each structure once, but for those that are learnt and those that cannot be labelled."""
        order = generator(self.harvest.config.run.seed, "baseline", self.number, number).permutation(len(kept))
        seen = {item.label.frame_id for item in taken}
        rows = []
        for i in order.tolist():
            frame, item = kept.one(i).frames, self._find(kept, i)
            name = frame.content_id(self.labelling.fingerprint) if item is None else item.label.frame_id
            if name not in seen and self.labelling.quarantine.refusal(frame) is None:
                seen.add(name)
                rows.append(i)
        return rows

    def _label(self, number: int, kept: Trajectories, rows: Sequence[int]) -> list[int]:
        """Have frames labelled that have no label; returns those that have one now."""
        todo, run = [i for i in rows if self._find(kept, i) is None], self.harvest
        run.clock.check_labels(len(todo), run.labelling.slowest, run.labelling.executor.workers, run.config.oracle.timeout)
        contexts = [
            {
                "round": number, "trajectory": kept.walker[i], "step": int(kept.step[i]), "bead": int(kept.bead[i]), "criterion": "lot",
                "audit": False,
            }
            for i in todo
        ]  # fmt: skip
        results = self.labelling.attempt([kept.one(i).frames for i in todo], contexts)
        failed = {i for i, result in zip(todo, results, strict=True) if isinstance(result, OracleError)}
        return [i for i in rows if i not in failed]

    def _find(self, kept: Trajectories, row: int) -> LabelledFrame | None:
        frame = kept.one(row).frames
        return self.harvest.labelling.known(frame) or self.labelling.known(frame)

    def _known(self, kept: Trajectories, row: int) -> LabelledFrame:
        """Raises: OracleError when the label of a drawn frame is gone."""
        found = self._find(kept, row)
        if found is None:
            raise OracleError(
                f"the label of frame {row} that baseline {self.number} has drawn is gone from {self.labelling.store.folder}"
            )
        return found

    def _write(self, name: str, number: int, facts: dict[str, Any]) -> None:
        write_json(self.folder / f"{name}_{number:03d}.json", {"round": number, **facts})
