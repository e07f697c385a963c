"""Any ASE calculator, named by its import path: the door to the codes that have no file of their own here.

ASE fixes how a calculator is asked, but not how it says that it did not converge, nor where charge and spin go: both stand in the
config, and without them nothing is assumed.  Every label starts cold, so that it depends on its structure only; the calculator
itself stays, with its libraries and child processes, until the atoms change or anything goes wrong.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators import calculator as ase_base
from ase.data import chemical_symbols
from ase.stress import voigt_6_to_full_3x3_stress

from bnn_driver.errors import (
    BnnError,
    EnvironmentProblem,
    GeometryRejected,
    OracleConfigError,
    OracleCrashed,
    OracleInconsistent,
    SCFNotConverged,
    UnstableState,
)
from bnn_driver.oracle import Capabilities, check_capabilities, make_label
from bnn_driver.records import Array, Frames, Label
from oracles import convergence

MOMENT = 0.5
"""Bohr magnetons by which the magnetic moment may differ from the one that the multiplicity asks for."""
MISSPELT = 0.85
"""Likeness (difflib) beyond which an unknown argument is taken for a slip, not for one that the calculator does not list."""


@dataclass(frozen=True)
class AseCalculator:
    """An ASE calculator with its keyword arguments; energy, forces and, for periodic frames, stress."""

    calculator: str
    """"module:Class", for example "ase.calculators.emt:EMT"; also a function that returns a calculator."""
    convergence: str
    """What says that a calculation converged: "exception" (the calculator raises an error when it did not), "attribute:NAME" (true
    then; dots reach further in), "regex:FILE:PATTERN" (found in what was written to the log since the frame began)."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Passed on as they are.  Paths are absolute: the calculator runs in a folder of its own."""
    mechanics: list[str] = field(default_factory=list)
    """Names of arguments that do not touch the level of theory (command, number of cores, name of a log); all others fix it."""
    stress: bool = True
    """Labels of periodic frames carry the stress.  A code without it may not know cells at all: look before you say false."""
    charge_key: str = ""
    """Where the charge goes: "argument:NAME", "info:NAME" (of the Atoms) or "initial_charges" (spread evenly); empty: neutral only."""
    multiplicity_key: str = ""
    """Where 2S+1 goes: "argument:NAME", "info:NAME" or "magmoms" (initial moments, summing to 2S); empty: multiplicity 1 only."""
    box: float = field(default=0.0, metadata={"quantity": "length"})
    """Å, edge of a cube around a molecule, for codes that need a cell; 0: no cell."""
    code: str = ""
    """Name and version of the code; found out for calculators that are a package of their own."""
    _code_of_physics: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _split(self.calculator)
        convergence.parse(self.convergence)
        self._check_arguments()
        _check_key("charge_key", self.charge_key, "initial_charges", self.arguments)
        _check_key("multiplicity_key", self.multiplicity_key, "magmoms", self.arguments)
        if self.box < 0:
            raise OracleConfigError(f"ase: box must not be negative, got {self.box} Å")
        if self.code:
            exact = self.code
        else:
            name, version = _code_of(self.calculator)
            object.__setattr__(self, "code", f"{name} {version}")
            exact = f"{name} {'.'.join(version.split('.')[:2])}"
        object.__setattr__(self, "_code_of_physics", exact)

    def _check_arguments(self) -> None:
        for name in self.mechanics:
            if name not in self.arguments:
                raise OracleConfigError(
                    f"ase: mechanics names {name!r}, which is not among the arguments: {', '.join(self.arguments) or 'none'}"
                )
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise OracleConfigError(f"ase: arguments must be numbers, texts, lists and tables: {error}") from None

    @property
    def capabilities(self) -> Capabilities:
        """Molecules and crystals; charge and spin where the config says how they are told."""
        return Capabilities(stress=self.stress, periodic=True, charge=bool(self.charge_key), spin=bool(self.multiplicity_key))

    def physics(self) -> dict[str, Any]:
        """The code (as major.minor where it was found out), the class, its arguments but the mechanics, and how it is told the state."""
        return {
            "code": self._code_of_physics,
            "calculator": self.calculator,
            "arguments": {k: v for k, v in self.arguments.items() if k not in self.mechanics},
            "stress": self.stress,
            "charge_key": self.charge_key,
            "multiplicity_key": self.multiplicity_key,
            "box": self.box,
        }

    def check(self, frame: Frames) -> None:
        """Build the calculator and ask what it can.  Raises: OracleConfigError, EnvironmentProblem."""
        check_capabilities(self, frame)
        calculator = self._built(frame)
        able = getattr(calculator, "implemented_properties", None)
        for name in self._wanted(frame):
            if able is not None and name not in able:
                hint = "; set stress = false if it knows cells nevertheless" if name == "stress" else ""
                raise OracleConfigError(f"{self.code} gives no {name}, only {', '.join(sorted(set(able)))}{hint}")

    def __call__(self, frame: Frames) -> Label:
        """Label one frame.  Raises: OracleError, EnvironmentProblem; never an error of the calculator itself."""
        check_capabilities(self, frame)
        calculator = self._taken(frame)
        verdict = convergence.parse(self.convergence)(calculator)
        results = evaluate(self.code, calculator, self._atoms(frame), self._wanted(frame))
        evidence = f"{verdict()}; {results.energy_name}"
        self._check_moment(results.moment, frame)
        self._shelf.put(_sort(frame, self._state(frame)), calculator)
        return make_label(self, frame, results.energy, results.forces, results.stress, evidence=evidence)

    @cached_property
    def _shelf(self) -> _Shelf:
        """Where the calculator of this process waits for the next frame."""
        return _Shelf()

    def _taken(self, frame: Frames) -> Any:
        """A calculator that remembers no frame, taken from the shelf: one that fails does not come back."""
        calculator = self._shelf.take(_sort(frame, self._state(frame)))
        return self._built(frame) if calculator is None else calculator

    def _built(self, frame: Frames) -> Any:
        make = _imported(self.calculator)
        try:
            calculator = make(**copy.deepcopy(self.arguments), **self._state(frame))
        except (ase_base.EnvironmentError, ase_base.BadConfiguration, ImportError, OSError) as error:
            raise EnvironmentProblem(f"{self.calculator} cannot be set up: {type(error).__name__}: {error}") from error
        except Exception as error:  # whatever a foreign constructor raises, it is about its arguments
            raise OracleConfigError(
                f"{self.calculator} does not take these arguments: {type(error).__name__}: {error}; see [oracle.ase] arguments"
            ) from error
        if not hasattr(calculator, "get_property") and not hasattr(calculator, "get_potential_energy"):
            raise OracleConfigError(f"{self.calculator} gave a {type(calculator).__name__}, which is no ASE calculator")
        _check_spelling(self.calculator, make, calculator, self.arguments)
        check_elements(self.code, calculator, frame)
        return calculator

    def _state(self, frame: Frames) -> dict[str, int]:
        """Charge and multiplicity, where they are arguments."""
        pairs = ((self.charge_key, frame.charge), (self.multiplicity_key, frame.multiplicity))
        return {key.removeprefix("argument:"): value for key, value in pairs if key.startswith("argument:")}

    def _atoms(self, frame: Frames) -> Atoms:
        atoms = atoms_of(frame)
        if self.box > 0 and not frame.periodic:
            atoms.set_cell(np.eye(3) * self.box)
            atoms.positions += self.box / 2 - atoms.positions.mean(axis=0)
        for key, value in ((self.charge_key, frame.charge), (self.multiplicity_key, frame.multiplicity)):
            if key.startswith("info:"):
                atoms.info[key.removeprefix("info:")] = value
        if self.charge_key == "initial_charges":
            atoms.set_initial_charges(np.full(len(atoms), frame.charge / len(atoms)))
        if self.multiplicity_key == "magmoms":
            atoms.set_initial_magnetic_moments(np.full(len(atoms), (frame.multiplicity - 1) / len(atoms)))
        return atoms

    def _wanted(self, frame: Frames) -> list[str]:
        return ["energy", "forces", *(["stress"] if self.stress and frame.periodic else [])]

    def _check_moment(self, moment: float | None, frame: Frames) -> None:
        """Initial moments are a guess from which the code may go to another spin state."""
        wanted = frame.multiplicity - 1
        if self.multiplicity_key == "magmoms" and moment is not None and abs(abs(moment) - wanted) > MOMENT:
            raise UnstableState(
                f"{self.code} went to a magnetic moment of {moment:.2f}, but multiplicity {frame.multiplicity} has {wanted}; "
                "fix the moment by an argument of the calculator"
            )


