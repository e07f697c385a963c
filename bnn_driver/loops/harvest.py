"""From the frames of fresh dynamics to labels: which are chosen, which are audited, and how wrong the weights were before they learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bnn_driver.active import committee as qbc
from bnn_driver.active.likeness import Gallery
from bnn_driver.active.policy import Policy
from bnn_driver.bayes.calibration import Coverage
from bnn_driver.errors import OracleError
from bnn_driver.explore_config import ExploreConfig
from bnn_driver.loops.answering import belief
from bnn_driver.loops.assembly import foundation_generation, make_ensemble
from bnn_driver.loops.chains import Chains, Note
from bnn_driver.loops.known import Constants, Known
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.screening import Choice, Screen, choose, descriptors, different, screen
from bnn_driver.loops.seeds import generator
from bnn_driver.loops.walltime import WallClock
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.records import Array, LabelledFrame
from bnn_driver.store.trajectory import Trajectories

SPARE = 2
"""Frames beyond the chosen ones, in units of these, that stand in for frames that cannot be labelled where nothing is known yet."""


@dataclass
class Harvest:
    """Chooses, has labelled, and judges."""

    config: ExploreConfig
    labelling: Labelling
    policy: Policy
    chains: Chains
    clock: WallClock
    announced: set[str]
    """Labels whose event is written."""
    note: Note
    tell: Callable[[str], None]
    _foundation: Ensemble | None = field(default=None, init=False)

    # ------------------------------------------------------------------ which
    def choose(self, number: int, generation: int, kept: Trajectories, found: Screen, known: Known | None) -> dict[str, Any]:
        """Frames of a round, as far as the budget goes; places in `kept`."""
        e, store = self.config.explore, self.labelling.store
        left = math.inf if self.labelling.max_labels is None else self.labelling.max_labels - len(store)
        count = int(min(e.batch if generation else e.start, left))
        taken = self._taken(known)
        choice = (
            choose(self.chains, kept, found, e, count, taken, partial(self._descriptors, known))
            if generation
            else self._far_apart(kept, count, taken)
        )
        audits = self._audits(number, kept, choice.rows, int(min(e.audits, left - len(choice.rows))) if len(choice.rows) else 0)
        others = np.setdiff1d(found.index, np.concatenate([choice.rows, choice.near_duplicates]))
        return {
            "generation": generation, "chosen": choice.rows, "reserve": choice.reserve, "audits": audits,
            "near_duplicates": len(choice.near_duplicates),
            "selected": float(found.force[choice.rows].mean()) if len(choice.rows) else 0.0,
            "remaining": float(found.force[others].mean()) if len(others) else 0.0,
        }  # fmt: skip

    def _audits(self, number: int, kept: Trajectories, chosen: Array, count: int) -> list[int]:
        """Frames by lot, without a label and each of a structure of its own: walkers, and all beads of a ring, start from one."""
        drawn = generator(self.config.run.seed, "audits", number).permutation(len(kept))
        rows: list[int] = []
        taken = {self._name(kept, i): i for i in chosen.tolist()}
        for i in drawn.tolist():
            if len(rows) == count:
                break
            if self.labelling.known(kept.one(i).frames) is None and taken.setdefault(self._name(kept, i), i) == i:
                rows.append(i)
        return rows

    def _name(self, kept: Trajectories, row: int) -> str:
        return kept.one(row).frames.content_id(self.labelling.fingerprint)

    def _far_apart(self, kept: Trajectories, count: int, taken: Gallery) -> Choice:
        """Without a disagreement: farthest points in the model's descriptors, from the first frame on."""
        rows, duplicates = different(kept, np.arange(len(kept)), np.arange(len(kept)), len(kept), taken)
        if not len(rows):
            return Choice(rows, rows, duplicates)
        place = descriptors(self.chains, kept, rows)
        order = rows[qbc.most_diverse(np.zeros(len(rows)), place, min(len(rows), (1 + SPARE) * count), len(rows))]
        return Choice(order[:count], order[count:], duplicates)

    def _taken(self, known: Known | None) -> Gallery:
        """Frames that have a label."""
        gallery = Gallery(self.config.explore.duplicates)
        for item in self.labelling.store.all():
            gallery.add(item.frame)
        if known is not None:
            for i in range(len(known.pool)):
                gallery.add(known.pool.one(i).frames)
        return gallery

    def _descriptors(self, known: Known | None) -> Array:
        """(L, D) of all frames that have a label."""
        parts = [self.chains.describe(item.frame) for item in self.labelling.store.all()]
        if known is not None:
            parts.append(descriptors(self.chains, known.pool, np.arange(len(known.pool))))
        return np.concatenate(parts)

    def level(self, known: Known | None) -> float | None:
        """eV/Å, mean disagreement on what is known: the known frames where there are any, else all labels; None without either."""
        if known is not None:
            return float(screen(self.chains, known.pool, np.arange(len(known.pool))).force.mean())
        frames = [item.frame for item in self.labelling.store.all()]
        if not frames:
            return None
        return float(np.mean([qbc.force_disagreement(self.chains.predict(frame).forces)[0] for frame in frames]))

    # ------------------------------------------------------------------ labels
    def label(self, number: int, kept: Trajectories, chosen: dict[str, Any], before: Collection[str]) -> dict[str, Any]:
        """Have the chosen and audited frames labelled, others in place of those that cannot be.

        Args: before: frame ids of the labels of earlier rounds, which do not count again.
        Returns: frame ids, in order, and which of them were chosen and audited.
        Raises: OracleError when no frame could be labelled, or labels fail again and again.
        """
        wanted = list(dict.fromkeys([*chosen["chosen"], *chosen["audits"]]))
        spare = [i for i in chosen["reserve"] if i not in wanted]
        todo, failed, tried = wanted, list[int](), list[int]()
        replaced_before = self._replaced(kept, wanted, spare, before)
        while todo:
            lost = self._ask(number, kept, todo, chosen, replaced_before)
            tried += todo
            failed += lost
            replaced = sum(1 for i in lost if i in chosen["chosen"] or i in chosen["reserve"])
            todo, spare = spare[:replaced], spare[replaced:]
        rows_of: dict[str, list[int]] = {}
        for i in dict.fromkeys([*tried, *chosen["reserve"]]):
            item = self.labelling.known(kept.one(i).frames)
            if item is not None and item.label.frame_id not in before:
                rows_of.setdefault(item.label.frame_id, []).append(i)
        if not rows_of:
            raise OracleError(
                f"none of the {len(tried)} frames of round {number} could be labelled; the reasons are in oracle/quarantine. Mend the "
                "oracle and run the same command again"
            )
        return {
            "generation": chosen["generation"],
            "labels": list(rows_of),
            "is_audit": [any(i in chosen["audits"] for i in rows) for rows in rows_of.values()],
            "is_chosen": [any(i not in chosen["audits"] or i in chosen["chosen"] for i in rows) for rows in rows_of.values()],
            "failed": failed,
        }

    def _replaced(self, kept: Trajectories, wanted: list[int], spare: list[int], before: Collection[str]) -> list[int]:
        """Frames that failed before a kill and have been replaced: one behind them has its label, so they are not asked again."""
        items = [self.labelling.known(kept.one(i).frames) for i in spare]
        last = max((k for k, item in enumerate(items) if item is not None and item.label.frame_id not in before), default=-1)
        tried = [*wanted, *spare[:last]] if last >= 0 else []
        frames = {i: kept.one(i).frames for i in tried}
        return [i for i in tried if self.labelling.known(frames[i]) is None and self.labelling.quarantine.has(frames[i])]

    def labels(self, labelled: dict[str, Any] | None) -> list[LabelledFrame]:
        """The labels of a round, in order."""
        items = {item.label.frame_id: item for item in self.labelling.store.all()}
        return [items[name] for name in (labelled or {}).get("labels", ())]

    def _ask(
        self, number: int, kept: Trajectories, index: Sequence[int], chosen: dict[str, Any], replaced: Collection[int]
    ) -> list[int]:
        """Labels of frames that have none; returns those that cannot be labelled, or were replaced."""
        without = [i for i in index if self.labelling.known(kept.one(i).frames) is None]
        refused = [i for i in without if i in replaced or self.labelling.quarantine.refusal(kept.one(i).frames) is not None]
        todo = [i for i in without if i not in refused]
        self.clock.check_labels(len(todo), self.labelling.slowest, self.labelling.executor.workers, self.config.oracle.timeout)
        frames = [kept.one(i).frames for i in todo]
        results = self.labelling.attempt(frames, [self._context(number, kept, i, chosen) for i in todo])
        for i, result in zip(todo, results, strict=True):
            if isinstance(result, OracleError):
                self.note("failed", round=number, frame=i, reason=f"{type(result).__name__}: {result}")
                self.tell(f"round {number}: frame {i} could not be labelled and is in quarantine: {result}")
        self._announce()
        return refused + [i for i, result in zip(todo, results, strict=True) if isinstance(result, OracleError)]

    def _announce(self) -> None:
        """An event for every label that has none."""
        for number, item in enumerate(self.labelling.store.all()):
            name = item.label.frame_id
            if name not in self.announced:
                facts = {key: item.context[key] for key in ("round", "trajectory", "step", "bead", "criterion")}
                self.note("label", number=number, frame_id=name, seconds=item.label.seconds, **facts)
                self.announced.add(name)

    def _context(self, number: int, kept: Trajectories, i: int, chosen: dict[str, Any]) -> dict[str, Any]:
        """What was believed of a frame before its label came."""
        frame = kept.one(i).frames
        prediction = self.chains.predict(frame)
        criterion = "audit" if i in chosen["audits"] and i not in chosen["chosen"] else "selected" if number else "start"
        return {
            "round": number, "trajectory": kept.walker[i], "step": int(kept.step[i]), "bead": int(kept.bead[i]), "criterion": criterion,
            "audit": False, "generation": prediction.generation, "accuracy": self.config.accuracy.energy,
            "confidence": self.config.accuracy.confidence, "disagreement": float(qbc.force_disagreement(prediction.forces)[0]),
            **belief(prediction, self._foundation_of().predict(frame), 0),
        }  # fmt: skip

    def _foundation_of(self) -> Ensemble:
        if self._foundation is None:
            model = self.chains.model
            self._foundation = make_ensemble(model, foundation_generation(model, 1), self.config)
        return self._foundation

    # ------------------------------------------------------------------ errors
    def judged(self, labelled: dict[str, Any], constants: Constants, confidence: float) -> dict[str, Any]:
        """Errors of what was predicted of the frames before they were learnt, eV and eV/Å.

        Args: confidence: of the interval of the share of frames beyond the accuracy.
        """
        items = self.labels(labelled)
        force = [float(qbc.force_error(x.context["predicted_forces"][None], x.label.forces[None])[0]) for x in items]
        foundation = [float(qbc.force_error(x.context["foundation_forces"][None], x.label.forces[None])[0]) for x in items]
        energy = [x.context["predicted_energy"] - x.label.energy - constants.of(x.frame.numbers) for x in items]
        audited = [x for x, is_audit in zip(items, labelled["is_audit"], strict=True) if is_audit]
        verdicts = [self.policy.exceeded(x, constants.of(x.frame.numbers)) for x in audited]
        coverage = {c.name: Coverage(len(audited), sum(v[c.name] for v in verdicts)) for c in self.policy.criteria}
        return {
            "force_error": force, "foundation_force_error": foundation, "energy_error": energy,
            "disagreement": [x.context["disagreement"] for x in items],
            "energy_sd": [x.context["energy_predictive_sd"] for x in items],
            "chosen_error": _mean(force, labelled["is_chosen"]), "audit_error": _mean(force, labelled["is_audit"]),
            "foundation_error": _mean(foundation, labelled["is_audit"]), "audited": len(audited),
            "beyond": {name: c.exceeded for name, c in coverage.items()},
            "beyond_at_most": max(c.interval(confidence)[1] for c in coverage.values()),
        }  # fmt: skip


def _mean(values: Sequence[float], which: Sequence[bool]) -> float | None:
    some = [x for x, used in zip(values, which, strict=True) if used]
    return float(np.mean(some)) if some else None
