"""Every oracle with what is known about it: the frames it can label, its numerical noise, its settings and how it fails."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnn_driver.oracle import Oracle, load_oracle
from bnn_driver.records import Frames

TRICLINIC = np.array([[[4.6, 0.3, -0.2], [0.1, 4.4, 0.4], [-0.3, 0.2, 4.9]]])
WATER = Frames(np.array([8, 1, 1]), np.array([[[0.05, -0.02, 0.03], [0.98, 0.07, -0.04], [-0.31, 0.90, 0.11]]]), TRICLINIC)
ZUNDEL = Frames(
    np.array([8, 8, 1, 1, 1, 1, 1]),
    np.array(
        [
            [
                [-1.19, 0.02, 0.0],
                [1.21, -0.03, 0.02],
                [0.05, 0.08, -0.03],
                [-1.62, 0.75, 0.42],
                [-1.66, -0.81, 0.33],
                [1.68, 0.72, -0.44],
                [1.63, -0.79, -0.38],
            ]
        ]
    ),
    charge=1,
)
METHYL = Frames(
    np.array([6, 1, 1, 1]),
    np.array([[[0.03, -0.02, 0.35], [1.05, 0.04, 0.01], [-0.53, 0.92, -0.05], [-0.5, -0.95, 0.02]]]),
    charge=1,
)
"""Without unpaired electrons as a cation and as an anion: a restricted state is stable in both."""
ALLOY = Frames(
    np.array([29, 79, 29, 47]),
    np.array([[[0.05, -0.02, 0.13], [2.03, 1.94, -0.06], [1.88, 0.14, 2.05], [-0.08, 2.11, 1.97]]]),
    np.array([[[4.0, 0.3, -0.2], [0.1, 3.9, 0.4], [-0.3, 0.2, 4.1]]]),
)


@dataclass(frozen=True)
class Subject:
    """One oracle."""

    name: str
    kind: str
    settings: dict[str, Any]
    step: float
    """Å, of the finite differences."""
    force_tolerance: float
    """eV/Å: truncation h²F'''/6 plus the code's own noise over h, with a margin of about five on what was measured."""
    invariance: float
    """eV, eV/Å and eV/Å^3, under rotation, translation and permutation (of a crystal in tblite: its Ewald sum ends elsewhere)."""
    physics: dict[str, Any]
    """Other values of settings that fix the level of theory."""
    mechanics: dict[str, Any]
    """Other values of settings that do not."""
    spelt: dict[str, Any]
    """A default, or a value that `settings` has already, written in another way."""
    crystal: Frames = WATER
    """Without its cell it is the molecule."""
    atom: int = 2
    """A closed-shell element that the code knows."""
    ion: Frames = ZUNDEL
    """Labelled where charge is supported."""
    other_charge: int = -1
    """Of the ion: another number of electron pairs."""
    unconverged: dict[str, Any] = field(default_factory=dict)
    """Settings with which it does not converge; empty where nothing is iterated."""
    elsewhere: frozenset[str] = frozenset()
    """Settings that another subject or another test has."""
    memory: float = 0.0
    """eV, eV/Å and eV/Å^3 by which a label may depend on those before it, where a code keeps running and starts from the last frame."""
    forgetful: dict[str, Any] = field(default_factory=dict)
    """Settings with which every label is a cold one."""
    needs: str = "ase"
    """The module without which it is skipped."""
    crystals_only: bool = False
    egg_box: float = 0.0
    """What is added to `invariance` where the atoms move against a grid that stays."""

    def oracle(self, **changes: Any) -> Oracle:
        pytest.importorskip(self.needs)
        return load_oracle(self.kind, self.settings | changes)


TOY = Subject(
    "toy", "toy", {}, 1e-4, 2e-6, 1e-9,
    physics={"depth": "2 eV", "steepness": 2.0, "bending": "1 eV", "cutoff": "5 A"},
    mechanics={"delay": "1 ms"},
    spelt={"depth": "3 eV"},
    other_charge=2,
)  # fmt: skip
TBLITE = Subject(
    "tblite", "tblite", {}, 1e-3, 2e-4, 3e-5,
    physics={"method": "GFN1-xTB", "accuracy": 1.0, "electronic_temperature": "500 K"},
    mechanics={"max_iterations": 100},
    spelt={"electronic_temperature": "300 K"},
    unconverged={"max_iterations": 2},
    needs="tblite",
)  # fmt: skip
PYSCF = Subject(
    "pyscf", "pyscf", {"method": "rhf", "basis": "sto-3g"}, 1e-3, 2e-4, 1e-5,
    physics={"method": "uhf", "basis": "6-31g", "density_fit": False, "auxiliary_basis": "def2-universal-jkfit",
             "conv_tol": "1e-8 hartree", "conv_tol_grad": 1e-5},
    mechanics={"max_cycle": 100, "stability": "always", "small_gap": "1 eV", "initial_guess": "previous", "device": "gpu",
               "max_memory": 2000},
    spelt={"conv_tol": "1e-10 hartree"},
    unconverged={"max_cycle": 2, "basis": "def2-svp"},
    elsewhere=frozenset({"xc", "dispersion", "grid_level", "grid_response", "correlation", "frozen_core"}),
    needs="pyscf",
    ion=METHYL,
)  # fmt: skip
_PYSCF = PYSCF.settings.keys() | PYSCF.physics.keys() | PYSCF.mechanics.keys() | PYSCF.elsewhere
PYSCF_D3 = Subject(
    "pyscf-d3", "pyscf", {"method": "rks", "xc": "pbe", "basis": "sto-3g", "dispersion": "d3bj"}, 1e-3, 2e-4, 1e-2,
    physics={"xc": "blyp", "dispersion": "d4", "grid_level": 3, "grid_response": False},
    mechanics={},
    spelt={"correlation": ""},
    unconverged={"max_cycle": 2},
    elsewhere=_PYSCF,
    needs="pyscf.dispersion",
    ion=METHYL,
)  # fmt: skip
PYSCF_MP2 = Subject(
    "pyscf-mp2", "pyscf", {"method": "uhf", "basis": "6-31g", "correlation": "mp2", "density_fit": False}, 1e-3, 2e-4, 1e-5,
    physics={"method": "rhf", "correlation": "ccsd", "frozen_core": True, "basis": "sto-3g"},
    mechanics={},
    spelt={"dispersion": ""},
    ion=METHYL,
    unconverged={"max_cycle": 1, "basis": "def2-svp"},
    elsewhere=_PYSCF,
    needs="pyscf",
)  # fmt: skip
PYSCF_CC = replace(
    PYSCF_MP2,
    name="pyscf-ccsd(t)",
    settings=PYSCF_MP2.settings | {"correlation": "ccsd(t)"},
)
HYDROGEN = Frames(
    np.array([1, 1]),
    np.array([[[0.05, -0.02, 0.03], [0.61, 0.45, 0.32]]]),
    np.array([[[2.6, 0.3, -0.2], [0.1, 2.4, 0.4], [-0.3, 0.2, 2.9]]]),
)
PYSCF_PERIODIC = Subject(
    "pyscf-periodic", "pyscf_periodic",
    {"method": "rks", "xc": "pbe", "basis": "gth-szv", "pseudopotential": "gth-pbe", "mesh": [21, 21, 25]}, 1e-3, 1e-4, 1e-6,
    physics={"method": "uks", "xc": "lda,vwn", "basis": "gth-dzvp", "pseudopotential": "gth-pade", "kpoints": [2, 1, 1],
             "mesh": [], "dispersion": "d3bj", "conv_tol": "1e-8 hartree", "conv_tol_grad": 1e-5},
    mechanics={"max_cycle": 100, "stability": "always", "small_gap": "1 eV", "initial_guess": "previous", "max_memory": 2000},
    spelt={"kpoints": [1, 1, 1]},
    crystal=HYDROGEN,
    unconverged={"max_cycle": 1},
    elsewhere=frozenset({"ke_cutoff"}),
    needs="pyscf",
    crystals_only=True,
    egg_box=1e-2,
)  # fmt: skip
_XTB = {"verbosity": 0, "accuracy": 0.1}
ASE_TBLITE = Subject(
    "ase-tblite", "ase",
    {"calculator": "tblite.ase:TBLite", "arguments": _XTB, "convergence": "exception", "mechanics": ["verbosity"],
     "charge_key": "argument:charge", "multiplicity_key": "argument:multiplicity"},
    1e-3, 2e-4, 3e-5,
    physics={"arguments": _XTB | {"method": "GFN1-xTB"}, "charge_key": "initial_charges", "multiplicity_key": "magmoms",
             "stress": False, "box": "9 A", "code": "tblite 0"},
    mechanics={"arguments": _XTB | {"verbosity": 1}, "convergence": "attribute:converged"},
    spelt={"arguments": {"accuracy": 0.1, "verbosity": 0}},
    unconverged={"arguments": _XTB | {"max_iterations": 2}},
    needs="tblite.ase",
)  # fmt: skip
_ASE_TBLITE = frozenset(ASE_TBLITE.settings.keys() | ASE_TBLITE.physics.keys())
EMT = Subject(
    "ase-emt", "ase", {"calculator": "ase.calculators.emt:EMT", "convergence": "exception"}, 1e-3, 2e-5, 1e-9,
    physics={"arguments": {"asap_cutoff": True}, "code": "EMT 3"},
    mechanics={"convergence": "attribute:converged"},
    spelt={"arguments": {}},
    crystal=ALLOY,
    atom=29,
    elsewhere=_ASE_TBLITE,
)  # fmt: skip
CANDID = Subject(
    "ase-candid", "ase", {"calculator": "odd_calculators:Candid", "convergence": "attribute:converged", "code": "candid 1"}, 1e-3, 2e-5, 1e-9,
    physics={"arguments": {"asap_cutoff": True}},
    mechanics={"convergence": "exception"},
    spelt={"stress": True},
    crystal=ALLOY,
    atom=29,
    unconverged={"arguments": {"converges": False}},
    elsewhere=_ASE_TBLITE,
)  # fmt: skip
MODEL = Subject(
    "model", "model", {"model": "embedded"}, 1e-3, 2e-4, 1e-9,
    physics={"dtype": "float32", "head": "Default"},
    mechanics={"delay": "1 ms", "device": "cuda"},
    spelt={"dtype": "float64"},
    atom=8,
    needs="mace",
)  # fmt: skip
# tblite behind ASE's i-PI client, in a process of its own
SOCKET = Subject(
    "socket", "socket",
    {"command": f"{sys.executable} client.py {{socket}}", "code": "socket tblite 0", "converged": "stdout.txt: charges converged",
     "folder": str(Path(__file__).parent / "inputs" / "tblite"), "templates": ["settings.json", "start.xyz"],
     "box": "0 A", "periodic": True, "stress": True, "environment": {"OMP_NUM_THREADS": "1"}},
    1e-3, 2e-4, 1e-5,
    physics={"code": "socket other 1", "command": "client.py {path}", "templates": ["start.xyz"], "box": "30 A",
             "net_force": "1e-3 eV/A", "stress": False},
    mechanics={"launcher": "env", "failed": "stdout.txt: no", "lines_per_frame": 2, "restart_every": 7, "frame_timeout": "1 min",
               "connect_timeout": "1 min", "evidence_timeout": "1 s", "socket_prefix": "/tmp/x", "environment": {}},
    spelt={"net_force": "0 eV/A"},
    elsewhere=frozenset({"version", "transport", "host", "charge", "multiplicity", "species"}),
    memory=3e-5,  # 7e-6 was measured, at tblite's accuracy 0.1
    forgetful={"restart_every": 1},
    needs="tblite",
)  # fmt: skip

SUBJECTS = [TOY, TBLITE, PYSCF, PYSCF_D3, PYSCF_MP2, PYSCF_CC, PYSCF_PERIODIC, ASE_TBLITE, EMT, CANDID, MODEL, SOCKET]
