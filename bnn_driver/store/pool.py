"""Labelled frames in files of any size: read through once and checked, then looked up where they lie.

Only an index is held in memory (place, kind of atoms and energy of every frame).  Keys are those that were asked for.  What the
files cannot be used for is said before any work is spent: labels that are missing or not finite, one structure with two labels,
energies of one composition that lie as far apart as those of two codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from bnn_driver.errors import ConfigError
from bnn_driver.records import Array, Frames
from bnn_driver.store.xyz import RawFrame, block_at, blocks, parse

GAP = 10.0
"""eV per atom: no two frames of one composition that anybody would learn together have energies so far apart with nothing between."""
GROUP_GAP, GROUP = 0.5, 5
"""eV per atom, and frames: nor have groups of at least so many, each within less than half the gap.  Isomers are nearer to each
other; the same frames with another functional or basis set are not."""
SAME = 1e-3
"""eV, and eV/Å for forces: labels of the same structure that differ by more are of different levels of theory."""
_LEVEL = "fingerprint"
"""What the program's own label files say of the level of theory."""


@dataclass(frozen=True)
class Keys:
    """What stands where in the files; an empty name: not there."""

    energy: str
    forces: str
    stress: str = ""
    charge: str = ""
    multiplicity: str = ""
    level: str = ""
    default_charge: int = 0
    default_multiplicity: int = 1
    section: str = "pool"
    """Of the config, for messages."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some frames of the same atoms."""

    index: Array
    """(B,) int, their numbers in the pool."""
    frames: Frames


@dataclass(frozen=True, eq=False)
class LabelledBatch(Batch):
    """The same with their labels."""

    energy: Array
    """(B,) eV."""
    forces: Array
    """(B, A, 3) eV/Å."""
    stress: Array | None
    """(B, 3, 3) eV/Å^3 with ASE's sign, where there is a key for it."""


@dataclass(frozen=True, eq=False)
class _Labels:
    """Of one frame."""

    frame: Frames
    energy: float
    forces: Array
    stress: Array | None


