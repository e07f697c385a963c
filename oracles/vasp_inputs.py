"""INCAR, KPOINTS and POTCAR of VASP: read with line numbers, checked against what a label is, completed by the few tags it needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bnn_driver.errors import OracleConfigError
from bnn_driver.oracle import check_multiplicity
from bnn_driver.records import Frames
from oracles.scrutiny import sha256

_SCF_TAGS = "ALGO NELM NELMIN NELMDL AMIX BMIX AMIX_MAG BMIX_MAG AMIN IMIX MAXMIX WC INIMIX MIXPRE MREMOVE TIME LSUBROT LMAXMIX"
SCF_TAGS = frozenset(_SCF_TAGS.split())
"""How the SCF gets to its solution, not where: the tags that a rung of the ladder may change."""
_MECHANICS = (
    "SYSTEM NCORE NPAR KPAR NSIM NBLK LPLANE LSCALAPACK LSCALU LSCAAWARE LASYNC MAXMEM NWRITE LWAVE LCHARG LVTOT LVHAR LELF LORBIT LAECHG "
    "LH5 LWAVEH5 LCHARGH5 NEDOS EMIN EMAX NSW IBRION ISIF POTIM NFREE EDIFFG MDALGO TEBEG TEEND SMASS NBLOCK KBLOCK APACO NPACO ISTART "
    "ICHARG NELECT NUPDOWN IWAVPR"
)
MECHANICS = frozenset(_MECHANICS.split())
"""What does not fix the level of theory of a single point, or comes with the frame."""
ALGORITHMS = ("normal", "n", "veryfast", "v", "fast", "f", "conjugate", "c", "all", "a", "damped", "d")
"""Values of ALGO that end in the self-consistent ground state."""


@dataclass(frozen=True)
class Tag:
    """One assignment of an INCAR."""

    number: int
    """The line, from 1."""
    name: str
    """Upper case."""
    value: str
    """Without comment, with single blanks."""

    @property
    def canonical(self) -> str:
        """The value such that 520 and 520.0, T and .TRUE. are the same."""
        return " ".join(_canonical(word) for word in self.value.split())

    @property
    def true(self) -> bool:
        """As VASP reads a logical."""
        return _canonical(self.value) == "T"

    @property
    def number_or_none(self) -> float | None:
        """The first word, when it is a number."""
        return _number(self.value.split()[0]) if self.value.split() else None


@dataclass(frozen=True)
class Incar:
    """The text of an INCAR and where it comes from."""

    text: str
    source: str
    """A path, or the table of the config; for messages."""
    own_file: bool
    """A file of the user's, whose lines can be pointed at."""

    @cached_property
    def tags(self) -> dict[str, Tag]:
        """Name -> assignment.  Raises: OracleConfigError when two assignments of a tag differ (VASP takes the first)."""
        found: dict[str, Tag] = {}
        for tag in tags_of(self.text):
            first = found.setdefault(tag.name, tag)
            if first.canonical != tag.canonical:
                raise OracleConfigError(f"{self.where(tag)}: line {first.number} says {first.value}; remove one of the two")
        return found

    def where(self, tag: Tag) -> str:
        """For the start of a message."""
        place = f"{self.source}, line {tag.number}" if self.own_file else self.source
        return f"{place}: {tag.name} = {tag.value}"

    def check_single_point(self, stress: bool) -> None:
        """Refuse whatever makes the run more or less than one converged calculation of the frame.  Raises: OracleConfigError."""
        for tag in self.tags.values():
            effect = next((text for pattern, bad, text in REFUSED if re.fullmatch(pattern, tag.name) and bad(tag)), "")
            if not effect and stress and tag.name == "ISIF" and tag.number_or_none in (0, 1):
                effect = "leaves the label without stress (or set [oracle.vasp] stress = false)"
            if effect:
                raise OracleConfigError(
                    f"{self.where(tag)} {effect}; remove it: a label is one converged single-point calculation"
                )

    def check_session(self) -> None:
        """Refuse what cannot go on over several frames.  Raises: OracleConfigError."""
        symmetry = self.tags.get("ISYM")
        if symmetry is None or symmetry.number_or_none not in (-1, 0):
            said = f"{self.source} has no ISYM" if symmetry is None else self.where(symmetry)
            raise OracleConfigError(
                f'{said}: session = "interactive" needs ISYM = 0 or -1, for VASP looks for symmetry in the first frame only'
            )

    def state_tags(self, frame: Frames, valence: float) -> dict[str, str]:
        """The tags for charge and multiplicity that the file does not have yet.

        Args: valence: electrons of the neutral atoms, by their POTCARs.   Raises: OracleConfigError if the file contradicts.
        """
        added = {}
        electrons, unpaired = valence - frame.charge, frame.multiplicity - 1
        meaning = f"[system] charge = {frame.charge} (the POTCARs have {valence:g} electrons)"
        if not self._agrees("NELECT", electrons, meaning) and frame.charge != 0:
            added["NELECT"] = f"{electrons:g}"
        wish, spin = f"[system] multiplicity = {frame.multiplicity}", self.tags.get("ISPIN")
        polarised = spin is not None and spin.number_or_none == 2
        if unpaired:
            if spin is not None and not polarised and not self._is_true("LNONCOLLINEAR"):
                raise OracleConfigError(f"{self.where(spin)} contradicts {wish}; write ISPIN = 2 or remove the line")
            if spin is None:
                added["ISPIN"] = "2"
            if not self._agrees("NUPDOWN", unpaired, wish):
                added["NUPDOWN"] = str(unpaired)
            check_multiplicity(frame, electrons)
        elif (fixed := self.tags.get("NUPDOWN")) is not None and (fixed.number_or_none or 0) > 0:
            raise OracleConfigError(f"{self.where(fixed)} contradicts {wish}; make the two agree, or remove the line")
        return added

    def _is_true(self, name: str) -> bool:
        return name in self.tags and self.tags[name].true

    def _agrees(self, name: str, value: float, wish: str) -> bool:
        """False when the tag is not there."""
        tag = self.tags.get(name)
        if tag is None:
            return False
        if tag.number_or_none is None or abs(tag.number_or_none - value) > 1e-6:
            raise OracleConfigError(
                f"{self.where(tag)} contradicts {wish}: expected {value:g}; make the two agree, or remove the line"
            )
        return True

    def completed(self, added: dict[str, str], replaced: dict[str, Any]) -> str:
        """The text with tags that it lacks at its end; lines with tags that are replaced become comments."""
        replaced = {key.upper(): value for key, value in replaced.items()}
        old = {tag.number for tag in tags_of(self.text) if tag.name in replaced}
        raw = self.text.rstrip("\n").split("\n")
        kept = [f"# {line}" if number in old else line for number, line in enumerate(raw, 1)]
        # other tags of such a line are given again
        rescued = {t.name: t.value for t in tags_of(self.text) if t.number in old and t.name not in replaced}
        missing = {name: value for name, value in added.items() if name not in self.tags}
        new = rescued | missing | replaced
        block = ["# added by bnn-driver", *(f"{name} = {_written(value)}" for name, value in new.items())] if new else []
        return "\n".join([*kept, *block]) + "\n"

    def physics(self) -> dict[str, str]:
        """The tags that fix the level of theory; comments, blanks and ways to write a number do not count."""
        return {name: tag.canonical for name, tag in sorted(self.tags.items()) if name not in MECHANICS | SCF_TAGS}


