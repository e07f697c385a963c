"""What goes back to i-PI, and what stays with a label: what was believed before it came."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnn_driver import units
from bnn_driver.ipi.client import Reply
from bnn_driver.records import Decision, Frames, LabelledFrame, Prediction


def belief(prediction: Prediction, foundation: Prediction, b: int) -> dict[str, Any]:
    """Facts of a label's context: what was predicted of frame b.  Args: foundation: of frame b alone."""
    return {
        "predicted_energy": float(np.nan_to_num(prediction.mean_energy[b])),
        "energy_predictive_sd": float(np.nan_to_num(prediction.energy_predictive_sd[b])),
        "foundation_energy": float(foundation.mean_energy[0]),
        "predicted_forces": np.nan_to_num(prediction.mean_forces[b]),
        "force_predictive_sd": np.nan_to_num(prediction.force_predictive_sd[b]),
        "foundation_forces": foundation.mean_forces[0],
    }


def make_reply(
    prediction: Prediction,
    decisions: Sequence[Decision],
    labelled: Mapping[int, LabelledFrame],
    frames: Frames,
    offset: float,
    extras: str,
) -> Reply:
    """The reply to B frames.

    Args: labelled: index -> label of the frames that are served by the oracle.   offset: eV, added to every oracle energy.
        extras: "scalars", "energy" or "forces", as [output] extras.
    """
    energy, forces, virial = prediction.mean_energy.copy(), prediction.mean_forces.copy(), prediction.mean_virial.copy()
    for b, answer in labelled.items():
        energy[b] = answer.label.energy + offset
        forces[b] = answer.label.forces
        virial[b] = label_virial(answer, frames[b], prediction.mean_virial[b])
    texts = [
        json.dumps(_extras(prediction, decision, b, energy[b], forces[b], virial[b], b in labelled, extras))
        for b, decision in enumerate(decisions)
    ]
    return Reply(energy, forces, virial, texts)


def _extras(
    prediction: Prediction, decision: Decision, b: int, energy: float, forces: Any, virial: Any, from_oracle: bool, kind: str
) -> dict[str, Any]:
    """Atomic units, as i-PI expects of extras; members are shifted so that their plain mean is what is served."""
    extras: dict[str, Any] = {
        "bnn_energy_sd": decision.energy_predictive_sd / units.HARTREE,
        "bnn_probability": decision.probability,
        "bnn_generation": prediction.generation,
        "bnn_source": int(from_oracle),
    }
    if kind in ("energy", "forces"):
        members = prediction.energy[:, b] - prediction.energy[:, b].mean() + energy
        extras["committee_pot"] = (members / units.HARTREE).tolist()
    if kind == "forces":
        f = prediction.forces[:, b] - prediction.mean_forces[b] + forces
        w = prediction.virial[:, b] - prediction.mean_virial[b] + virial
        extras["committee_force"] = (f.reshape(len(f), -1) / units.HARTREE_PER_BOHR).tolist()
        extras["committee_virial"] = (w.reshape(len(w), 9) / units.HARTREE).tolist()
    return extras


def label_virial(answer: LabelledFrame, frame: Frames, predicted: np.ndarray) -> np.ndarray:
    """(3, 3) eV of a label; `predicted` stands in when a periodic oracle gives no stress.

    For a molecule it is Σ f⊗(r - r̄): the forces add up to zero but for the noise of the code, which must not act on the cell.
    """
    if frame.cell is None:
        return answer.label.forces.T @ (frame.positions[0] - frame.positions[0].mean(axis=0))
    if answer.label.stress is None:
        return predicted
    return units.virial_from_stress(answer.label.stress, frame.cell[0])
