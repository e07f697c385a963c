"""Any code that is an i-PI client (CP2K, NWChem, ABINIT, Quantum ESPRESSO, FHI-aims ...), kept running between labels.

The protocol does not say whether a calculation converged: CP2K 2023.1 and ABINIT 9.6 send the forces of an SCF that did not.  So
every label needs a line that the code itself wrote into its log for this very frame.  A running code starts each frame from the
last one: its labels depend, within its thresholds, on what came before (`restart_every = 1` makes each start cold).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase.data import chemical_symbols
from ase.symbols import string2symbols

from bnn_driver.errors import GeometryRejected, OracleConfigError, OracleInconsistent
from bnn_driver.ipi.server import unique_endpoint
from bnn_driver.ipi.transport import Endpoint
from bnn_driver.oracle import Capabilities, make_label
from bnn_driver.records import Array, Frames, Label
from bnn_driver.units import stress_from_virial
from oracles.input_files import content_hash, placeholders, structure_values
from oracles.log_evidence import Mark
from oracles.one_shot import program, words_of
from oracles.running_code import OUTPUT, Plan, RunningCode
from oracles.sessions import UNBOUNDED, Session, explained

CLEARANCE = 2.0
"""Å between an atom and the wall of `box`."""


@dataclass(frozen=True)
class Socket:
    """One input of one code for a whole campaign.

    The files of `folder` are copied for every start, and in those named by `templates` (and in `command`) these are filled in:
    {socket} name, {path} of the socket, {host} and {port}; {atoms} (lines "O x y z"), or {natoms}, {ntypes}, {elements} (atomic
    numbers, ascending), {types} (an index from 1 for every atom) and {positions}; {cell} or {a}, {b}, {c}; all in Å, vectors in
    rows; {charge}, {multiplicity}, {periodic} ("true" or "false").
    """

    command: str
    """Run without a shell, in the copied folder; printed text goes to stdout.txt and stderr.txt there."""
    folder: str = field(metadata={"path": True})
    code: str
    """Name and version, such as "CP2K 2023.1"."""
    converged: str
    """"FILE: REGEX" of the lines that say that a frame converged."""
    lines_per_frame: int = 1
    """Exactly so many of them per frame."""
    failed: str = ""
    """"FILE: REGEX" of lines that refuse a frame."""
    evidence_timeout: float = field(default=10.0, metadata={"quantity": "wall time"})
    """For the log to be written out after the forces have come."""
    version: str = ""
    """"FILE: REGEX" whose first group must stand in `code`, so that another version is noticed."""
    templates: list[str] = field(default_factory=list)
    launcher: str = ""
    """Put before the command and not part of the physics, such as "srun -n 32"."""
    environment: dict[str, str] = field(default_factory=dict)
    transport: Literal["unix", "inet"] = "unix"
    socket_prefix: str = "/tmp/ipi_"
    """What the code itself puts before the name of the socket (i-PI's and ASE's convention)."""
    host: str = "localhost"
    """Of transport = "inet": where the driver listens, as the code calls it."""
    connect_timeout: float = field(default=120.0, metadata={"quantity": "wall time"})
    frame_timeout: float = field(default=1200.0, metadata={"quantity": "wall time"})
    restart_every: int = 500
    """Labels of one start of the code."""
    periodic: bool = False
    """Frames with a cell can be labelled."""
    stress: bool = False
    """The code sends the virial of frames with a cell."""
    box: float | None = field(default=None, metadata={"quantity": "length"})
    """For molecules: edge of the cubic cell that the code computes them in, centred; "0 A" where it knows no cell."""
    net_force: float = field(default=0.0, metadata={"quantity": "force"})
    """Largest net force on a molecule that is taken off in equal parts: the integration grid of a box causes one."""
    charge: int = 0
    """Fixed in the input files; any other frame is refused, unless they have {charge}."""
    multiplicity: int = 1
    """As `charge`."""
    species: str = ""
    """Atoms in the order of the input, such as "OH2", where the input has neither {atoms} nor {types}."""
    _live: Session[RunningCode] = field(init=False, repr=False, compare=False, default_factory=lambda: Session("socket"))

    def __post_init__(self) -> None:
        for name in ("lines_per_frame", "restart_every", "evidence_timeout", "connect_timeout", "frame_timeout"):
            if getattr(self, name) <= 0:
                raise OracleConfigError(f"[oracle.socket] {name} must be positive, got {getattr(self, name)}")
        if (self.box or 0.0) < 0 or self.net_force < 0:
            raise OracleConfigError(
                f"[oracle.socket] box and net_force must not be negative, got {self.box} Å and {self.net_force} eV/Å"
            )
        words_of("socket", self.command)
        if self.launcher:
            words_of("socket", self.launcher, "launcher")
        _ = self._marks  # read now, so that a mistake in an expression is found before the run
        weakref.finalize(self, self._live.stop, failed=False)

    @property
    def capabilities(self) -> Capabilities:
        """What the keys say; charge and multiplicity are compared by `check`."""
        return Capabilities(stress=self.stress, periodic=self.periodic, charge=True, spin=True)

    def physics(self) -> dict[str, Any]:
        """The command and the contents of the input files, before anything is filled in, and what is done to frame and forces."""
        name, *rest = words_of("socket", self.command)
        return {
            "code": self.code,
            "command": [Path(name).name, *rest],
            "files": self._files,
            "templates": sorted(self.templates),
            "box": self.box,
            "net_force": self.net_force,
            "stress": self.stress,
        }

    @cached_property
    def _files(self) -> str:
        return content_hash(Path(self.folder))

    @cached_property
    def _marks(self) -> tuple[Mark, Mark | None, Mark | None]:
        failed, version = (Mark.parse(getattr(self, key), key) if getattr(self, key) else None for key in ("failed", "version"))
        if version is not None and version.pattern.groups < 1:
            raise OracleConfigError(f"[oracle.socket] version = {self.version!r} needs a group (...) that is the version")
        return Mark.parse(self.converged, "converged"), failed, version

    def check(self, frame: Frames) -> None:
        """Program, files and what they fix agree with the frame.  Raises: OracleConfigError, EnvironmentProblem."""
        names = self._placeholders()
        if not names & ({"socket", "path"} if self.transport == "unix" else {"port"}):
            raise OracleConfigError(
                "[oracle.socket] neither command nor templates say where the driver listens: write {socket} (or {path}) there "
                'for transport = "unix", {port} for "inet"'
            )
        self._words()
        self._check_species(frame, names)
        for name in ("charge", "multiplicity"):
            if name not in names and getattr(frame, name) != getattr(self, name):
                raise OracleConfigError(
                    f"the input files of {self.code} are for {name} {getattr(self, name)}, but the frame has "
                    f"{getattr(frame, name)}: write {{{name}}} into a template, or set [oracle.socket] {name} and the input alike"
                )
        if frame.periodic and not self.periodic:
            raise OracleConfigError(
                f"the frame has a cell: set [oracle.socket] periodic = true if the input of {self.code} has one"
            )
        if not frame.periodic and self.box is None:
            raise OracleConfigError(
                '[oracle.socket] box is missing: for molecules give the edge of the cubic cell, "20 A", or "0 A" if the code knows none'
            )
        if not frame.periodic and not self.box and names & {"cell", "a", "b", "c"}:
            raise OracleConfigError('[oracle.socket] box = "0 A", but the input has {cell} or {a}, {b}, {c}: give the edge')

    def _placeholders(self) -> set[str]:
        texts = [self.command]
        for name in self.templates:
            try:
                texts.append((Path(self.folder) / name).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise OracleConfigError(f"[oracle.socket] template {name!r} cannot be read: {error}") from error
        return set[str]().union(*map(placeholders, texts))

    def _check_species(self, frame: Frames, names: set[str]) -> None:
        if names & {"atoms", "types"}:
            return
        if not self.species:
            raise OracleConfigError(
                "[oracle.socket] nothing says which atom is which: write {atoms} or {types} into a template, or give species, "
                'such as "OH2", in the order of the input'
            )
        try:
            expected = string2symbols(self.species)
        except ValueError as error:
            raise OracleConfigError(f"[oracle.socket] species = {self.species!r} is no formula") from error
        came = [chemical_symbols[z] for z in frame.numbers]
        if came != expected:
            raise OracleConfigError(
                f"the input of {self.code} is for the atoms {' '.join(expected)}, but the frame has {' '.join(came)}"
            )

    def __call__(self, frame: Frames) -> Label:
        """Label one frame with the running code, started first where none runs that fits.

        Raises: SCFNotConverged, OracleInconsistent (also without evidence of convergence), OracleCrashed, OracleTimeout.
        """
        self.check(frame)
        positions, cell = self._placed(frame)
        plan = self._plan(frame, positions, cell)
        try:
            code = self._live.code(lambda running: running.fits(plan), lambda folder: RunningCode(plan, folder))
            with explained(code, *dict.fromkeys((plan.converged.file, OUTPUT))):
                energy, forces, virial, evidence = code.label(positions, cell)
        except BaseException:
            self._live.stop(failed=True)
            raise
        stress = stress_from_virial(virial, cell) if self.stress and frame.periodic else None
        if stress is not None and not stress.any():
            raise OracleInconsistent(
                f"{self.code} sent a virial of zeros: switch the stress on in its input, or set stress = false"
            )
        if not frame.periodic and self.net_force:
            forces = self._balanced(forces)
        return make_label(self, frame, energy, forces, stress, evidence=evidence)

    def close(self) -> None:
        """End the running code, if there is one."""
        self._live.stop(failed=False)

    def _words(self) -> list[str]:
        """Launcher and command, whose programs were found."""
        source = Path(self.folder)
        launcher = program("socket", self.launcher, "launcher", source) if self.launcher else []
        return launcher + program("socket", self.command, folder=source)

    def _plan(self, frame: Frames, positions: Array, cell: Array) -> Plan:
        unix = self.transport == "unix"
        converged, failed, version = self._marks
        return Plan(
            code=self.code,
            words=self._words(),
            source=Path(self.folder),
            files=self._files,
            templates=self.templates,
            values=structure_values(frame.numbers, positions, cell, frame.periodic, frame.charge, frame.multiplicity),
            environment=self.environment,
            endpoint=unique_endpoint(self.socket_prefix) if unix else Endpoint("inet", self.host, 0),
            connect_timeout=self.connect_timeout,
            frame_timeout=self.frame_timeout,
            converged=converged,
            failed=failed,
            version=version,
            lines_per_frame=self.lines_per_frame,
            evidence_timeout=self.evidence_timeout,
            restart_every=self.restart_every,
            cell=cell,
        )

    def _placed(self, frame: Frames) -> tuple[Array, Array]:
        """Positions (A, 3) and cell (3, 3), Å, as the code gets them."""
        positions = frame.positions[0]
        if frame.cell is not None:
            return positions, frame.cell[0]
        if not self.box:
            return positions, UNBOUNDED * np.eye(3)
        positions = positions - positions.mean(axis=0) + self.box / 2
        if positions.min() < CLEARANCE or positions.max() > self.box - CLEARANCE:
            raise GeometryRejected(
                f"the molecule comes closer than {CLEARANCE} Å to the wall of a box of {self.box:g} Å: has it fallen apart? "
                "Otherwise give a larger [oracle.socket] box"
            )
        return positions, self.box * np.eye(3)

    def _balanced(self, forces: Array) -> Array:
        net = forces.sum(axis=0)
        if np.linalg.norm(net) > self.net_force:
            raise OracleInconsistent(
                f"{self.code}: the forces on the molecule add up to {np.linalg.norm(net):.2g} eV/Å, more than net_force = "
                f"{self.net_force:g} eV/Å; use a finer grid"
            )
        return forces - net / len(forces)
