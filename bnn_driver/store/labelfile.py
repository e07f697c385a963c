"""One labelled frame as extended XYZ that ASE and MACE read and that gives back every bit."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from bnn_driver.errors import BnnError, OracleInconsistent
from bnn_driver.records import Array, Frames, Label, LabelledFrame
from bnn_driver.store.files import plain

_LABEL_FACTS = tuple(f.name for f in fields(Label) if f.name not in ("energy", "forces", "stress"))
_RESERVED = {"Lattice", "Properties", "pbc", "REF_energy", "REF_forces", "REF_stress", "charge", "multiplicity", *_LABEL_FACTS}
_RESERVED |= {"species", "pos"}
_KEY = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_PAIR = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)=("(?:\\.|[^"\\])*"|\S+)\s*')
_JSON = "_JSON "


def encode(item: LabelledFrame) -> bytes:
    """Extended XYZ of one labelled frame; floats as the shortest text that reads back to the same bits.

    REF_energy eV, REF_forces eV/Å, REF_stress eV/Å^3 (row by row); info: the facts of the label, charge, multiplicity and the
    context; context arrays with A rows are columns.

    Raises: OracleInconsistent for a label with NaN or wrong shapes, BnnError for a context that cannot be stored.
    """
    frame, label = item.frame, item.label
    _check(frame, label)
    atoms = len(frame.numbers)
    columns = {"REF_forces": np.asarray(label.forces, dtype=np.float64)}
    info: dict[str, str] = {"REF_energy": _scalar(float(label.energy))}
    if label.stress is not None:
        info["REF_stress"] = f'"{_floats(label.stress)}"'
    info |= {name: _scalar(getattr(label, name)) for name in _LABEL_FACTS}
    info |= {"charge": _scalar(frame.charge), "multiplicity": _scalar(frame.multiplicity)}
    for key, value in item.context.items():
        if key in _RESERVED or not _KEY.match(key):
            raise BnnError(
                f"{key!r} cannot name a fact of the context: expected a word of letters, digits and _ that is not taken"
            )
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.shape in ((atoms,), (atoms, 3)):
            columns[key] = value
        else:
            info[key] = _scalar(value)
    lattice = f'Lattice="{_floats(frame.cell)}" ' if frame.cell is not None else ""
    properties = "species:S:1:pos:R:3" + "".join(f":{key}:R:{1 if x.ndim == 1 else 3}" for key, x in columns.items())
    comment = f'{lattice}Properties={properties} pbc="{"T T T" if frame.periodic else "F F F"}" '
    comment += " ".join(f"{key}={value}" for key, value in info.items())
    table = np.column_stack([frame.positions[0], *columns.values()])
    rows = [f"{chemical_symbols[z]} {_floats(row)}" for z, row in zip(frame.numbers, table, strict=True)]
    return ("\n".join([str(atoms), comment, *rows]) + "\n").encode()


def decode(content: bytes) -> LabelledFrame:
    """What `encode` wrote, bit by bit.  Raises: ValueError saying what is wrong with the text."""
    lines = content.decode("utf-8").split("\n")
    if len(lines) < 3 or lines[-1] != "" or not lines[0].strip().isdigit() or len(lines) != int(lines[0]) + 3:
        raise ValueError("the file is cut short or its first line is not the number of atoms")
    info = _parse_comment(lines[1])
    raw = {key: info.pop(key) for key in tuple(info) if key in _RESERVED}
    if missing := {"Properties", "REF_energy", "charge", "multiplicity", *_LABEL_FACTS} - raw.keys():
        raise ValueError(f"missing in the comment line: {', '.join(sorted(missing))}")
    words = [line.split() for line in lines[2:-1]]
    numbers = np.array([atomic_numbers[row[0]] for row in words], dtype=np.int64)
    table = np.array([[float(x) for x in row[1:]] for row in words])
    columns = _columns(raw["Properties"], table)
    frame = Frames(
        numbers=numbers,
        positions=columns.pop("pos")[None],
        cell=_matrix(raw["Lattice"])[None] if "Lattice" in raw else None,
        charge=raw["charge"],
        multiplicity=raw["multiplicity"],
    )
    label = Label(
        energy=raw["REF_energy"],
        forces=columns.pop("REF_forces"),
        stress=_matrix(raw["REF_stress"]) if "REF_stress" in raw else None,
        **{name: raw[name] for name in _LABEL_FACTS},
    )
    return LabelledFrame(frame, label, info | columns)


def _check(frame: Frames, label: Label) -> None:
    shape = (len(frame.numbers), 3)
    if len(frame) != 1 or label.forces.shape != shape:
        raise OracleInconsistent(
            f"{label.code} gave forces of shape {label.forces.shape} for {len(frame)} frames, expected {shape} for one frame; "
            f"label {label.frame_id} is not stored"
        )
    parts: dict[str, Any] = {
        "energy": label.energy,
        "forces": label.forces,
        "stress": label.stress,
        "positions": frame.positions,
        "cell": frame.cell,
    }
    bad = [name for name, value in parts.items() if value is not None and not np.all(np.isfinite(value))]
    if bad:
        raise OracleInconsistent(f"{label.code}: {', '.join(bad)} of label {label.frame_id} is not finite; it is not stored")


def _floats(array: Array) -> str:
    return " ".join(repr(x) for x in np.asarray(array, dtype=np.float64).ravel().tolist())


def _scalar(value: Any) -> str:
    """Text from which ASE and `_parse_value` make the same value; floats by repr, other things as JSON."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "T" if value else "F"
    if isinstance(value, (int, float)):
        return repr(value)
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or value.startswith(_JSON):
        if isinstance(value, np.ndarray):
            value = {"__ndarray__": [list(value.shape), value.dtype.str, value.ravel().tolist()]}
        value = _JSON + json.dumps(plain(value))
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _parse_comment(line: str) -> dict[str, Any]:
    info: dict[str, Any] = {}
    position = 0
    while position < len(line):
        match = _PAIR.match(line, position)
        if match is None:
            raise ValueError(f"the comment line is unreadable from {line[position : position + 40]!r}")
        info[match[1]] = match[2] if match[1] == "Properties" else _parse_value(match[2])
        position = match.end()
    return info


def _parse_value(text: str) -> Any:
    if not text.startswith('"'):
        if text in ("T", "F"):
            return text == "T"
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    value = re.sub(r"\\(.)", r"\1", text[1:-1])
    if not value.startswith(_JSON):
        return value
    data = json.loads(value.removeprefix(_JSON))
    if isinstance(data, dict) and data.keys() == {"__ndarray__"}:
        shape, dtype, flat = data["__ndarray__"]
        return np.array(flat, dtype=dtype).reshape(shape)
    return data


def _columns(properties: str, table: Array) -> dict[str, Array]:
    parts = properties.split(":")
    widths = {name: int(width) for name, width in zip(parts[3::3], parts[5::3], strict=True)}
    if table.shape[1] != sum(widths.values()):
        raise ValueError(f"{table.shape[1]} numbers in a row, expected {sum(widths.values())} for {properties}")
    columns: dict[str, Array] = {}
    start = 0
    for name, width in widths.items():
        block = table[:, start : start + width]
        columns[name] = np.ascontiguousarray(block[:, 0] if width == 1 else block)
        start += width
    return columns


def _matrix(text: str) -> Array:
    return np.array([float(x) for x in text.split()]).reshape(3, 3)