class _Shelf:
    """At most one calculator, with the sort of frame that it was built for."""

    def __init__(self) -> None:
        self._sort: tuple[Any, ...] = ()
        self._calculator: Any = None

    def put(self, sort: tuple[Any, ...], calculator: Any) -> None:
        """Keep it, unless it has no way to forget a frame."""
        self._sort, self._calculator = sort, calculator if isinstance(calculator, ase_base.Calculator) else None

    def take(self, sort: tuple[Any, ...]) -> Any:
        """The calculator, empty of results and of what a next frame could start from; None if it is for other frames."""
        calculator, self._calculator = self._calculator, None
        if calculator is None or sort != self._sort:
            return None
        calculator.reset()
        return calculator


def _sort(frame: Frames, state: dict[str, int]) -> tuple[Any, ...]:
    return (frame.numbers.tolist(), frame.periodic, state)


@dataclass(frozen=True)
class Results:
    """What a calculator gave, in eV, eV/Å and eV/Å^3."""

    energy: float
    forces: Array
    """(A, 3)."""
    stress: Array | None
    """(3, 3), ASE's sign, or None where it was not wanted."""
    energy_name: str
    """Which of ASE's energies it is."""
    moment: float | None
    """Total magnetic moment in Bohr magnetons, where it is told."""