def _positive(tag: Tag) -> bool:
    return tag.number_or_none is None or tag.number_or_none > 0


def _set(tag: Tag) -> bool:
    return tag.true


#: pattern of tags, which values are refused, and what they do
REFUSED: list[tuple[str, Callable[[Tag], bool], str]] = [
    ("NSW", _positive, "moves the atoms"),
    # with NSW = 0 VASP itself turns 0 to 3 into -1
    ("IBRION", lambda tag: tag.number_or_none not in (-1, 0, 1, 2, 3), "computes vibrations or responses"),
    ("PSTRESS", lambda tag: tag.number_or_none != 0, "turns the energy into an enthalpy"),
    ("ISTART", lambda tag: tag.number_or_none != 0, "makes a label depend on an earlier run (see restart = true)"),
    ("ICHARG", lambda tag: tag.number_or_none not in (0, 2), "reads or fixes a density"),
    ("ALGO", lambda tag: tag.value.lower() not in ALGORITHMS, "does not end in the self-consistent ground state"),
    ("IALGO", lambda tag: tag.number_or_none not in (8, 38, 48, 53, 54, 58), "does not end in the self-consistent ground state"),
    ("ML_LMLFF", _set, "takes forces from a machine-learned force field"),
    ("IMAGES", _positive, "computes a chain of images"),
    ("INTERACTIVE|LEPSILON|LCALCEPS|LRPA|LCHIMAG|LMP2LT|LSMP2LT", _set, "computes something else than energy and forces"),
    ("PLUGINS/.*", _set, "lets a plug-in change the calculation"),
]


