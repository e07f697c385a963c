"""What an i-PI input (or RESTART) says that the driver must know, read with i-PI's own readers so that both agree.

i-PI is imported inside the functions: it takes a second, and only those who read an input need it.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bnn_driver.errors import ConfigError
from bnn_driver.ipi.transport import Endpoint
from bnn_driver.records import Array
from bnn_driver.units import BOHR

FILE_MODES = frozenset({"xyz", "pdb", "ase", "chk"})
VERBOSITY = ("quiet", "low", "medium", "high", "debug", "trace")
ONE_READER = threading.Lock()
"""How loud i-PI is, and which warnings are shown, is the same for all threads."""
ISOTOPES = {"D": 1, "T": 1, "Mu": 1}


@dataclass(frozen=True, eq=False)
class IpiInput:
    """The driver's view of one i-PI input file."""

    path: Path
    endpoints: tuple[Endpoint, ...]
    """One per <ffsocket>, in the order of the file."""
    shared_memory: bool
    """mode='shm'."""
    batch_size: int
    """Structures per request (the largest of all sockets)."""
    consolidated: bool
    """False where a socket has consolidate_messages False."""
    pbc: bool
    """i-PI folds every atom of every bead by itself into the cell, which tears molecules apart."""
    exit_on_disconnect: bool
    """True where i-PI ends when the driver leaves, so that reconnecting is of no use."""
    timeout: float
    """s after which i-PI drops a driver that still computes; 0: never (the smallest of all sockets)."""
    n_beads: int
    """Beads of each system."""
    n_systems: int
    labels: tuple[str, ...]
    """(A,) what i-PI calls the atoms, which says their isotopes too."""
    numbers: Array
    """(A,) atomic numbers."""
    positions: Array
    """(A, 3) Å, the first bead of the first system at the start."""
    cell: Array
    """(3, 3) Å, vectors in rows."""
    total_steps: int
    step: int
    """Where it starts: 0, or the step of a RESTART."""
    checkpoint_stride: int | None
    """Steps between checkpoints; None: only a clean exit leaves a RESTART, and a crash loses the run."""
    checkpoint_files: tuple[str, ...]
    """Names in the working folder, as patterns."""


def read_input(path: Path) -> IpiInput:
    """Read an i-PI input or RESTART (XML or JSON); nothing is started.

    Raises: ConfigError with the file and the remedy: not there, not readable by i-PI, no <ffsocket>, different atoms.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"the i-PI input {path} is not there; give the path of the XML file that `i-pi` would run")
    with _quiet_ipi(path):
        simulation = _parse(path)
        sockets = list(_sockets(simulation))
        if not sockets:
            raise ConfigError(
                f"{path} has no <ffsocket>: add one, e.g. <ffsocket name='bnn' mode='unix'><address>bnn</address></ffsocket>"
            )
        systems = _systems(simulation, path)
        numbers, positions, cell, n_beads = _structure(systems, path)
        endpoints, shared = _endpoints(sockets, simulation.sockets_prefix.fetch(), path)
        stride, files = _checkpoints(simulation.output.fetch())
        return IpiInput(
            path=path,
            endpoints=endpoints,
            shared_memory=shared,
            batch_size=max(int(s.batch_size.fetch()) for s in sockets),
            consolidated=all(s.consolidate_messages.fetch() for s in sockets),
            pbc=any(s.pbc.fetch() for s in sockets),
            exit_on_disconnect=any(s.exit_on_disconnect.fetch() or s.matching.fetch() == "lock" for s in sockets),
            timeout=min((t for s in sockets if (t := float(s.timeout.fetch())) > 0), default=0.0),
            n_beads=n_beads,
            n_systems=len(systems),
            labels=tuple(str(name) for name in systems[0].beads.names),
            numbers=numbers,
            positions=positions,
            cell=cell,
            total_steps=int(simulation.total_steps.fetch()),
            step=int(simulation.step.fetch()),
            checkpoint_stride=stride,
            checkpoint_files=files,
        )


@contextmanager
def _quiet_ipi(path: Path) -> Iterator[None]:
    """i-PI's messages off, and every way it fails turned into a ConfigError: its readers raise anything, even SystemExit."""
    from ipi.utils.messages import verbosity

    with ONE_READER:
        level = VERBOSITY[verbosity.level]  # read as a number, set as a word
        verbosity.level = "quiet"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # i-PI leaves the structure file open
                yield
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"i-PI cannot read {path}: {type(error).__name__}: {error}; try `i-pi {path.name}` for more"
            ) from error
        finally:
            verbosity.level = level