def atoms_of(frame: Frames) -> Atoms:
    """The frame as ASE's Atoms, a copy."""
    cell = None if frame.cell is None else frame.cell[0]
    return Atoms(frame.numbers, frame.positions[0], cell=cell, pbc=frame.periodic)


def evaluate(code: str, calculator: Any, atoms: Atoms, wanted: list[str]) -> Results:
    """One calculation.  Args: wanted: "energy", "forces", "stress".

    Raises: OracleError or EnvironmentProblem, whatever the calculator raised.
    """
    try:
        found = _calculated(calculator, atoms, wanted)
        missing = [name for name in wanted if found.get(name) is None]
        if missing:
            raise OracleConfigError(
                f"{code} gave no {' and no '.join(missing)}; see the arguments of the calculator, and stress = false"
            )
        consistent = found.get("free_energy") is not None
        moment = found.get("magmom")
        return Results(
            energy=float(found["free_energy"] if consistent else found["energy"]),
            forces=np.array(found["forces"], dtype=float),
            stress=_full(np.array(found["stress"], dtype=float)) if "stress" in wanted else None,
            energy_name="free_energy (of the forces)" if consistent else "energy, as it tells no free_energy",
            moment=None if moment is None else float(np.sum(moment)),
        )
    except BnnError:
        raise
    except Exception as error:  # the border to a foreign code
        raise _translated(code, error) from error


def _calculated(calculator: Any, atoms: Atoms, wanted: list[str]) -> dict[str, Any]:
    """ASE's results by name; everything in one calculation where the calculator allows that."""
    if isinstance(calculator, ase_base.BaseCalculator):
        calculator.calculate(atoms, list(wanted), list(ase_base.all_changes))
        return dict(calculator.results)
    atoms.calc = calculator
    found = {"forces": atoms.get_forces(), "stress": atoms.get_stress() if "stress" in wanted else None}
    try:
        found["free_energy"] = atoms.get_potential_energy(force_consistent=True)
    except (NotImplementedError, ase_base.PropertyNotPresent):
        found["free_energy"] = None
    return found | {"energy": atoms.get_potential_energy()}


def _full(stress: Array) -> Array:
    """(3, 3) from ASE's (6,) xx yy zz yz xz xy or from what is full already."""
    if stress.shape not in ((6,), (3, 3)):
        raise OracleInconsistent(f"the calculator gave a stress of shape {stress.shape}, expected (6,) or (3, 3)")
    return voigt_6_to_full_3x3_stress(stress) if stress.shape == (6,) else stress