def tags_of(text: str) -> Iterator[Tag]:
    """The assignments of an INCAR: comments after # or !, several on a line after ;, longer ones after \\ or in quotes."""
    rest, start = "", 0
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw if rest.count('"') % 2 else re.split(r"[#!]", raw, maxsplit=1)[0]
        line, start = (f"{rest} {line}", start) if rest else (line, number)
        stripped = line.rstrip()
        if stripped.endswith("\\") or stripped.count('"') % 2:
            rest = stripped.removesuffix("\\")
            continue
        rest = ""
        for part in line.split(";") if '"' not in line else [line]:
            name, equals, value = part.partition("=")
            if equals:
                yield Tag(start, "".join(name.split()).upper(), " ".join(value.split()))


def _canonical(word: str) -> str:
    if re.fullmatch(r"\.?(t|true)\.?", word, re.IGNORECASE):
        return "T"
    if re.fullmatch(r"\.?(f|false)\.?", word, re.IGNORECASE):
        return "F"
    number = _number(word)
    return word.upper() if number is None else repr(number)


def _number(word: str) -> float | None:
    try:
        return float(re.sub("[dD]", "e", word))
    except ValueError:
        return None


def _written(value: Any) -> str:
    """As INCAR wants it."""
    if isinstance(value, bool):
        return f".{str(value).upper()}."
    if isinstance(value, (list, tuple)):
        return " ".join(_written(item) for item in value)
    return str(value)


@dataclass(frozen=True)
class Potential:
    """One dataset of a POTCAR."""

    symbol: str
    title: str
    """The line TITEL, such as "PAW_PBE O 08Apr2002"."""
    valence: float
    """Electrons, ZVAL."""
    checksum: str
    """SHA-256 of the dataset."""


def potentials_of(text: str, source: str) -> list[Potential]:
    """The datasets of a POTCAR, in its order.  Raises: OracleConfigError if it has none, or one without title or valence."""
    found = []
    blocks = re.split(r"(?<=End of Dataset)[ \t\r]*\n", text)
    for number, block in enumerate((b for b in blocks if b.strip()), 1):
        title, valence = re.search(r"TITEL\s*=\s*(.+)", block), re.search(r"ZVAL\s*=\s*([\d.]+)", block)
        symbol = re.match(r"\S+\s+([A-Z][a-z]?)", title[1]) if title else None
        if not (title and valence and symbol):
            raise OracleConfigError(
                f"{source}: dataset {number} has no TITEL with an element, or no ZVAL; expected a POTCAR of VASP"
            )
        found.append(Potential(symbol[1], " ".join(title[1].split()), float(valence[1]), sha256(block.strip())))
    if not found:
        raise OracleConfigError(f"{source} is empty; expected a POTCAR of VASP")
    return found


def normal_kpoints(text: str) -> str:
    """KPOINTS without its first line, which is a comment, and with single blanks."""
    return "\n".join(" ".join(line.lower().split()) for line in text.strip().split("\n")[1:])
