"""control.in of FHI-aims: read with line numbers, checked against what a label is, and completed by the few keywords it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ase.data import atomic_numbers

from bnn_driver.errors import OracleConfigError
from bnn_driver.records import Frames
from oracles.scrutiny import sha256

_SCF_KEYWORDS = (
    "charge_mix_param spin_mix_param prec_mix_param linear_mix_param linear_spin_mix_param ini_linear_mixing ini_linear_mix_param "
    "ini_spin_mix_param n_max_pulay mixer preconditioner sc_iter_limit sc_init_iter sc_init_factor adjust_scf"
)
SCF_KEYWORDS = frozenset(_SCF_KEYWORDS.split())
"""How the SCF gets to its solution, not where: the keywords that a rung of the ladder may change."""
_MECHANICS = (
    "output output_level verbatim_writeout walltime use_local_index load_balancing collect_eigenvectors use_alltoall use_mpi_in_place "
    "compute_forces compute_analytical_stress charge fixed_spin_moment multiplicity"
)
MECHANICS = frozenset(_MECHANICS.split())
"""What does not fix the level of theory, or comes with the frame."""
OFF, ON = (".false.", "false", "f", ".f."), (".true.", "true", "t", ".t.")
EARLIER_RUN = "makes a label depend on an earlier run; see restart = true"
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "relax_geometry": (("none",), "moves the atoms"),
    "relax_unit_cell": (("none",), "changes the cell"),
    "MD_run": ((), "moves the atoms"),
    "MD_schedule": ((), "moves the atoms"),
    "use_pimd_wrapper": ((), "waits for i-PI"),
    "plumed": (OFF, "changes the forces"),
    "external_pressure": (("0", "0.0", "0."), "adds a pressure to the energy and the stress"),
    "postprocess_anyway": (OFF, "lets an unconverged run end as if it had converged"),
    "compute_forces": (ON, "leaves the label without forces"),
    "compute_numerical_stress": (OFF, "repeats the calculation for strained cells; compute_analytical_stress does not"),
    "total_energy_method": ((), "computes an energy that the forces do not belong to"),
    "dry_run": (OFF, "computes nothing"),
    "restart": ((), EARLIER_RUN),
    "restart_read_only": ((), EARLIER_RUN),
    "restart_write_only": ((), "fills the work folders"),
    "elsi_restart": ((), EARLIER_RUN),
}
"""Keyword -> the values that are harmless, and what any other does."""


@dataclass(frozen=True)
class Line:
    """A line of control.in that is not empty, without its comment."""

    number: int
    """From 1."""
    keyword: str
    value: str
    """The rest, with single blanks."""


@dataclass(frozen=True)
class Control:
    """The text of a control.in and where it comes from."""

    text: str
    source: str
    """A path, or the table of the config; for messages."""
    own_file: bool
    """A file of the user's, whose lines can be pointed at."""

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """All lines that say something."""
        return tuple(lines_of(self.text))

    def where(self, line: Line) -> str:
        """For the start of a message."""
        place = f"{self.source}, line {line.number}" if self.own_file else self.source
        return f"{place}: {line.keyword} {line.value}".rstrip()

    def find(self, keyword: str) -> Line | None:
        """The last line of a keyword."""
        return next((line for line in reversed(self.lines) if line.keyword == keyword), None)

    @cached_property
    def species(self) -> dict[str, int]:
        """Name of each species -> atomic number."""
        found: dict[str, int] = {}
        name = ""
        for line in self.lines:
            if line.keyword == "species":
                name = line.value
                found[name] = atomic_numbers.get(name, 0)
            elif line.keyword == "nucleus" and name:
                found[name] = self._nucleus(line)
        return found

    def _nucleus(self, line: Line) -> int:
        try:
            return round(float(line.value.split()[0]))
        except (ValueError, IndexError):
            raise OracleConfigError(f"{self.where(line)}: expected a nuclear charge") from None

    def check_single_point(self, stress: bool) -> None:
        """Refuse whatever makes the run more or less than one converged calculation of the frame.  Raises: OracleConfigError."""
        for line in self.lines:
            harmless, effect = REFUSED.get(line.keyword, ((line.value.lower(),), ""))
            if line.value.lower() not in harmless:
                raise OracleConfigError(
                    f"{self.where(line)} {effect}; remove it: a label is one converged single-point calculation"
                )
            if stress and line.keyword == "compute_analytical_stress" and line.value.lower() not in ON:
                raise OracleConfigError(
                    f"{self.where(line)} leaves the label without stress; remove it, or set [oracle.aims] stress = false"
                )

    def names_of(self, frame: Frames) -> list[str]:
        """The species of each atom.  Raises: OracleConfigError when an element has none or several."""
        by_number: dict[int, list[str]] = {}
        for name, number in self.species.items():
            by_number.setdefault(number, []).append(name)
        symbols = {number: symbol for symbol, number in atomic_numbers.items()}
        for number in sorted({int(z) for z in frame.numbers}):
            names = by_number.get(number, [])
            if len(names) != 1:
                found = (
                    f"has {len(names)} species of {symbols[number]} ({', '.join(names)})"
                    if names
                    else f"has no {symbols[number]}"
                )
                raise OracleConfigError(
                    f"{self.source} {found}; give exactly one block 'species {symbols[number]}' for each element of the frame"
                )
        return [by_number[int(z)][0] for z in frame.numbers]

    def check_boundary(self, frame: Frames) -> None:
        """k-points belong to a cell, and a cell to k-points.  Raises: OracleConfigError."""
        grid = next((x for x in self.lines if x.keyword in ("k_grid", "k_grid_density", "k_points_external")), None)
        if frame.periodic and grid is None:
            raise OracleConfigError(f"{self.source} has no k_grid, but the frame is periodic; add for example 'k_grid 1 1 1'")
        if grid is not None and not frame.periodic:
            raise OracleConfigError(f"{self.where(grid)}: the frame is a molecule; remove it, or set [system] periodic = true")

    def state_keywords(self, frame: Frames) -> dict[str, str]:
        """The keywords for charge and multiplicity that the file does not have yet.  Raises: OracleConfigError if it contradicts."""
        added = {}
        if not self._agrees("charge", frame.charge, f"[system] charge = {frame.charge}") and frame.charge != 0:
            added["charge"] = str(frame.charge)
        unpaired, wish = frame.multiplicity - 1, f"[system] multiplicity = {frame.multiplicity}"
        fixed = self._agrees("fixed_spin_moment", unpaired, wish)
        fixed = self._agrees("multiplicity", frame.multiplicity, wish) or fixed
        spin, moment = self.find("spin"), self.find("default_initial_moment")
        if frame.multiplicity == 1:
            # FHI-aims takes Hund's rules for a single atom
            if spin is not None and spin.value.lower() == "collinear" and moment is None and len(frame.numbers) > 1:
                raise OracleConfigError(
                    f"{self.where(spin)} needs initial moments, and geometry.in is written anew for each label; "
                    "add a line default_initial_moment"
                )
            return added
        if spin is not None and spin.value.lower() != "collinear":
            raise OracleConfigError(f"{self.where(spin)} contradicts {wish}; write 'spin collinear' or remove the line")
        if spin is None:
            added["spin"] = "collinear"
        if not fixed:
            added["fixed_spin_moment"] = str(unpaired)
        if moment is None:
            added["default_initial_moment"] = f"{unpaired / len(frame.numbers):.4f}"
        return added

    def _agrees(self, keyword: str, value: int, wish: str) -> bool:
        """False when the keyword is not there."""
        line = self.find(keyword)
        if line is None:
            return False
        try:
            same = abs(float(line.value.split()[0]) - value) < 1e-9
        except (ValueError, IndexError):
            same = False
        if not same:
            raise OracleConfigError(f"{self.where(line)} contradicts {wish}; make the two agree, or remove the line")
        return True

    def completed(self, added: dict[str, str], replaced: dict[str, Any]) -> str:
        """The text with more keywords before the first species; lines of keywords that are replaced become comments."""
        new = {key: _written(value) for key, value in (added | replaced).items()}
        for line in self.lines:
            if line.keyword not in replaced:
                new.pop(line.keyword, None)  # it is there already, and was checked to say the same
        raw = self.text.split("\n")
        start = next((line.number for line in self.lines if line.keyword == "species"), len(raw))
        old = {line.number for line in self.lines if line.keyword in replaced}
        kept = [f"# {text}" if number in old else text for number, text in enumerate(raw, 1)]
        block = ["# added by bnn-driver", *(f"{key} {value}" for key, value in new.items())] if new else []
        return "\n".join([*kept[: start - 1], *block, *kept[start - 1 :]])

    def physics(self) -> dict[str, Any]:
        """The keywords that fix the level of theory, sorted, and a hash of each species; comments and blanks do not count."""
        general: list[str] = []
        species: dict[str, list[str]] = {}
        name = ""
        for line in self.lines:
            if line.keyword == "species":
                name = line.value
                species[name] = []
            if line.keyword not in MECHANICS | SCF_KEYWORDS:
                # a general keyword after the species counts as part of the last one: it fixes the level of theory either way
                (species[name] if name else general).append(f"{line.keyword} {line.value}".rstrip())
        return {"control": sorted(general), "species": {name: sha256("\n".join(block)) for name, block in species.items()}}


def lines_of(text: str) -> Iterator[Line]:
    """The lines that say something."""
    for number, raw in enumerate(text.split("\n"), 1):
        words = raw.split("#", 1)[0].split()
        if words:
            yield Line(number, words[0], " ".join(words[1:]))


def _written(value: Any) -> str:
    """As control.in wants it."""
    if isinstance(value, bool):
        return f".{str(value).lower()}."
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    return str(value)
