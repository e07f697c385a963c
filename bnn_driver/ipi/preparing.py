"""i-PI inputs of the rounds of an exploration: the user's own or the program's, with another seed and another start."""

from __future__ import annotations

import importlib.resources
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnn_driver.errors import ConfigError
from bnn_driver.records import Array

START = "round_start.xyz"
"""Where a round starts; beside its input."""
SEEDS = 2**31
"""i-PI takes smaller ones."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where a walker starts."""

    labels: Sequence[str]
    """(A,) as i-PI knows the atoms."""
    positions: Array
    """(P, A, 3) Å, one place for all beads or one for each."""
    cell: Array
    """(3, 3) Å, vectors in rows, the first along x and the second in the xy plane."""

    def text(self) -> str:
        """As i-PI's <file mode='xyz'> reads it, one frame per bead."""
        cell = " ".join(repr(x) for x in self.cell.T.ravel().tolist())
        rows = [
            [f"{label} {' '.join(repr(x) for x in place)}" for label, place in zip(self.labels, bead, strict=True)]
            for bead in self.positions.tolist()
        ]
        head = [str(len(self.labels)), f"# CELL(H): {cell} cell{{angstrom}} positions{{angstrom}}"]
        return "\n".join("\n".join([*head, *bead]) for bead in rows) + "\n"


def own_input(text: str, where: Path, seed: int, beads: int, restart: bool) -> str:
    """An input of the user's own with another seed, and with START in place of its structure and its velocities drawn anew.

    Args: where: names the input in messages.   restart: False leaves structure and velocities as they are.
    Raises: ConfigError for an input that cannot be started elsewhere: not XML, several systems, no temperature.
    """
    root = _parsed(text, where)
    systems = root.findall("system")
    if len(systems) != 1 or root.find("system_template") is not None:
        raise ConfigError(f"{where}: expected one <system>, but got {len(systems)}; give each system an input in [ipi.walkers]")
    velocities = _velocities(systems[0], where)
    _reseed(root, seed)
    if restart:
        step = int(root.findtext("step") or 0)
        _set(root, "step", "0")
        _set(root, "total_steps", str(int(root.findtext("total_steps") or 0) - step))
        _start_at(systems[0], velocities, beads)
    return ET.tostring(root, encoding="unicode") + "\n"


def reseeded(text: str, seed: int) -> str:
    """An input or a checkpoint whose random numbers begin anew at a seed."""
    root = ET.fromstring(text)
    _reseed(root, seed)
    return ET.tostring(root, encoding="unicode") + "\n"


def template_input(kelvin: float, beads: int, timestep: float, steps: int, address: str, seed: int) -> str:
    """The program's own input, started from START.

    Args: kelvin: K.   beads: 1: Langevin dynamics; more: path integrals with a local PILE thermostat.   timestep: fs.
        address: of a Unix socket.
    """
    root = ET.fromstring(importlib.resources.files("bnn_driver").joinpath("data", "dynamics.xml").read_text(encoding="utf-8"))
    dynamics = "system/motion/dynamics"
    for path, value in (
        ("total_steps", steps), ("ffsocket/address", address), ("system/initialize/velocities", kelvin),
        ("system/ensemble/temperature", kelvin), (f"{dynamics}/timestep", timestep),
    ):  # fmt: skip
        _set(root, path, str(value))
    _reseed(root, seed)
    found = root.find("system/initialize"), root.find("ffsocket"), root.find(f"{dynamics}/thermostat")
    initialize, socket, thermostat = (node for node in found if node is not None)
    initialize.set("nbeads", str(beads))
    if beads > 1:
        thermostat.set("mode", "pile_l")
        ET.SubElement(socket, "batch_size").text = str(beads)
    return ET.tostring(root, encoding="unicode") + "\n"


def _reseed(root: ET.Element, seed: int) -> None:
    _set(root, "prng", None)
    _set(root, "prng/seed", str(seed % SEEDS))


def _parsed(text: str, where: Path) -> ET.Element:
    try:
        return ET.fromstring(text)
    except ET.ParseError as error:
        raise ConfigError(f"{where}: exploring needs an i-PI input in XML, but this is none: {error}") from None


def _velocities(system: ET.Element, where: Path) -> ET.Element:
    """How velocities are drawn when a round starts from another frame."""
    for node in system.findall("initialize/velocities"):
        if node.get("mode") == "thermal":
            return node
    kelvin = system.find("ensemble/temperature")
    if kelvin is None:
        raise ConfigError(
            f"{where}: every round draws velocities anew, but there is neither <velocities mode='thermal'> nor a <temperature>; add one"
        )
    node = ET.Element("velocities", {"mode": "thermal", **kelvin.attrib})
    node.text = kelvin.text
    return node


def _start_at(system: ET.Element, velocities: ET.Element, beads: int) -> None:
    """Structure from START; masses that the user set stay."""
    for tag in ("beads", "cell"):
        for node in system.findall(tag):
            system.remove(node)
    before = system.find("initialize")
    masses = [] if before is None else before.findall("masses")
    if before is not None:
        system.remove(before)
    initialize = ET.Element("initialize", {"nbeads": str(beads)})
    ET.SubElement(initialize, "file", {"mode": "xyz"}).text = START
    initialize.extend([*masses, velocities])
    system.insert(0, initialize)


def _set(root: ET.Element, path: str, text: str | None) -> None:
    """Set the text of a node that is made if need be; None: remove its children."""
    node = root
    for tag in path.split("/"):
        found = node.find(tag)
        node = ET.SubElement(node, tag) if found is None else found
    if text is None:
        for child in list(node):
            node.remove(child)
    node.text = text


def standing(cell: Array, positions: Array) -> tuple[Array, Array]:
    """A crystal turned as i-PI wants it, the first vector along x and the second in the xy plane.

    Args: cell: (3, 3) Å, vectors in rows.   positions: (A, 3) Å.   Raises: ConfigError for a left-handed cell.
    """
    if np.linalg.det(cell) <= 0:
        raise ConfigError("the cell is left-handed or has no volume; exchange two of its vectors")
    turn, lower = np.linalg.qr(cell.T)
    sign = np.sign(np.diag(lower))
    return (lower * sign[:, None]).T, positions @ (turn * sign)
