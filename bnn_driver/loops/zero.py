"""The zero of energy of an exploration: constants between the energies of labels and those of the model, fitted once and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnn_driver.loops.known import Constants, Known, count, fixes
from bnn_driver.records import Array, Frames, LabelledFrame
from bnn_driver.store.files import read_json, write_json


@dataclass(frozen=True, eq=False)
class Zero:
    """Labels on the model's scale."""

    folder: Path
    """Of known.json (constants of what is known before) and constants.json (of the system)."""
    elements: tuple[int, ...]
    """Of the system and of what is known, rising."""
    numbers: Array
    """(A,) atomic numbers of the system."""
    known: Known | None
    foundation_energy: Callable[[Frames], Array]
    """(B,) eV, of the untouched foundation potential."""

    def known_labels(self) -> list[LabelledFrame]:
        """What is known before, on the model's scale."""
        if self.known is None:
            return []
        labels = self.known.labels()
        if not (self.folder / "known.json").exists():
            energies = [self.foundation_energy(item.frame)[0] - item.label.energy for item in labels]
            self._keep("known", Constants.fitted(self.elements, self._atoms(labels), np.array(energies)))
        return _shifted(labels, self._read("known"))

    def fix(self, first: list[LabelledFrame]) -> None:
        """Fit the constants of the system by its first labels, unless what is known fixes them for these atoms too."""
        if (self.folder / "constants.json").exists():
            return
        known = [] if self.known is None else self.known.labels()
        atoms, row = self._atoms(known), count(self.elements, self.numbers)
        if known and fixes(atoms, row):
            self._keep("constants", self._read("known"))
            return
        before = self._read("known").values if known else np.zeros(len(row))
        difference = [*(atoms @ before), *(item.context["predicted_energy"] - item.label.energy for item in first)]
        both = np.vstack([atoms, *([row] * len(first))])
        self._keep("constants", Constants.fitted(self.elements, both, np.array(difference)))

    def constants(self) -> Constants:
        """Of the system; only after `fix`."""
        return self._read("constants")

    def shifted(self, labels: list[LabelledFrame]) -> list[LabelledFrame]:
        """Labels of the system on the model's scale."""
        return _shifted(labels, self.constants()) if labels else []

    def _atoms(self, labels: list[LabelledFrame]) -> Array:
        """(N, Z)"""
        return np.array([count(self.elements, item.frame.numbers) for item in labels]).reshape(-1, len(self.elements))

    def _keep(self, name: str, found: Constants) -> None:
        facts = {"elements": found.elements, "constants": found.values}
        write_json(self.folder / f"{name}.json", facts)

    def _read(self, name: str) -> Constants:
        facts = read_json(self.folder / f"{name}.json")
        return Constants(tuple(facts["elements"]), np.array(facts["constants"]))


def _shifted(labels: list[LabelledFrame], constants: Constants) -> list[LabelledFrame]:
    """With the offset that `chain_update.own_offset` reads."""
    return [
        LabelledFrame(item.frame, item.label, item.context | {"energy_offset": constants.of(item.frame.numbers)})
        for item in labels
    ]
