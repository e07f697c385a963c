"""All labels of a run: one file each, numbered without gaps, never two of one frame."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np

from bnn_driver.errors import EnvironmentProblem
from bnn_driver.records import Array, Frames, LabelledFrame
from bnn_driver.store.files import folder_lock, remove_leftovers, write_atomic
from bnn_driver.store.labelfile import decode, encode

_log = logging.getLogger(__name__)
_NAME = re.compile(r"^(\d{6,})\.extxyz$")


class LabelStore:
    """The labels in `folder`, numbered from 0 in the order of their coming; several processes may hold it at once.

    Raises: EnvironmentProblem when the folder cannot be made or a label in it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"the label store {self.folder} cannot be made: {error}") from error
        remove_leftovers(self.folder)
        self._labels: dict[int, LabelledFrame] = {}
        self._number_of: dict[str, int] = {}
        self.refresh()

    def __len__(self) -> int:
        """Labels known since the last refresh or write."""
        return len(self._labels)

    def path(self, number: int) -> Path:
        """Where label `number` lies."""
        return self.folder / f"{number:06d}.extxyz"

    def write(self, item: LabelledFrame) -> int:
        """Store a label and return its number; a frame that has one already keeps it, and nothing is written.

        Raises: OracleInconsistent for NaN or wrong shapes, BnnError for an unfit context, EnvironmentProblem for a full disk.
        """
        content = encode(item)
        with folder_lock(self.folder, wait=True):
            self.refresh()
            known = self._number_of.get(item.label.frame_id)
            if known is not None:
                return known
            number = max(self._labels, default=-1) + 1
            write_atomic(self.path(number), content)
            self._keep(number, decode(content))
        return number

    def read(self, number: int) -> LabelledFrame:
        """Label `number`.  Raises: EnvironmentProblem when there is none or its file is damaged."""
        if number not in self._labels:
            self._keep(number, self._load(number))
        return self._labels[number]

    def all(self) -> list[LabelledFrame]:
        """Every label known since the last refresh or write, in order of number."""
        return [self._labels[number] for number in sorted(self._labels)]

    def refresh(self) -> int:
        """Read the labels that other processes have added; returns how many."""
        names = (_NAME.match(path.name) for path in self.folder.iterdir())
        new = sorted({int(match[1]) for match in names if match} - self._labels.keys())
        for number in new:
            self._keep(number, self._load(number))
        if new and len(self._labels) != max(self._labels) + 1:
            _log.warning(
                "%s: labels are missing, the highest number is %d of %d files", self.folder, max(self._labels), len(self)
            )
        return len(new)

    def find(self, frame: Frames, fingerprint: str, tolerance: float) -> LabelledFrame | None:
        """The label of the same level of theory whose structure is nearest, if within `tolerance`.

        Args: frame: B = 1.   tolerance: Å, bound on every |dr| and |dcell|; i-PI's RESTART keeps 9 digits of a position.
        """
        distances = (
            (distance(frame, item.frame), number)
            for number, item in self._labels.items()
            if item.label.fingerprint == fingerprint
        )
        nearest, number = min(distances, default=(np.inf, -1))
        return self._labels[number] if nearest < tolerance else None

    def export_extxyz(self, path: Path) -> int:
        """All labels in one file, as MACE trains on; returns how many."""
        numbers = sorted(self._labels)
        write_atomic(Path(path), b"".join(encode(self._labels[number]) for number in numbers))
        return len(numbers)

    def _keep(self, number: int, item: LabelledFrame) -> None:
        self._labels[number] = item
        self._number_of.setdefault(item.label.frame_id, number)

    def _load(self, number: int) -> LabelledFrame:
        path = self.path(number)
        try:
            return decode(path.read_bytes())
        except FileNotFoundError:
            raise EnvironmentProblem(f"there is no label {number} in {self.folder}; it holds {len(self)} labels") from None
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise EnvironmentProblem(
                f"{path} is no label: {error}. Restore it from a copy, or move it away: the frame is then labelled again."
            ) from error


def _comparable(a: Frames, b: Frames) -> bool:
    same = a.charge == b.charge and a.multiplicity == b.multiplicity and a.periodic == b.periodic
    return same and np.array_equal(a.numbers, b.numbers)


def distance(a: Frames, b: Frames) -> float:
    """Å, largest |dr| of an atom or |dcell| of a cell vector; infinite between frames of other atoms, charge, spin or kind."""
    if not _comparable(a, b):
        return np.inf
    largest = _longest(a.positions[0] - b.positions[0])
    if a.cell is not None and b.cell is not None:
        largest = max(largest, _longest(a.cell[0] - b.cell[0]))
    return largest


def _longest(vectors: Array) -> float:
    return float(np.sqrt((vectors**2).sum(axis=-1)).max(initial=0.0))
