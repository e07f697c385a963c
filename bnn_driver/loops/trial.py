"""One real label before the first one counts: the whole way through executor and spool, tested by finite differences."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from bnn_driver.config import Config
from bnn_driver.errors import OracleInconsistent
from bnn_driver.executors.pool import Pool
from bnn_driver.loops.consistency import Line, lines
from bnn_driver.loops.execution import make_executor
from bnn_driver.oracle import Oracle
from bnn_driver.records import Frames, Label, LabelledFrame, Prediction
from bnn_driver.store.run import RunDirectory

TELL_SECONDS = 30.0
"""How often a wait is spoken of."""
REMEDY = {
    "forces": (
        "Labels of which the energy does not belong to the forces cannot be learnt: take a denser integration grid or its response, a "
        "tighter SCF, or the energy that is consistent with the forces (the free energy at finite electronic temperature)"
    ),
    "stress": (
        "Labels of which the energy does not belong to the stress cannot be learnt: with plane waves raise the cutoff (the Pulay stress is "
        "the difference), elsewhere take a denser grid or a tighter SCF; or leave the stress out (stress = false)"
    ),
}


def label_trial(
    config: Config,
    options: dict[str, Any],
    base: Path,
    oracle: Oracle,
    frame: Frames,
    predicted: Prediction,
    run: Path,
    say: Callable[[str, str], None],
) -> LabelledFrame:
    """Label the start structure and displaced copies of it, and compare; returns the label with the facts that an update needs.

    Args: base: folder of the config file.   frame: B = 1.   predicted: of the foundation weights there.   run: directory of the run;
        the labels stay in its spool, scratch files in oracle/check.   say: hears of the findings.
    Raises: what the executor raises; OracleInconsistent.
    """
    # as the run's, but for a folder of scratch files of its own: a driver may be at work
    with make_executor(config, options, base, run / "oracle" / "check", RunDirectory.spool_of(run)) as executor:
        (label,) = _labels(executor, [frame], f"labelling the start structure with {oracle.code}")
        say("label", f"{label.energy:.4f} eV in {label.seconds:.3g} s ({label.evidence})")
        _compare(frame, label, predicted, say)
        found = lines(frame, label.forces, label.stress is not None, config.run.seed)
        displaced = _labels(
            executor,
            [line.at(s) for line in found for s in (-line.h, line.h)],
            f"labelling {2 * len(found)} displaced structures",
        )
    for k, line in enumerate(found):
        _judge(oracle, line, line.deviation(displaced[2 * k], label, displaced[2 * k + 1]), say)
    facts = {"audit": False, "foundation_energy": float(predicted.mean_energy[0]), "foundation_forces": predicted.mean_forces[0]}
    return LabelledFrame(frame, label, facts)


def _labels(executor: Pool, frames: Sequence[Frames], what: str) -> list[Label]:
    """All labels, with a word on standard error now and then."""
    begin = time.monotonic()
    _tell(f"{what} ...")
    futures = [executor.submit(frame) for frame in frames]
    waiting: set[Future[Label]] = set(futures)
    while waiting:
        _, waiting = wait(waiting, TELL_SECONDS)
        if waiting:
            _tell(f"... {len(futures) - len(waiting)} of {len(futures)} labels after {time.monotonic() - begin:.0f} s")
    return [future.result() for future in futures]


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _compare(frame: Frames, label: Label, predicted: Prediction, say: Callable[[str, str], None]) -> None:
    """The foundation model against the label."""
    error = np.linalg.norm(predicted.mean_forces[0] - label.forces, axis=1)
    worst = int(error.argmax())
    rms = float(np.sqrt(np.mean((predicted.mean_forces[0] - label.forces) ** 2)))
    say(
        "model",
        f"forces differ from the label's by {rms:.3g} eV/Å (rms of components; the label's are "
        f"{float(np.sqrt(np.mean(label.forces**2))):.3g}), most on atom {worst} ({chemical_symbols[frame.numbers[worst]]}): "
        f"{error[worst]:.3g} eV/Å",
    )
    offset = float(predicted.mean_energy[0]) - label.energy
    say("offset", f"{offset:+.4f} eV, E_model - E_oracle here; the run fits it at its first label and adds it to every one")


def _judge(oracle: Oracle, line: Line, deviation: float, say: Callable[[str, str], None]) -> None:
    text = f"{deviation:.2g} {line.unit} (allowed {line.tolerance:g})"
    say("differences", f"energies against {line.what} along {line.path}: {text}")
    if not deviation <= line.tolerance:
        raise OracleInconsistent(
            f"{oracle.code}: energies and {line.what} do not belong together: from the start structure along {line.path} they differ by {text}. "
            f"{REMEDY[line.what]}"
        )
