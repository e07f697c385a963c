"""Input folders and settings with which the stand-ins are used in the tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ase.test
import numpy as np

HERE = Path(__file__).parent
RECORDED = Path(next(iter(ase.test.__path__))) / "testdata"
"""Authentic outputs inside the ase package."""
VALENCES = {"H": 1.0, "He": 2.0, "O": 6.0, "C": 4.0, "Na": 1.0, "Cl": 7.0, "Ni": 10.0}
TITLES = {"Na": "PAW_PBE Na 08Apr2002", "Cl": "PAW_PBE Cl 06Sep2000", "Ni": "PAW_PBE Ni 02Aug2007", "O": "PAW_PBE O 08Apr2002"}
NUCLEI = {"H": 1, "He": 2, "O": 8}


def aims_command(answer: str, *options: str) -> list[str]:
    """Of the stand-in for FHI-aims."""
    return [sys.executable, str(HERE / "aims.py"), answer, str(RECORDED / "aims"), *options]


def vasp_command(answer: str, *options: str) -> list[str]:
    """Of the stand-in for VASP."""
    return [sys.executable, str(HERE / "vasp.py"), answer, str(RECORDED / "vasp"), *options]


def species(symbol: str) -> str:
    """The start of a block of control.in; the rest would be basis functions."""
    return (
        f"################\n#  a test's {symbol} atom\n  species        {symbol}\n#     global species definitions\n"
        f"    nucleus             {NUCLEI[symbol]}\n    l_hartree           4\n     hydro 2 p 3.5\n"
    )


def aims_folder(folder: Path, general: str = "xc pbe\n", elements: str = "H O He") -> Path:
    """A user's folder with a control.in."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "control.in").write_text(general + "".join(species(symbol) for symbol in elements.split()))
    return folder


def species_folder(folder: Path, extra: str = "") -> Path:
    """A folder like species_defaults/defaults_2020/light."""
    folder.mkdir(parents=True, exist_ok=True)
    for symbol, nucleus in NUCLEI.items():
        (folder / f"{nucleus:02}_{symbol}_default").write_text(species(symbol) + extra)
    return folder


def potcar(symbol: str) -> str:
    """The lines of a POTCAR that are read before a run; there is no potential in it."""
    title = TITLES.get(symbol, f"PAW_PBE {symbol} 08Apr2002")
    return (
        f"  {title}\n   {VALENCES[symbol]}\n parameters from PSCTR are:\n   VRHFIN ={symbol}: test\n   LEXCH  = PE\n\n"
        f"   TITEL  = {title}\n   LULTRA =        F    use ultrasoft PP ?\n   IUNSCR =        1    unscreen: 0-lin 1-nonlin 2-no\n"
        f"   RPACOR =    1.200    partial core radius\n   POMASS =   16.000; ZVAL   =    {VALENCES[symbol]:.3f}    mass and valenz\n"
        " End of Dataset\n"
    )


INCAR = "SYSTEM = test\nENCUT = 520\nEDIFF = 1E-06 ! tight\nGGA = PE\nISMEAR = 0; SIGMA = 0.05\n"
KPOINTS = "a comment\n0\nGamma\n 2 2 2\n 0 0 0\n"


def vasp_folder(folder: Path, incar: str = INCAR, elements: str = "O H", kpoints: str = KPOINTS) -> Path:
    """A user's folder with INCAR, KPOINTS and POTCAR."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "INCAR").write_text(incar)
    (folder / "KPOINTS").write_text(kpoints)
    (folder / "POTCAR").write_text("".join(potcar(symbol) for symbol in elements.split()))
    return folder


def potential_folder(folder: Path) -> Path:
    """A folder like potpaw_PBE.64."""
    for symbol in VALENCES:
        (folder / symbol).mkdir(parents=True, exist_ok=True)
        (folder / symbol / "POTCAR").write_text(potcar(symbol))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, to see whether it was touched."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def water(order: tuple[int, ...] = (0, 1, 2)) -> tuple[Any, Any]:
    """Numbers and positions of the recorded water of FHI-aims."""
    numbers = np.array([8, 1, 1])
    positions = np.array([[0.0, 0.0, 0.0], [0.9584, 0.0, 0.0], [-0.24, 0.9279, 0.0]])
    return numbers[list(order)], positions[list(order)]