def _translated(code: str, error: Exception) -> BnnError:
    """What an error of a calculator means."""
    text = f"{code}: {type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, ase_base.EnvironmentError | ase_base.BadConfiguration | ImportError):
        return EnvironmentProblem(text)
    if isinstance(error, ase_base.CalculatorSetupError | ase_base.PropertyNotPresent | NotImplementedError | TypeError):
        return OracleConfigError(f"{text}; see the arguments of the calculator")
    if isinstance(error, ase_base.SCFError) or "converge" in f"{type(error).__name__} {error}".lower():
        return SCFNotConverged(text)
    if isinstance(error, np.linalg.LinAlgError):
        return GeometryRejected(f"{text}; the structure has no solution, see the frame")
    return OracleCrashed(text)


def check_elements(code: str, calculator: Any, frame: Frames) -> None:
    """Refuse elements that the calculator does not know, where it keeps a list (`z_table`, as machine-learned potentials do)."""
    known = getattr(getattr(calculator, "z_table", None), "zs", None)
    unknown = [] if known is None else sorted({int(z) for z in frame.numbers} - {int(z) for z in known})
    if unknown:
        names = [" ".join(chemical_symbols[z] for z in numbers) for numbers in (known, unknown)]
        raise OracleConfigError(f"{code} knows the elements {names[0]}, but the frame has {names[1]}")


def _split(path: str) -> tuple[str, str]:
    module, _, name = path.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise OracleConfigError(f"ase: calculator = {path!r}; expected 'module:Class', for example 'ase.calculators.emt:EMT'")
    return module, name


def _check_key(option: str, key: str, array: str, arguments: dict[str, Any]) -> None:
    kind, _, name = key.partition(":")
    if key not in ("", array) and not (kind in ("argument", "info") and name):
        raise OracleConfigError(f"ase: {option} = {key!r}; expected 'argument:NAME', 'info:NAME' or {array!r}")
    if kind == "argument" and name in arguments:
        raise OracleConfigError(
            f"ase: {name!r} is among the arguments and in {option}; leave it to [system], out of the arguments"
        )


def _imported(path: str) -> Any:
    """The class.  Raises: EnvironmentProblem without its package, OracleConfigError if the package has no such class."""
    module, name = _split(path)
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).split(".")[0]
        if isinstance(error, ModuleNotFoundError) and importlib.util.find_spec(package) is not None:
            raise OracleConfigError(f"ase: calculator = {path!r}: {error}") from error
        raise EnvironmentProblem(
            f"the calculator {path} cannot be imported: {error}; pip install {package} (or the package that has it under another "
            "name), or put the folder of your own module on PYTHONPATH"
        ) from error
    if not callable(getattr(found, name, None)):
        close = difflib.get_close_matches(name, dir(found), n=1)
        raise OracleConfigError(f"ase: {module} has no class {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return getattr(found, name)


def _check_spelling(path: str, make: Any, calculator: Any, arguments: dict[str, Any]) -> None:
    """ASE's base class swallows any keyword: what looks like a slip of a known one would silently leave its default in force."""
    known = set(getattr(calculator, "default_parameters", {}))
    for function in [cls.__init__ for cls in inspect.getmro(make)] if inspect.isclass(make) else [make]:
        with contextlib.suppress(ValueError):  # not written in Python
            known |= set(inspect.signature(function).parameters)
    for name in arguments:
        close = difflib.get_close_matches(name, known, n=1, cutoff=MISSPELT)
        if name not in known and close:
            raise OracleConfigError(f"{path} has no argument {name!r}; did you mean {close[0]!r}?")


@functools.cache
def _code_of(path: str) -> tuple[str, str]:
    """Name and version of the code behind a calculator.

    Raises: OracleConfigError where it cannot be known.  ASE marks what has no files, so no program behind it, by `nolabel`.
    """
    module, name = _split(path)
    make = _imported(path)
    top = module.split(".")[0]
    packages = sorted(set(importlib.metadata.packages_distributions().get(top, [])))
    if not packages or (top == "ase" and not getattr(make, "nolabel", False)):
        raise OracleConfigError(
            f"the version of the code behind {path} cannot be found out; write it as code = 'NAME VERSION' in [oracle.ase]"
        )
    return f"{name} of {' and '.join(packages)}", importlib.metadata.version(packages[0])
