"""FHI-aims, one run of the user's binary per label or one that keeps running, from the user's own control.in or from settings in the config.

Files are written and read here, so that nothing of the user's input is lost in translation; only a control.in that is made from the
config goes through ASE's writer.  Tested by replaying outputs, never with the binary itself.
"""

from __future__ import annotations

import io
import warnings
import weakref
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms

from bnn_driver.errors import OracleConfigError, OracleError, OracleInconsistent
from bnn_driver.oracle import Capabilities, check_multiplicity, fingerprint, make_label
from bnn_driver.records import Frames, Label
from oracles.aims_control import MECHANICS, SCF_KEYWORDS, Control, lines_of
from oracles.aims_output import CONVERGED, DIGITS, FAREWELL, AimsResult, read_result
from oracles.aims_session import RunningAims
from oracles.one_shot import Keep, Shot, climb, program
from oracles.scrutiny import check_geometry, check_rungs, check_version, last_words, sha256, text_of
from oracles.sessions import Session, check_session, explained, start_in_words

OUTPUT = "aims.out"
BOHR_SPREAD = 1e-8
"""Relative difference between values of the bohr: positions in a socket are in bohr."""
DENSITIES = ("*.csc",)
"""Density and overlap matrices of elsi_restart."""


@dataclass(frozen=True)
class Aims:
    """Molecules and crystals of any charge and multiplicity, which come with the frame.

    Energies are those that FHI-aims prints, where 1 Ha = 27.2113845 eV; what it sends through a socket is converted with 27.2113860 eV
    by others, 53 meV apart at -947 keV: labels of the oracle "socket" never belong into one set with these (their fingerprints differ).
    """

    command: str | list[str]
    """What runs the binary, such as "srun -n 32 aims.x"; started without a shell, in a new folder that holds the input."""
    folder: str = field(default="", metadata={"path": True})
    """Folder with the control.in to use, species included; it is left untouched."""
    control: dict[str, Any] = field(default_factory=dict)
    """Instead of a folder: keywords of control.in, written by ASE (which knows `kpts`, `smearing` and `tier` besides)."""
    species_dir: str = field(default="", metadata={"path": True})
    """With `control`: folder of the files 01_H_default and so on."""
    stress: bool = False
    """Periodic labels carry the analytical stress, which may cost more than all the rest, and which not all functionals have."""
    version: str = ""
    """As aims.out prints it ("221103"): any other is refused.  Empty: that of the first label in a worker's folder."""
    ladder: list[dict[str, Any]] = field(default_factory=list)
    """Keywords to try one after another when the SCF does not converge; only such as lead to the same solution."""
    restart: bool = False
    """Start from the density matrix of the label before (elsi_restart): faster, but then a label depends on its history."""
    session: Literal["file", "socket"] = "file"
    """"socket": FHI-aims keeps running behind its i-PI socket while atoms, charge, multiplicity and cell stay: no start, and the density of
    the frame before, on which a label then depends.  The ladder runs by itself.  Tried on a recorded run of 2021 only."""
    host: str = ""
    """With session = "socket", where this process listens, as FHI-aims calls it; empty: a Unix socket, for the same machine."""
    restart_every: int = 500
    """Labels of one start of a session."""
    keep_files: Keep = "failed"
    _live: Session[RunningAims] = field(init=False, repr=False, compare=False, default_factory=lambda: Session("aims"))

    def __post_init__(self) -> None:
        if bool(self.folder) == bool(self.control):
            raise OracleConfigError("[oracle.aims] give either folder (with your control.in) or control = {...}, and not both")
        if bool(self.control) != bool(self.species_dir):
            wanted = (
                "species_dir, the folder of 01_H_default and so on" if self.control else "no species_dir: control.in has them"
            )
            raise OracleConfigError(f"[oracle.aims] {'control' if self.control else 'folder'} needs {wanted}")
        check_rungs("aims", self.ladder, SCF_KEYWORDS)
        check_session("aims", self.session != "file", self.restart, self.restart_every)
        if self.host and self.session == "file":
            raise OracleConfigError('[oracle.aims] host has no meaning without session = "socket"')
        weakref.finalize(self, self._live.stop, failed=False)

    @property
    def code(self) -> str:
        """Name, and version where it is prescribed; a label names the version that its output printed."""
        return f"aims {self.version}".rstrip()

    @property
    def capabilities(self) -> Capabilities:
        """Everything; stress where asked for."""
        return Capabilities(stress=self.stress, periodic=True, charge=True, spin=True)

    def physics(self) -> dict[str, Any]:
        """Keywords and species without comments, without what only leads to convergence or spreads the work; the prescribed version."""
        facts = {"code": self.code, "stress": self.stress}
        if self.folder:
            return facts | self._file.physics()
        general = {key: value for key, value in self.control.items() if key not in MECHANICS | SCF_KEYWORDS}
        return facts | {"control": general, "species": sha256("\n".join(self._species))}

    def check(self, frame: Frames) -> None:
        """Program, files, species and keywords.  Raises: OracleConfigError, EnvironmentProblem."""
        program("aims", self.command)
        self.physics()  # every file is read
        control = self._control(frame)
        control.check_single_point(self.stress and frame.periodic)
        control.names_of(frame)
        control.check_boundary(frame)
        control.state_keywords(frame)
        # the bands of a crystal may share an odd electron
        if not (frame.periodic and frame.multiplicity == 1):
            check_multiplicity(frame, int(frame.numbers.sum()) - frame.charge)

    def __call__(self, frame: Frames) -> Label:
        """Label one frame, climbing the ladder while the SCF does not converge."""
        self.check(frame)
        return climb(self.ladder, lambda rung, changes: self._attempt(frame, rung, changes))

    def _attempt(self, frame: Frames, rung: int, changes: dict[str, Any]) -> Label:
        if rung == 0 and self.session == "socket":
            result, facts = self._in_session(frame)
        else:
            name = fingerprint(self)
            shot = Shot("aims", self.command, OUTPUT, self.keep_files, DENSITIES if self.restart else ())
            write, read = partial(self._write, frame, changes), partial(self._read, frame, name)
            result, facts = shot.fire(frame, name, rung, write, read)
            facts = [f"{CONVERGED!r} and {FAREWELL!r} after {result.cycles} iterations", *_versions(result), *facts]
        stress = result.stress if self.stress and frame.periodic else None
        label = make_label(self, frame, result.energy, result.forces, stress, evidence="; ".join(facts), rung=rung)
        return label if self.version else replace(label, code=f"aims {result.version}".rstrip())

    def _in_session(self, frame: Frames) -> tuple[AimsResult, list[str]]:
        """As `Shot.fire`, by the running code."""
        try:
            code = self._live.code(
                lambda running: running.fits(frame, self.restart_every), partial(self._start, frame), self.keep_files
            )
            with explained(code, OUTPUT):
                result = code.compute(frame)
                self._check_result(result, frame, fingerprint(self), DIGITS + BOHR_SPREAD * float(np.abs(frame.positions).max()))
        except BaseException:
            self._live.stop(failed=True)
            raise
        return result, [f"{CONVERGED!r} after {result.cycles} iterations", *_versions(result), start_in_words(code.labels)]

    def _start(self, frame: Frames, folder: Path) -> RunningAims:
        words = program("aims", self.command)
        return RunningAims(words, folder, OUTPUT, frame, self.host, lambda work, more: self._write(frame, {}, work, "", more))

    def close(self) -> None:
        """End the running code, if there is one."""
        self._live.stop(failed=False)

    def _write(
        self, frame: Frames, changes: dict[str, Any], folder: Path, origin: str, more: dict[str, str] | None = None
    ) -> None:
        control = self._control(frame)
        added = {"compute_forces": ".true."} | control.state_keywords(frame) | (more or {})
        if self.stress and frame.periodic:
            added["compute_analytical_stress"] = ".true."
        if self.restart:
            added |= {"elsi_restart": f"{'read_and_write' if origin else 'write'} 1000", "elsi_restart_use_overlap": ".true."}
        # Latin 1 keeps every byte of the user's file
        (folder / "control.in").write_bytes(control.completed(added, changes).encode("latin-1"))
        lines = [] if frame.cell is None else [f"lattice_vector {_coordinates(vector)}" for vector in frame.cell[0]]
        lines += [
            f"atom {_coordinates(x)} {species}" for x, species in zip(frame.positions[0], control.names_of(frame), strict=True)
        ]
        (folder / "geometry.in").write_text("\n".join(lines) + "\n", encoding="ascii")

    def _read(self, frame: Frames, name: str, folder: Path, ended: str) -> AimsResult:
        """The result, with the folder's last words in any failure."""
        try:
            result = read_result(text_of(folder / OUTPUT))
            self._check_result(result, frame, name, DIGITS)
        except OracleError as error:
            raise type(error)(f"{error} ({ended})\n{last_words(folder, OUTPUT)}") from error
        return result

    def _check_result(self, result: AimsResult, frame: Frames, name: str, tolerance: float) -> None:
        known = self._control(frame).species
        numbers = np.array([known.get(species, 0) for species in result.species])
        check_geometry("FHI-aims", frame, numbers, result.positions, result.cell, tolerance, DIGITS)
        if self.stress and frame.periodic and result.stress is None:
            raise OracleInconsistent("FHI-aims printed no analytical stress, though compute_analytical_stress was set")
        check_version("aims", name, self.version, result.version)

    def _control(self, frame: Frames) -> Control:
        return self._file if self.folder else Control(self._written(frame), "[oracle.aims] control", False)

    @cached_property
    def _file(self) -> Control:
        """Read once: a process computes all its labels with the same input."""
        path = Path(self.folder) / "control.in"
        try:
            return Control(path.read_bytes().decode("latin-1"), str(path), True)
        except OSError as error:
            raise OracleConfigError(
                f"[oracle.aims] folder: {path} cannot be read: {error.strerror}; put your control.in with its species there"
            ) from error

    @cached_property
    def _species(self) -> list[str]:
        """Name and content of all files of species, without comments."""
        files = sorted(Path(self.species_dir).glob("*_default"))
        if not files:
            raise OracleConfigError(
                f"[oracle.aims] species_dir = {self.species_dir!r} holds no file like 01_H_default; "
                "give a folder such as species_defaults/defaults_2020/intermediate"
            )
        return [
            "\n".join([file.name, *(f"{x.keyword} {x.value}" for x in lines_of(file.read_text(encoding="latin-1")))])
            for file in files
        ]

    def _written(self, frame: Frames) -> str:
        from ase.io.aims import write_control

        atoms = Atoms(frame.numbers, frame.positions[0], cell=None if frame.cell is None else frame.cell[0], pbc=frame.periodic)
        settings = dict(self.control) | {"species_dir": self.species_dir}
        if isinstance(settings.get("output"), str):
            settings["output"] = [settings["output"]]  # ASE would write a line for each letter
        text = io.StringIO()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # ASE plans to move its FHI-aims files elsewhere
                write_control(text, atoms, settings)
        except FileNotFoundError as error:
            raise OracleConfigError(f"[oracle.aims] species_dir: there is no {error.filename}, which the frame needs") from error
        except (KeyError, ValueError, TypeError, AssertionError, AttributeError, RuntimeError) as error:
            raise OracleConfigError(
                f"[oracle.aims] ASE cannot write a control.in from control = {self.control}: {type(error).__name__} {error}; "
                "write the file yourself and name its folder"
            ) from error
        return text.getvalue()


def _coordinates(vector: np.ndarray) -> str:
    return " ".join(f"{x:.16f}" for x in vector)


def _versions(result: AimsResult) -> list[str]:
    found = [f"version {result.version}"] if result.version else []
    return found + ([f"1 Ha = {result.hartree} eV"] if result.hartree else [])