def _parse(path: Path) -> Any:
    from ipi.inputs.simulation import InputSimulation
    from ipi.utils.io.inputs.io_json import json_parse_file
    from ipi.utils.io.inputs.io_xml import xml_parse_file

    with path.open() as stream:
        tree = (json_parse_file if path.suffix == ".json" else xml_parse_file)(stream)
    simulation = InputSimulation()
    simulation.parse(tree.fields[0][1])
    return simulation


def _sockets(node: Any) -> Iterator[Any]:
    """Every <ffsocket>, also inside <ffcommittee> and <ffrotations>."""
    from ipi.inputs.forcefields import InputFFRotations, InputFFSocket

    for _, child in node.extra:
        if isinstance(child, InputFFSocket):
            yield child
        elif isinstance(child, InputFFRotations):
            if child.ffsocket._explicit:
                yield child.ffsocket
        elif getattr(child, "extra", None):
            yield from _sockets(child)


def _endpoints(sockets: list[Any], prefix: str, path: Path) -> tuple[tuple[Endpoint, ...], bool]:
    modes = [socket.mode.fetch() for socket in sockets]
    if "shm" in modes and set(modes) != {"shm"}:
        raise ConfigError(f"{path} mixes <ffsocket mode='shm'> with other modes; use one mode for all sockets of the driver")
    ends = tuple(
        Endpoint("inet", socket.address.fetch(), int(socket.port.fetch()))
        if mode == "inet"
        else Endpoint("unix", socket.address.fetch(), prefix=prefix)
        for socket, mode in zip(sockets, modes, strict=True)
    )
    if len(set(ends)) < len(ends):
        raise ConfigError(
            f"{path} has two <ffsocket> with one address ({', '.join(map(str, ends))}): give each its own <address> or <port>"
        )
    return ends, "shm" in modes


def _systems(simulation: Any, path: Path) -> list[Any]:
    """Systems with beads and cell filled as i-PI would at its start."""
    systems: list[Any] = []
    for kind, node in simulation.extra:
        if kind == "system":
            systems.append(SimpleNamespace(init=node.initialize.fetch(), beads=node.beads.fetch(), cell=node.cell.fetch()))
        elif kind == "system_template":
            systems.extend(node.fetch())
    if not systems:
        raise ConfigError(f"{path} has no <system>")
    for system in systems:
        queue = [(kind, item) for kind, item in system.init.queue if kind in {"positions", "masses", "labels", "cell"}]
        for _, item in queue:
            if item.mode in FILE_MODES:
                item.value = _resolved(str(item.value), path)
        system.init.queue = queue
        if queue or system.beads.natoms == 0:
            system.init.init_stage1(system)
    return systems


def _resolved(name: str, path: Path) -> str:
    file = (path.parent / name.strip()).absolute()
    if not file.is_file():
        raise ConfigError(f"{path}: <initialize> names {name!r}, but {file} is not there; paths are relative to the input file")
    return str(file)


def _structure(systems: list[Any], path: Path) -> tuple[Array, Array, Array, int]:
    numbers = [_numbers(list(system.beads.names), path) for system in systems]
    beads = sorted({int(system.beads.nbeads) for system in systems})
    if any(not np.array_equal(numbers[0], other) for other in numbers[1:]):
        raise ConfigError(
            f"the systems of {path} have different atoms or order; a driver serves one set of atoms: use one input per set"
        )
    if len(beads) > 1:
        raise ConfigError(f"the systems of {path} have different numbers of beads {beads}; use one input per number")
    first = systems[0]
    positions = np.array(first.beads.q[0], float).reshape(-1, 3) * BOHR
    return numbers[0], positions, np.array(first.cell.h, float).T * BOHR, beads[0]


def _numbers(names: list[str], path: Path) -> Array:
    from ase.data import atomic_numbers

    table = {**atomic_numbers, **ISOTOPES}
    bare = [re.sub(r"[\d_].*$", "", str(name)) for name in names]
    unknown = sorted({str(name) for name, symbol in zip(names, bare, strict=True) if symbol not in table})
    if unknown:
        raise ConfigError(
            f"{path} has atoms labelled {', '.join(unknown)}, which are no chemical symbols; rename them in the structure"
        )
    return np.array([table[symbol] for symbol in bare])


def _checkpoints(outputs: Any) -> tuple[int | None, tuple[str, ...]]:
    """Smallest stride and the patterns of the files' names."""
    from ipi.engine.outputs import CheckpointOutput

    found = [output for output in outputs if isinstance(output, CheckpointOutput)]
    prefix = f"{outputs.prefix}." if outputs.prefix else ""
    files = tuple(prefix + output.filename + ("" if output.overwrite else "_*") for output in found)
    return min((int(output.stride) for output in found), default=None), files
