"""What is known before an exploration begins: frames that the same oracle labelled, of these or of other atoms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnn_driver.errors import ConfigError
from bnn_driver.explore_config import ExploreConfig
from bnn_driver.records import Array, Label, LabelledFrame
from bnn_driver.store.pool import Keys, Pool


@dataclass(frozen=True, eq=False)
class Known:
    """A pool whose labels are of the level of theory of the run."""

    pool: Pool
    fingerprint: str
    """Of the oracle."""

    def labels(self) -> list[LabelledFrame]:
        """All frames as labels of the run."""
        return [pooled_label(self.pool, i, self.fingerprint, "known", {}) for i in range(len(self.pool))]


def read_known(config: ExploreConfig, base: Path, fingerprint: str) -> Known | None:
    """The frames of [explore] known.

    Args: base: folder of the config file.   fingerprint: of the oracle.
    Raises: ConfigError for a file that is no pool of labels, or one whose level of theory is another or is not stated.
    """
    e, system = config.explore, config.system
    if not e.known:
        return None
    keys = Keys(
        e.energy_key, e.forces_key, e.stress_key, e.charge_key, e.multiplicity_key, e.level_key, system.charge, system.multiplicity,
        "explore",
    )  # fmt: skip
    pool = Pool((base / e.known,), keys)
    says_itself = bool(pool.level) and not e.level_key
    if says_itself and pool.level != fingerprint:
        raise ConfigError(
            f"{base / e.known} was labelled with other settings (fingerprint {pool.level[:12]}) than those of [oracle] ({fingerprint[:12]}). "
            "Two levels of theory do not mix; label these frames anew, or restore the settings"
        )
    if not says_itself and not e.same_level:
        raise ConfigError(
            f"{base / e.known} does not say by which settings its labels were computed. Labels of another level of theory than that of "
            "[oracle] spoil the weights; where they are of the same, say so: [explore] same_level = true"
        )
    return Known(pool, fingerprint)


def pooled_label(pool: Pool, index: int, fingerprint: str, criterion: str, facts: Mapping[str, object]) -> LabelledFrame:
    """A frame of a pool as a label of a run.  Args: fingerprint: of its level of theory.   facts: further ones of its context."""
    one = pool.one(index)
    stress = None if one.stress is None or not one.frames.periodic else one.stress[0]
    name = one.frames.content_id(fingerprint)
    label = Label(float(one.energy[0]), one.forces[0], stress, "pool", fingerprint, name, "given")
    context = {"frame": index, "bead": 0, "criterion": criterion, "audit": False, **facts}
    return LabelledFrame(one.frames, label, context)


@dataclass(frozen=True, eq=False)
class Constants:
    """What is added to the labels' energies, per atom of each element, to have them on the model's scale."""

    elements: tuple[int, ...]
    values: Array
    """(Z,) eV."""

    @classmethod
    def fitted(cls, elements: Sequence[int], atoms: Array, difference: Array) -> Constants:
        """By least squares, the smallest ones where several do.

        Args: atoms: (N, Z) numbers of atoms of each element.   difference: (N,) eV, energy of the model minus that of the label.
        """
        return cls(tuple(elements), np.linalg.lstsq(atoms.astype(float), difference, rcond=None)[0])

    def of(self, numbers: Array) -> float:
        """eV, for these atoms."""
        return float(count(self.elements, numbers) @ self.values)


def count(elements: Sequence[int], numbers: Array) -> Array:
    """(Z,) how many atoms there are of each element."""
    return np.array([int(np.sum(numbers == z)) for z in elements])


def fixes(atoms: Array, row: Array) -> bool:
    """Whether constants that these compositions fix are fixed for another one too.  Args: atoms: (N, Z).   row: (Z,)."""
    return len(atoms) > 0 and int(np.linalg.matrix_rank(np.vstack([atoms, row]))) == int(np.linalg.matrix_rank(atoms))
