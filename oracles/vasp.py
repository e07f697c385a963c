"""VASP, one run of the user's binary per label or one that keeps running, from the user's own files or from settings in the config.

Files are read here, so that nothing of the user's input is lost in translation; POSCAR, and an INCAR and KPOINTS made from the config,
go through ASE's writers.  Tested by replaying outputs, never with the binary itself.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols

from bnn_driver.errors import OracleConfigError, OracleError, OracleInconsistent
from bnn_driver.oracle import Capabilities, fingerprint, make_label
from bnn_driver.records import Array, Frames, Label
from oracles.one_shot import Keep, Shot, climb, program
from oracles.scrutiny import check_geometry, check_rungs, check_version, last_words, sha256
from oracles.sessions import Session, check_session, explained, start_in_words
from oracles.vasp_frames import DIGITS
from oracles.vasp_inputs import ALGORITHMS, SCF_TAGS, Incar, Potential, normal_kpoints, potentials_of
from oracles.vasp_output import REACHED, VaspResult, read_result
from oracles.vasp_session import TAGS, RunningVasp

OUTPUT, KERNEL = "vasp.out", "vdw_kernel.bindat"
CELL_DIGITS = 1e-8
"""Å: cells are printed with eight decimals."""


@dataclass(frozen=True)
class Vasp:
    """Periodic frames of any charge and multiplicity, which come with the frame; a molecule needs a box in the i-PI input.

    The atoms of POSCAR are sorted as the POTCARs are, and within one element stay in the order of the frame; tags with one value per
    element or atom (LDAUU, MAGMOM) count in that order.  Labels come back in the order of the frame.
    """

    command: str | list[str]
    """What runs the binary, such as "srun -n 64 vasp_std"; started without a shell, in a new folder that holds the input."""
    folder: str = field(default="", metadata={"path": True})
    """Folder with the INCAR, KPOINTS and POTCAR to use; it is left untouched."""
    incar: dict[str, Any] = field(default_factory=dict)
    """Instead of a folder: tags of INCAR."""
    xc: str = ""
    """With `incar`: ASE's name of a functional ("pbe", "r2scan", "optb88-vdw"), which stands for some tags."""
    kpts: list[int] = field(default_factory=list)
    """With `incar`: divisions of the mesh; not with KSPACING."""
    gamma: bool = True
    """The mesh contains Γ; otherwise Monkhorst and Pack's."""
    pp_path: str = field(default="", metadata={"path": True})
    """With `incar`: folder of the potentials of one set, such as potpaw_PBE.64."""
    potcars: dict[str, str] = field(default_factory=dict)
    """With `incar`: element -> name in pp_path, such as { Ca = "Ca_sv", S = "S" }; their order is that of the species."""
    stress: bool = True
    """Labels carry the stress."""
    version: str = ""
    """As OUTCAR prints it ("6.4.2"): any other is refused.  Empty: that of the first label in a worker's folder."""
    ladder: list[dict[str, Any]] = field(default_factory=list)
    """Tags to try one after another when the SCF does not converge; only such as lead to the same solution."""
    restart: bool = False
    """Start from the WAVECAR of the label before: faster, but then a label depends on its history."""
    session: Literal["file", "interactive"] = "file"
    """"interactive": VASP keeps running (INTERACTIVE = .TRUE.) while atoms, charge, multiplicity and cell stay: no start, and the
    orbitals of the frame before, on which a label then depends.  Needs ISYM = 0.  The ladder runs by itself.  Tried on stand-ins only."""
    restart_every: int = 500
    """Labels of one start of a session."""
    keep_files: Keep = "failed"
    _live: Session[RunningVasp] = field(init=False, repr=False, compare=False, default_factory=lambda: Session("vasp"))

    def __post_init__(self) -> None:
        if bool(self.folder) == bool(self.incar):
            raise OracleConfigError(
                "[oracle.vasp] give either folder (with INCAR, KPOINTS, POTCAR) or incar = {...}, and not both"
            )
        for key in ("xc", "kpts", "pp_path", "potcars"):
            if self.folder and getattr(self, key):
                raise OracleConfigError(f"[oracle.vasp] {key} has no meaning beside folder, whose files say it")
        spacing = "KSPACING" in {key.upper() for key in self.incar}
        if self.incar and bool(self.kpts) == spacing:
            raise OracleConfigError("[oracle.vasp] give kpts, for example [2, 2, 2], or kspacing in incar, and not both")
        if self.incar and not (self.pp_path and self.potcars):
            raise OracleConfigError('[oracle.vasp] incar needs pp_path and potcars, for example potcars = { O = "O", H = "H" }')
        if self.kpts and (len(self.kpts) != 3 or min(self.kpts) < 1):
            raise OracleConfigError(f"[oracle.vasp] kpts are three positive divisions, got {self.kpts}")
        ladder = [{key.upper(): value for key, value in rung.items()} for rung in self.ladder]
        check_rungs("vasp", ladder, SCF_TAGS)
        for rung in ladder:
            if str(rung.get("ALGO", "all")).lower() not in ALGORITHMS:
                raise OracleConfigError(f"[oracle.vasp] ladder: ALGO = {rung['ALGO']} does not end in the ground state")
        check_session("vasp", self.session != "file", self.restart, self.restart_every)
        weakref.finalize(self, self._live.stop, failed=False)

    @property
    def code(self) -> str:
        """Name, and version where it is prescribed; a label names the version that its output printed."""
        return f"vasp {self.version}".rstrip()

    @property
    def capabilities(self) -> Capabilities:
        """Crystals, and molecules in a box."""
        return Capabilities(stress=self.stress, periodic=True, charge=True, spin=True)

    def physics(self) -> dict[str, Any]:
        """Tags but those that only lead to convergence, spread the work or come with the frame; k-points; POTCARs; the version."""
        return {
            "code": self.code,
            "stress": self.stress,
            "incar": self._incar.physics(),
            "kpoints": normal_kpoints(self._kpoints),
            "potcars": {p.symbol: [p.title, p.checksum] for p, _ in self._potentials},
            "kernel": sha256(self._kernel.decode("latin-1")) if self._kernel else "",
        }

    def check(self, frame: Frames) -> None:
        """Program, files, tags and elements.  Raises: OracleConfigError, EnvironmentProblem."""
        program("vasp", self.command)
        if frame.cell is None:
            raise OracleConfigError(
                "the oracle vasp labels periodic frames only; put the molecule into a box in the i-PI input and set [system] periodic = true"
            )
        if np.linalg.det(frame.cell[0]) <= 0:
            raise OracleConfigError(f"VASP wants a right-handed cell, got the vectors {frame.cell[0].tolist()}")
        self.physics()  # every file is read
        self._incar.check_single_point(self.stress)
        for name in ("LWAVE", "ISTART", "ICHARG") if self.restart else ():
            if name in self._incar.tags:
                raise OracleConfigError(f"{self._incar.where(self._incar.tags[name])}: remove it, restart = true sets it")
        if self.session != "file":
            self._incar.check_session()
        self._order(frame)
        self._incar.state_tags(frame, self._valence(frame))

    def __call__(self, frame: Frames) -> Label:
        """Label one frame, climbing the ladder while the SCF does not converge."""
        self.check(frame)
        return climb(self.ladder, lambda rung, changes: self._attempt(frame, rung, changes))

    def _attempt(self, frame: Frames, rung: int, changes: dict[str, Any]) -> Label:
        if rung == 0 and self.session == "interactive":
            result, facts = self._in_session(frame)
        else:
            name = fingerprint(self)
            shot = Shot("vasp", self.command, OUTPUT, self.keep_files, ("WAVECAR",) if self.restart else ())
            write, read = partial(self._write, frame, changes), partial(self._read, frame, name)
            result, facts = shot.fire(frame, name, rung, write, read)
        said = f"{REACHED!r} after {result.steps} of {result.parameters['NELM']} steps"
        evidence = "; ".join([said, f"version {result.version}", *facts])
        forces = np.empty_like(result.forces)
        forces[self._order(frame)] = result.forces
        stress = result.stress if self.stress else None
        label = make_label(self, frame, result.energy, forces, stress, evidence=evidence, rung=rung)
        return label if self.version else replace(label, code=f"vasp {result.version}")

    def _in_session(self, frame: Frames) -> tuple[VaspResult, list[str]]:
        """As `Shot.fire`, by the running code."""
        try:
            code = self._live.code(
                lambda running: running.fits(frame, self.restart_every), partial(self._start, frame), self.keep_files
            )
            with explained(code, "OUTCAR", OUTPUT):
                result = code.compute(self._fractions(frame))
                self._check_result(result, frame, fingerprint(self), DIGITS)
        except BaseException:
            self._live.stop(failed=True)
            raise
        return result, [start_in_words(code.labels)]

    def _start(self, frame: Frames, folder: Path) -> RunningVasp:
        tags = TAGS | {"NSW": str(self.restart_every + 1)}
        if "IWAVPR" not in self._incar.tags:
            tags["IWAVPR"] = "11"  # the density moves with the atoms
        words = program("vasp", self.command)
        return RunningVasp(words, folder, OUTPUT, frame, lambda work: self._write(frame, tags, work, ""))

    def _fractions(self, frame: Frames) -> Array:
        """(A, 3), atoms as in POSCAR."""
        cell = np.eye(3) if frame.cell is None else frame.cell[0]
        return np.linalg.solve(cell.T, frame.positions[0][self._order(frame)].T).T

    def close(self) -> None:
        """End the running code, if there is one."""
        self._live.stop(failed=False)

    def _order(self, frame: Frames) -> Array:
        """(A,) index in the frame of each atom of POSCAR.  Raises: OracleConfigError unless there is one POTCAR for each element."""
        have, want = [p.symbol for p, _ in self._potentials], {chemical_symbols[z] for z in frame.numbers}
        if len(set(have)) < len(have) or set(have) != want:
            source = f"{self.folder}/POTCAR" if self.folder else "[oracle.vasp] potcars"
            raise OracleConfigError(
                f"{source} has {' '.join(have)}, but the frame has {' '.join(sorted(want))}; give each element once"
            )
        rank = {atomic_numbers[symbol]: number for number, symbol in enumerate(have)}
        return np.argsort([rank[int(z)] for z in frame.numbers], kind="stable")

    def _valence(self, frame: Frames) -> float:
        """Electrons of the neutral frame."""
        per_atom = {atomic_numbers[p.symbol]: p.valence for p, _ in self._potentials}
        return sum(per_atom[int(z)] for z in frame.numbers)

    def _write(self, frame: Frames, changes: dict[str, Any], folder: Path, origin: str) -> None:
        from ase.io.vasp import write_vasp

        order = self._order(frame)
        cell = None if frame.cell is None else frame.cell[0]
        with (folder / "POSCAR").open("w", encoding="ascii") as file:
            write_vasp(file, Atoms(frame.numbers[order], frame.positions[0][order], cell=cell, pbc=True))
        added = {"NSW": "0", "IBRION": "-1", "ISIF": "2", "LWAVE": ".FALSE.", "LCHARG": ".FALSE."}
        if self.restart:
            added |= {"LWAVE": ".TRUE.", "ISTART": "1" if origin else "0"}
        added |= self._incar.state_tags(frame, self._valence(frame))
        # Latin 1 keeps every byte of the user's files
        (folder / "INCAR").write_bytes(self._incar.completed(added, changes).encode("latin-1"))
        (folder / "POTCAR").write_bytes("".join(text for _, text in self._potentials).encode("latin-1"))
        if self._kpoints:
            (folder / "KPOINTS").write_bytes(self._kpoints.encode("latin-1"))
        if self._kernel:
            (folder / KERNEL).write_bytes(self._kernel)

    def _read(self, frame: Frames, name: str, folder: Path, ended: str) -> VaspResult:
        """The result, with the folder's last words in any failure."""
        try:
            result = read_result(folder)
            self._check_result(result, frame, name, result.digits)
        except OracleError as error:
            raise type(error)(f"{error} ({ended})\n{last_words(folder, 'OUTCAR', OUTPUT)}") from error
        return result

    def _check_result(self, result: VaspResult, frame: Frames, name: str, tolerance: float) -> None:
        """Args: tolerance: Å, of the printed positions."""
        order = self._order(frame)
        as_sorted = replace(frame, numbers=frame.numbers[order], positions=frame.positions[:, order])
        check_geometry("VASP", as_sorted, result.numbers, result.positions, result.cell, tolerance, CELL_DIGITS)
        electrons = self._valence(frame) - frame.charge
        if not abs(float(result.parameters.get("NELECT", "nan")) - electrons) <= 1e-4:
            raise OracleInconsistent(f"VASP ran with {result.parameters.get('NELECT')} electrons, expected {electrons:g}")
        if self.stress and result.stress is None:
            raise OracleInconsistent("VASP printed no stress, though ISIF asked for it")
        check_version("vasp", name, self.version, result.version)

    @cached_property
    def _incar(self) -> Incar:
        """Read once: a process computes all its labels with the same input."""
        if self.folder:
            return Incar(self._own("INCAR"), str(Path(self.folder) / "INCAR"), True)
        from ase.calculators.vasp.create_input import GenerateVaspInput
        from ase.io.vasp_parsers.incar_writer import generate_incar_lines

        recipes: dict[str, Any] = GenerateVaspInput.xc_defaults
        if self.xc and self.xc.lower() not in recipes:
            raise OracleConfigError(f"[oracle.vasp] xc = {self.xc!r} is unknown to ASE; it knows {', '.join(sorted(recipes))}")
        recipe = dict(recipes.get(self.xc.lower(), {}))
        recipe.pop("pp", None)  # ASE's name of a set of potentials; here potcars names them
        tags = {key.upper(): value for key, value in recipe.items()} | {key.upper(): value for key, value in self.incar.items()}
        logical = {key: f".{str(value).upper()}." if isinstance(value, bool) else value for key, value in tags.items()}
        return Incar(generate_incar_lines(logical), "[oracle.vasp] incar", False)

    @cached_property
    def _kpoints(self) -> str:
        """Empty when INCAR has KSPACING."""
        if not self.folder:
            from ase.calculators.vasp.create_input import format_kpoints

            return format_kpoints(self.kpts, atoms=None, gamma=self.gamma) if self.kpts else ""
        if "KSPACING" in self._incar.tags and not (Path(self.folder) / "KPOINTS").exists():
            return ""
        return self._own("KPOINTS")

    @cached_property
    def _potentials(self) -> list[tuple[Potential, str]]:
        """The datasets in their order, with the text that belongs to each; all text is with the first one of a user's POTCAR."""
        if self.folder:
            text = self._own("POTCAR")
            found = potentials_of(text, f"{self.folder}/POTCAR")
            return [(potential, "" if number else text) for number, potential in enumerate(found)]
        return [self._potential(symbol, name) for symbol, name in self.potcars.items()]

    def _potential(self, symbol: str, name: str) -> tuple[Potential, str]:
        path = Path(self.pp_path) / name / "POTCAR"
        try:
            text = path.read_bytes().decode("latin-1")
        except OSError as error:
            raise OracleConfigError(f"[oracle.vasp] potcars: {path} cannot be read: {error.strerror}") from error
        found = potentials_of(text, str(path))
        if [p.symbol for p in found] != [symbol]:
            raise OracleConfigError(f"{path} is for {' '.join(p.symbol for p in found)}, but potcars names it for {symbol}")
        return found[0], text if text.endswith("\n") else text + "\n"

    @cached_property
    def _kernel(self) -> bytes:
        path = Path(self.folder) / KERNEL
        return path.read_bytes() if self.folder and path.exists() else b""

    def _own(self, name: str) -> str:
        path = Path(self.folder) / name
        try:
            return path.read_bytes().decode("latin-1")
        except OSError as error:
            raise OracleConfigError(
                f"[oracle.vasp] folder: {path} cannot be read: {error.strerror}; put your INCAR, KPOINTS and POTCAR there"
            ) from error
