"""What may be sent to i-PI: every reply is checked first, because i-PI checks nothing.

A NaN runs through i-PI to the end of the trajectory with exit code 0; a wrong shape, an extras text that is no JSON object or
the key "raw" kills its polling thread and it waits for ever; keys that differ between beads end it with a KeyError.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from scipy.spatial import cKDTree

from bnn_driver.errors import BnnError, GuardStop
from bnn_driver.records import Array

FORBIDDEN_KEYS = frozenset({"raw", "pot", "force", "virial", "uncertainty"})  # "raw": i-PI itself; the others: its committees


@dataclass(frozen=True, eq=False)
class Request:
    """Distinct structures whose forces are wanted."""

    positions: Array
    """(B, A, 3) Å."""
    cell: Array
    """(B, 3, 3) Å, vectors in rows; i-PI sends one for molecules too."""
    parameters: str
    """Text of INIT, " key : value , ..." from <parameters> of the i-PI input."""
    rows: int
    """Structures that i-PI asked for, repeated ones counted."""
    padding: int
    """How many of the rows at the end repeat the last structure, as i-PI pads a short batch."""


@dataclass(frozen=True, eq=False)
class Reply:
    """Results of a Request, in its order."""

    energy: Array
    """(B,) eV."""
    forces: Array
    """(B, A, 3) eV/Å."""
    virial: Array
    """(B, 3, 3) eV, W = Σ f⊗r = -dU/dε (i-PI's sign, not divided by the volume)."""
    extras: Sequence[str]
    """One JSON object per structure, numbers in atomic units, at most 2-D, the same keys for the whole run."""


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # made once: making it takes longer than a small text


class ReplyCheck:
    """Refuses a reply that would spoil or hang i-PI; remembers the keys of the extras."""

    def __init__(self) -> None:
        self._keys: frozenset[str] | None = None

    def __call__(self, request: Request, reply: Reply) -> Reply:
        """The reply with float64 arrays.

        Raises: GuardStop for a value that is not finite; BnnError for wrong shapes or extras.
        """
        count, atoms = request.positions.shape[:2]
        shapes = {"energy": (count,), "forces": (count, atoms, 3), "virial": (count, 3, 3)}
        arrays = {name: np.asarray(getattr(reply, name), np.float64) for name in shapes}
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                raise BnnError(f"expected {name} of shape {shape} for i-PI but got {arrays[name].shape}; nothing was sent")
            if not np.isfinite(arrays[name]).all():
                _refuse_value(name, arrays[name], request)
        if len(reply.extras) != count:
            raise BnnError(f"expected {count} texts of extras for i-PI but got {len(reply.extras)}; nothing was sent")
        for text in reply.extras:
            self._check_extras(text)
        return Reply(extras=reply.extras, **arrays)

    def _check_extras(self, text: str) -> None:
        try:
            values = DECODER.decode(text)
        except (TypeError, ValueError) as error:
            raise BnnError(f"extras for i-PI must be strict JSON: {error}; got {text[:200]!r}") from error
        if not isinstance(values, dict):
            raise BnnError(
                f"extras for i-PI must be a JSON object, not {type(values).__name__}: i-PI would hang; got {text[:200]!r}"
            )
        keys = frozenset(values)
        if keys & FORBIDDEN_KEYS:
            raise BnnError(f"extras for i-PI must not have the keys {sorted(keys & FORBIDDEN_KEYS)}: i-PI uses them itself")
        if self._keys is None:
            self._keys = keys
        if keys != self._keys:
            raise BnnError(
                f"the keys of the extras changed: {sorted(keys ^ self._keys)} are not in all replies of this run; "
                "i-PI ends with a KeyError when beads differ: send every key always"
            )
        for key, value in values.items():
            if not _printable(value):
                raise BnnError(
                    f"extras[{key!r}] for i-PI must be a scalar, a list, or a list of lists of equal length; flatten it"
                )


def _refuse_value(name: str, values: Array, request: Request) -> NoReturn:
    index = np.argwhere(~np.isfinite(values))[0]
    where = f"structure {index[0]}" + (f", atom {index[1]}" if name == "forces" else "")
    positions = request.positions[index[0]]
    # a tree, because all pairs of 20,000 atoms would take 10 GB; absurd positions may be infinitely far apart
    with np.errstate(over="ignore", invalid="ignore"):
        shortest = cKDTree(positions).query(positions, k=2)[0][:, 1].min()
    raise GuardStop(
        f"{name} of {where} is {values[tuple(index)]}: not sent, because i-PI would carry it through the whole trajectory. "
        f"The shortest distance there is {shortest:.3f} Å; go on from the last checkpoint with a shorter timestep"
    )


def _printable(value: Any) -> bool:
    """Whether i-PI can write it as an output: at most 2-D and not ragged."""
    if not isinstance(value, list):
        return not isinstance(value, dict)
    rows = [item for item in value if isinstance(item, list)]
    if not rows:
        return not any(isinstance(item, dict) for item in value)
    return (
        len(rows) == len(value) and len({len(row) for row in rows}) == 1 and not any(isinstance(x, list | dict) for x in rows[0])
    )