@dataclass(eq=False)
class Pool:
    """Frames of one or several files, numbered through.

    Raises: ConfigError for everything above, naming file, line and what was found instead.
    """

    files: tuple[Path, ...]
    keys: Keys
    first: list[int] = field(default_factory=list, init=False)
    """Number of the first frame of each file, and at the end the number of frames."""
    checksums: list[str] = field(default_factory=list, init=False)
    """SHA-256 of each file."""
    energy: Array = field(init=False)
    """(N,) eV."""
    kind: Array = field(init=False)
    """(N,) int: frames of one kind have the same atoms in the same order, charge, multiplicity and periodicity."""
    kinds: list[tuple[Any, ...]] = field(default_factory=list, init=False)
    """Atomic numbers, periodic, charge, multiplicity of each kind."""
    level: str = field(default="", init=False)
    """What the frames say of their level of theory; empty where they say nothing."""

    def __post_init__(self) -> None:
        check = _Check()
        places: list[tuple[int, int, int]] = []
        energies: list[float] = []
        kind_of: dict[tuple[Any, ...], int] = {}
        kinds: list[int] = []
        for number, file in enumerate(self.files):
            self.first.append(len(places))
            digest = hashlib.sha256()
            for offset, line, lines in blocks(file):
                digest.update(b"".join(lines))
                raw = parse(lines, f"{file}, frame {len(places) - self.first[-1]} (line {line})")
                found = _labels(raw, self.keys)
                check.level(raw, self.keys)
                check.twins(found, raw.where)
                frame = found.frame
                kind = tuple(frame.numbers.tolist()), frame.periodic, frame.charge, frame.multiplicity
                kinds.append(kind_of.setdefault(kind, len(kind_of)))
                places.append((number, offset, line))
                energies.append(found.energy)
            if len(places) == self.first[-1]:
                raise ConfigError(f"{file} holds no frame")
            self.checksums.append(digest.hexdigest())
        self.first.append(len(places))
        self._places, self.energy = np.array(places, dtype=np.int64), np.array(energies)
        self.kind, self.kinds = np.array(kinds), list(kind_of)
        self.level = next(iter(check.levels), "")
        self._check_gaps()

    def __len__(self) -> int:
        return len(self.energy)

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers of all frames, rising."""
        return tuple(sorted({z for kind in self.kinds for z in kind[0]}))

    def atoms(self) -> Array:
        """(N, Z) numbers of atoms of each of the `elements`."""
        per_kind = np.array([[kind[0].count(z) for z in self.elements] for kind in self.kinds])
        return per_kind[self.kind]

    def where(self, index: int) -> str:
        """File and number in it of a frame."""
        file = int(self._places[index, 0])
        return f"{self.files[file]}, frame {index - self.first[file]} (line {self._places[index, 2]})"

    def first_with(self, element: int) -> int:
        """Number of the first frame that has this element."""
        return int(np.argmax(np.array([element in kind[0] for kind in self.kinds])[self.kind]))

    def of_file(self, number: int) -> Array:
        """Numbers of the frames of one file."""
        return np.arange(self.first[number], self.first[number + 1])

    def batches(self, index: Sequence[int] | Array, atoms: int = 2000) -> Iterator[LabelledBatch]:
        """These frames, those of one kind together, in batches of about so many atoms."""
        wanted = np.asarray(index, dtype=np.int64)
        for kind in np.unique(self.kind[wanted]):
            rows = wanted[self.kind[wanted] == kind]
            size = max(1, atoms // len(self.kinds[kind][0]))
            for begin in range(0, len(rows), size):
                yield self._batch(rows[begin : begin + size])

    def one(self, index: int) -> LabelledBatch:
        """One frame."""
        return self._batch(np.array([index]))

    def _batch(self, rows: Array) -> LabelledBatch:
        items = [_labels(raw, self.keys) for raw in self._read(rows)]
        head = items[0].frame
        cells = [item.frame.cell for item in items if item.frame.cell is not None]
        frames = Frames(
            head.numbers,
            np.concatenate([item.frame.positions for item in items]),
            np.concatenate(cells) if cells else None,
            head.charge,
            head.multiplicity,
        )
        stresses = [item.stress for item in items if item.stress is not None]
        return LabelledBatch(
            rows,
            frames,
            np.array([item.energy for item in items]),
            np.array([item.forces for item in items]),
            np.array(stresses) if stresses else None,
        )

    def _read(self, rows: Array) -> Iterator[RawFrame]:
        streams = {number: self.files[number].open("rb") for number in np.unique(self._places[rows, 0]).tolist()}
        try:
            for row in rows.tolist():
                number, offset, _ = self._places[row].tolist()
                yield parse(block_at(streams[number], offset, self.where(row)), self.where(row))
        finally:
            for stream in streams.values():
                stream.close()

    def _check_gaps(self) -> None:
        """Energies of one composition in two groups that are too far apart for one level of theory, unless the frames name theirs."""
        if self.keys.level:
            return
        atoms, counts = np.unique(self.atoms(), axis=0, return_inverse=True)
        for number, row in enumerate(atoms):
            members = np.flatnonzero(counts.ravel() == number)
            order = members[np.argsort(self.energy[members])]
            gaps = np.diff(self.energy[order])
            if gaps.size and _is_of_two_levels(self.energy[order], gaps, int(row.sum())):
                low, high = order[int(gaps.argmax())], order[int(gaps.argmax()) + 1]
                raise ConfigError(
                    f"the energies of one composition lie {gaps.max():.4g} eV apart with none between: {self.energy[low]:.6g} eV in "
                    f"{self.where(int(low))}, {self.energy[high]:.6g} eV in {self.where(int(high))}. Two levels of theory (or "
                    "codes) do not mix; keep one of them in the pool. If they are of one level, let "
                    f"[{self.keys.section}] level_key name what says so"
                )


def _is_of_two_levels(energy: Array, gaps: Array, atoms: int) -> bool:
    """Args: energy: (N,) eV, rising, of one composition.   gaps: (N - 1,) eV between them."""
    cuts = np.flatnonzero(gaps > GROUP_GAP * atoms)
    parts = np.split(energy, cuts + 1)
    is_group = [len(part) >= GROUP for part in parts]
    width = max((np.ptp(part) for part, group in zip(parts, is_group, strict=True) if group), default=0.0)
    apart = any(any(is_group[: k + 1]) and any(is_group[k + 1 :]) and gaps[cut] > 2 * width for k, cut in enumerate(cuts))
    return bool(gaps.max() > GAP * atoms or apart)


@dataclass
class _Check:
    """What is known of the frames read so far."""

    levels: dict[str, str] = field(default_factory=dict)
    seen: dict[bytes, tuple[float, float, str]] = field(default_factory=dict)

    def level(self, raw: RawFrame, keys: Keys) -> None:
        """All frames must say the same level of theory, or none may say one."""
        name = keys.level or _LEVEL
        if keys.level and name not in raw.info:
            raise ConfigError(
                f"{raw.where}: there is no {name!r} ([{keys.section}] level_key); found are {', '.join(sorted(raw.info)) or 'none'}"
            )
        self.levels.setdefault(str(raw.info.get(name, "")), raw.where)
        if len(self.levels) > 1:
            found = "; ".join(f"{value[:40] or 'nothing said'} in {where}" for value, where in self.levels.items())
            raise ConfigError(f"the pool mixes levels of theory ({name}): {found}. Keep one of them in the pool")

    def twins(self, item: _Labels, where: str) -> None:
        """The same structure must not have two different labels."""
        now = item.energy, float(np.sqrt(np.mean(item.forces**2)))
        *before, first = self.seen.setdefault(bytes.fromhex(item.frame.content_id("")), (*now, where))
        for name, unit, a, b in zip(("energy", "rms force"), ("eV", "eV/Å"), now, before, strict=True):
            if abs(a - b) > SAME:
                raise ConfigError(
                    f"the structure of {where} is that of {first}, but its {name} is {a:.6f} {unit}, there {b:.6f}. Two levels of theory "
                    "do not mix; keep one of them in the pool"
                )


def _labels(raw: RawFrame, keys: Keys) -> _Labels:
    """The labels under the keys that were asked for.  Raises: ConfigError with the candidates when one is missing."""
    energy = _wanted(raw.info, keys.energy, "energy_key", raw, raw.scalars(), keys.section)
    forces = _wanted(raw.columns, keys.forces, "forces_key", raw, raw.vectors(), keys.section)
    if keys.energy not in raw.scalars():
        raise ConfigError(f"{raw.where}: {keys.energy} is {energy!r}, not a number; single numbers are {_listed(raw.scalars())}")
    if keys.forces not in raw.vectors():
        raise ConfigError(
            f"{raw.where}: {keys.forces} has the shape {forces.shape}; columns of three are {_listed(raw.vectors())}"
        )
    stress = (
        _stress(_wanted(raw.info, keys.stress, "stress_key", raw, sorted(raw.info), keys.section), raw) if keys.stress else None
    )
    for name, values in (("positions", raw.positions), (keys.energy, energy), (keys.forces, forces), (keys.stress, stress)):
        if values is not None and not np.isfinite(values).all():
            raise ConfigError(f"{raw.where}: {name} is not finite; remove the frame")
    charge = _integer(raw, keys.charge, "charge", keys.default_charge, keys.section)
    multiplicity = _integer(raw, keys.multiplicity, "multiplicity", keys.default_multiplicity, keys.section)
    frame = Frames(raw.numbers, raw.positions[None], None if raw.cell is None else raw.cell[None], charge, multiplicity)
    return _Labels(frame, float(energy), np.asarray(forces, dtype=float), stress)


def _wanted(found: Mapping[str, Any], name: str, key: str, raw: RawFrame, candidates: list[str], section: str) -> Any:
    if not name:
        raise ConfigError(f"[{section}] {key} is missing and is not guessed; in {raw.where} there are: {_listed(candidates)}")
    if name not in found:
        raise ConfigError(
            f"{raw.where}: there is no {name!r} ([{section}] {key}), so the frame has no such label; there are: {_listed(candidates)}"
        )
    return found[name]


def _integer(raw: RawFrame, key: str, name: str, default: int, section: str) -> int:
    """Charge or multiplicity of a frame; one that is there under its plain name and contradicts what would be used is refused."""
    used = key or name
    if key and key not in raw.info:
        raise ConfigError(f"{raw.where}: there is no {key!r} ([{section}] {name}_key); found are {_listed(sorted(raw.info))}")
    value = raw.info.get(used, default)
    if not isinstance(value, (int, float, np.number)) or not float(value).is_integer():
        raise ConfigError(f"{raw.where}: {used} is {value!s}, expected an integer")
    if name == "multiplicity" and value < 1:
        raise ConfigError(f"{raw.where}: {used} is {value!s}, expected 2 S + 1, at least 1")
    if not key and int(value) != default:
        raise ConfigError(
            f"{raw.where}: {name} is {int(value)}, but [system] {name} is {default}; write [{section}] {name}_key = {name!r} to take the "
            "frame's, or correct [system]"
        )
    return int(value)


def _stress(value: Any, raw: RawFrame) -> Array:
    try:
        flat = np.asarray(value, dtype=float).ravel()
    except ValueError:
        raise ConfigError(f"{raw.where}: the stress is {value!r}, expected numbers") from None
    if flat.size == 6:
        xx, yy, zz, yz, xz, xy = flat
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    if flat.size != 9:
        raise ConfigError(f"{raw.where}: the stress has {flat.size} numbers, expected 9, or 6 (xx yy zz yz xz xy)")
    return flat.reshape(3, 3)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def formula(numbers: Sequence[int]) -> str:
    """Such as H5O2, elements by atomic number."""
    return "".join(f"{chemical_symbols[z]}{list(numbers).count(z)}" for z in sorted(set(numbers)))
