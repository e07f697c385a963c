"""From an asked frame to a label on disk: nothing is computed twice, nothing that was computed is lost."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bnn_driver.errors import EnvironmentProblem, GuardStop, OracleConfigError, OracleError
from bnn_driver.executors import frame_from_facts, frame_to_facts
from bnn_driver.executors.claims import is_claimed
from bnn_driver.loops.quarantine import RESTART_TOLERANCE, Breaker, Quarantine
from bnn_driver.oracle import read_done
from bnn_driver.records import Frames, Label, LabelledFrame
from bnn_driver.store.dataset import LabelStore, distance
from bnn_driver.store.run import write_atomic

log = logging.getLogger(__name__)

ASKED, AUDIT = 0, 1
"""Priorities: a held reply goes before an audit."""
POLL_SECONDS = 0.05
"""Between two looks for new weights while frames wait for their turn, and for labels of processes that are not ours."""


class Executor(Protocol):
    """What labels frames: `bnn_driver.executors.pool.Pool`."""

    def submit(self, frame: Frames, *, priority: int = 0) -> Future[Label]:
        """Label one frame."""

    @property
    def workers(self) -> int:
        """Labels at a time."""


class Labelling:
    """The desk between the driver and the oracle.

    Before a frame is submitted its context is written to `pending/`; the oracle's process writes its result to its spool before
    it answers; then the label file is written and the pending file removed.  After a kill at any moment `recover` finishes what
    was begun; a worker that outlived the kill is waited for when its frame is asked again.  A frame that cannot be labelled goes to
    quarantine, with the reason.
    """

    def __init__(
        self,
        store: LabelStore,
        executor: Executor,
        pending: Path,
        fingerprint: str,
        max_labels: int | None,
        quarantine: Quarantine,
        walker: str = "",
        code: str = "",
        beside: LabelStore | None = None,
    ) -> None:
        """Args: walker: whose labels.   code: what the driver's oracle calls itself; a label may say more, from the code's output.
        beside: another store of the run, whose labels must come from the same binary.
        """
        self.walker = walker
        self.code = code
        self._beside = beside
        self.store = store
        self.executor = executor
        self.pending = pending
        self.fingerprint = fingerprint
        self.max_labels = max_labels
        self.quarantine = quarantine
        self._breaker = Breaker()
        self._audits: dict[str, tuple[Future[Label], Frames, dict[str, Any]]] = {}
        self._begun: dict[str, tuple[Frames, dict[str, Any]]] = {}
        self._spool = Path()  # `recover` says which; before, nothing is begun
        self._audited = {_moment(item.context) for item in store.all() if item.context.get("audit") and self.is_own(item)}
        self._budget_told = False
        pending.mkdir(parents=True, exist_ok=True)

    @property
    def slowest(self) -> float | None:
        """s of the slowest label so far; None without any."""
        return max((item.label.seconds for item in self.store.all()), default=None)

    def known(self, frame: Frames) -> LabelledFrame | None:
        """The label of this very frame, when there is one (after a restart i-PI asks again)."""
        return self.store.find(frame, self.fingerprint, RESTART_TOLERANCE)

    def is_own(self, item: LabelledFrame) -> bool:
        """Whether this walker asked for the label, not another one that shares the store."""
        return str(item.context.get("walker", "")) == self.walker

    def ask(
        self, frames: Sequence[Frames], contexts: Sequence[dict[str, Any]], changed: Callable[[], bool] | None = None
    ) -> list[LabelledFrame | None]:
        """Labels of all frames, computed at once; returns when every one is on disk.

        Args: changed: tells of new weights; frames that have not begun by then are taken back (None in the result) and are to be
            judged again.   Raises: GuardStop when the budget of labels is spent.  OracleError when one frame could not be labelled
            (the others are kept), or when labels fail again and again.
        """
        results = self._answers(frames, contexts, changed)
        failures = [result for result in results if isinstance(result, OracleError)]
        if failures:
            self._breaker.check()
            raise type(failures[0])("\n".join(str(error) for error in failures)) from failures[0]
        return [result for result in results if not isinstance(result, OracleError)]

    def attempt(self, frames: Sequence[Frames], contexts: Sequence[dict[str, Any]]) -> list[LabelledFrame | OracleError]:
        """As `ask`, with the error in place of the label of a frame that could not be labelled.

        Raises: GuardStop when the budget of labels is spent.  OracleConfigError for settings that suit no frame.  OracleError when
            labels fail again and again.
        """
        results = [result for result in self._answers(frames, contexts, None) if result is not None]
        for result in results:
            if isinstance(result, OracleConfigError):
                raise result
        self._breaker.check()
        return results

    def _answers(
        self, frames: Sequence[Frames], contexts: Sequence[dict[str, Any]], changed: Callable[[], bool] | None
    ) -> list[LabelledFrame | OracleError | None]:
        """Label, failure, or None for a frame that was taken back.  Raises: GuardStop when the budget of labels is spent."""
        if self.max_labels is not None and len(self.store) + len(self._audits) + len(frames) > self.max_labels:
            raise GuardStop(
                f"{len(frames)} more labels are needed, but {len(self.store) + len(self._audits)} of at most {self.max_labels} are spent; "
                "raise [oracle] max_labels and run the same command again"
            )
        frames = [self._as_begun(frame) for frame in frames]
        futures = [self._submit(frame, context, ASKED) for frame, context in zip(frames, contexts, strict=True)]
        taken_back = self._wait(futures, changed)
        results: list[LabelledFrame | OracleError | None] = []
        for future, frame, context in zip(futures, frames, contexts, strict=True):
            if future in taken_back:
                name = frame.content_id(self.fingerprint)
                if name not in self._begun and name not in self._audits:  # of those the label may come still
                    self._pending_file(name).unlink(missing_ok=True)
                results.append(None)
                continue
            try:
                results.append(self._adopt(frame, future.result(), context))
            except OracleError as error:
                self._give_up(frame, context, error)
                results.append(error)
        return results

    def _wait(self, futures: Sequence[Future[Label]], changed: Callable[[], bool] | None) -> set[Future[Label]]:
        """Wait for all, but for those that had not begun when the weights changed; these are cancelled and returned."""
        waiting, taken_back = set(futures), set()
        while waiting:
            _, waiting = wait(waiting, None if changed is None else POLL_SECONDS, FIRST_COMPLETED)
            if changed is not None and len(waiting) > 0 and changed():
                taken_back = {future for future in waiting if future.cancel()}
                wait(waiting - taken_back)
                return taken_back
        return taken_back

    def was_audited(self, step: int, bead: int) -> bool:
        """True when this moment of the simulation was audited before: after a crash i-PI repeats its last steps."""
        return (step, bead) in self._audited

    def audit(self, frame: Frames, context: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Queue a frame that was served already, behind all that are asked; said once when the budget allows no more."""
        if self.max_labels is not None and len(self.store) + len(self._audits) >= self.max_labels:
            if not self._budget_told:
                warn(f"the budget of {self.max_labels} labels is spent: from here on the promise is not audited any more")
            self._budget_told = True
            return
        self._audited.add(_moment(context))
        self._breaker.check()
        frame = self._as_begun(frame)
        future = self._submit(frame, context, AUDIT)
        self._audits[frame.content_id(self.fingerprint)] = (future, frame, context)

    @property
    def in_flight(self) -> int:
        """Labels that nobody waits for and that have not come yet: audits, and frames that a worker of a killed start computes."""
        return len(self._audits) + len(self._computed_elsewhere())

    def collect(self, on_failure: Callable[[str], None], timeout: float = 0.0) -> list[LabelledFrame]:
        """Labels that nobody waited for and that have come since the last call; waits up to `timeout` seconds for all of them."""
        end = time.monotonic() + timeout
        if timeout > 0 and self._audits:
            wait([future for future, _, _ in self._audits.values()], timeout)
        while timeout > 0 and self._computed_elsewhere() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        arrived = self._adopt_begun()
        for name in [name for name, (future, _, _) in self._audits.items() if future.done()]:
            future, frame, context = self._audits.pop(name)
            try:
                arrived.append(self._adopt(frame, future.result(), context))
            except OracleError as error:
                self._give_up(frame, context, error)
                on_failure(f"audit of step {context['step']}: {type(error).__name__}: {error}")
        return arrived

    def recover(self, spool: Path) -> None:
        """Finish what a killed run had begun.

        Args: spool: where the oracle's processes put their labels, and claim the frames that they compute.
        Frames whose label is complete are adopted; audits go on.  An asked frame without a label is asked again by the run itself,
        or not at all; until then it is remembered as it was, for a worker that outlives its driver may compute it still, and i-PI's
        RESTART gives back a structure that is nearly the same and has another content id.
        """
        self._spool = spool
        for file in sorted(self.pending.glob("*.json")):
            frame, context = _read_pending(file)
            label = read_done(spool, file.stem)
            if label is not None:
                self._adopt(frame, label, context)
            elif context["audit"]:
                self.audit(frame, context, log.warning)
            else:
                self._begun[file.stem] = frame, context
                if is_claimed(spool, file.stem):
                    log.warning("a worker of the last start still computes the frame of step %s", context["step"])

    def forget_begun(self) -> None:
        """At the end of the simulation: what a killed start had asked, nobody asked again and nobody computes."""
        for name in self._begun.keys() - self._computed_elsewhere():
            self._forget(name)

    def _computed_elsewhere(self) -> set[str]:
        """Frames that a killed start had asked for and that another process computes."""
        return {name for name in self._begun if is_claimed(self._spool, name)}

    def _adopt_begun(self) -> list[LabelledFrame]:
        """Labels that workers of a killed start have finished by now."""
        found = [(*begun, read_done(self._spool, name)) for name, begun in self._begun.items()]
        return [self._adopt(frame, label, context) for frame, context, label in found if label is not None]

    def _as_begun(self, frame: Frames) -> Frames:
        """The frame as it is computed, or was begun by a killed start, if there is one that differs as little as RESTART does."""
        known = [(distance(frame, begun), begun) for begun, _ in self._begun.values()]
        known += [(distance(frame, audited), audited) for _, audited, _ in self._audits.values()]
        nearest, same = min(known, key=lambda pair: pair[0], default=(np.inf, frame))
        return same if nearest < RESTART_TOLERANCE else frame

    def _submit(self, frame: Frames, context: dict[str, Any], priority: int) -> Future[Label]:
        name = frame.content_id(self.fingerprint)
        refusal = self.quarantine.refusal(frame)
        if refusal is not None:
            refused: Future[Label] = Future()
            refused.set_exception(refusal)
            return refused
        write_atomic(self._pending_file(name), _pending_text(frame, context).encode())
        return self.executor.submit(frame, priority=priority)

    def _adopt(self, frame: Frames, label: Label, context: dict[str, Any]) -> LabelledFrame:
        self._refuse_other_binary(label)
        if self.walker:
            context = context | {"walker": self.walker}
        number = self.store.write(LabelledFrame(frame, label, context))
        self._forget(label.frame_id)
        self.quarantine.release(frame)
        self._breaker.count(False)
        log.info("label %d at step %s (%s): %.1f s", number, context["step"], context["criterion"], label.seconds)
        return self.store.read(number)

    def _refuse_other_binary(self, label: Label) -> None:
        """One version of the code for all labels of the same settings, on whatever worker.

        What the driver's own oracle says of the version is in the fingerprint as far as it matters; here is what only the output says.
        Raises: EnvironmentProblem when it says another version than that of the first label.
        """
        if self.code and not label.code.startswith(f"{self.code} "):
            return
        self.store.refresh()  # other walkers' labels
        known = [*self.store.all(), *(self._beside.all() if self._beside else ())]
        others = (item.label for item in known if item.label.fingerprint == label.fingerprint)
        first = next((other for other in others if other.code != self.code), label)
        if first.code != label.code:
            raise EnvironmentProblem(
                f'a worker has computed label {label.frame_id} with "{label.code}", but the labels of this run come from "{first.code}", and '
                "the two cannot be mixed. Bring that binary back for all workers (the command, modules), remove "
                f"oracle/spool/done/{label.frame_id}.json from the run directory, and run the same command again; or start a new run with "
                "the other binary"
            )

    def _give_up(self, frame: Frames, context: dict[str, Any], error: OracleError) -> None:
        """Put a frame without a label aside; wrong settings of the oracle are not the frame's fault."""
        name = frame.content_id(self.fingerprint)
        self._forget(name)
        if isinstance(error, OracleConfigError):
            return
        self._breaker.count(True)
        if self.quarantine.refusal(frame) is None:
            log.warning("the frame of step %s is kept in %s", context["step"], self.quarantine.add(frame, name, context, error))

    def _forget(self, name: str) -> None:
        self._begun.pop(name, None)
        self._pending_file(name).unlink(missing_ok=True)

    def _pending_file(self, name: str) -> Path:
        return self.pending / f"{name}.json"


def _moment(context: dict[str, Any]) -> tuple[int, int]:
    return int(context["step"]), int(context["bead"])


def _pending_text(frame: Frames, context: dict[str, Any]) -> str:
    facts = {
        "frame": frame_to_facts(frame),
        "arrays": {k: v.tolist() for k, v in context.items() if isinstance(v, np.ndarray)},
        "scalars": {k: v for k, v in context.items() if not isinstance(v, np.ndarray)},
    }
    return json.dumps(facts)


def _read_pending(file: Path) -> tuple[Frames, dict[str, Any]]:
    try:
        facts = json.loads(file.read_text())
        arrays = {k: np.array(v, dtype=float) for k, v in facts["arrays"].items()}
        return frame_from_facts(facts["frame"]), facts["scalars"] | arrays
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EnvironmentProblem(
            f"{file} is no frame that waits for its label: {error}. Restore it, or remove it: a label of it that is still needed "
            "is asked again"
        ) from error
