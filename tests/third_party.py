"""An oracle that a third party installed, in which anything can go wrong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from bnn_driver.records import Frames

#: the charge of a frame tells this oracle what goes wrong
FAULTY = """
import os, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
from bnn_driver.errors import SCFNotConverged
from bnn_driver.oracle import Capabilities, make_label

@dataclass(frozen=True)
class Faulty:
    code = "faulty 1"
    capabilities = Capabilities(stress=False, periodic=False, charge=True, spin=False)

    def physics(self):
        return {}

    def check(self, frame):
        pass

    def __call__(self, frame):
        count("calls")
        match frame.charge:
            case 1:
                time.sleep(60)
            case 2:
                os._exit(3)
            case 3:
                if count("deaths") == 1:
                    os.abort()
            case 4:
                raise ValueError("a defect of the oracle")
            case 5:
                print("noise on standard output", flush=True)
                os.write(1, b"more noise")
                assert sys.stdin.read() == ""
            case 6:
                raise SCFNotConverged("no rung of the ladder")
            case 8:
                time.sleep(4)
            case 10:
                time.sleep(1)
                evidence = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
                return make_label(self, frame, -10.0, 0 * frame.positions[0], None, evidence=evidence)
            case 9:
                from oracles.one_shot import program, run
                words = program("faulty", "$PARSL_MPI_PREFIX bash -c 'echo $SLURM_PROCID'")
                assert run("faulty", words, Path.cwd(), "ranks.txt") == "exit status 0"
                evidence = os.environ["PARSL_MPI_PREFIX"] + ";" + Path("ranks.txt").read_text()
                return make_label(self, frame, -9.0, 0 * frame.positions[0], None, evidence=evidence)
            case 7:
                grandchild = subprocess.Popen(["sleep", "60"])
                Path("grandchild").write_text(str(grandchild.pid))
                time.sleep(60)
        time.sleep(0.01)
        return make_label(self, frame, -1.0 * frame.charge, 0 * frame.positions[0], None, evidence=os.environ["OMP_NUM_THREADS"])

def count(name):
    path = Path("..") / name
    number = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(number))
    return number
"""
SLEEPS, EXITS, DIES_ONCE, RAISES, PRINTS, UNCONVERGED, FORKS, SLOW, MPI, ACCELERATOR = range(1, 11)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the oracle `faulty` known here and to every process that is started from now on."""
    information = folder / "faulty-1.dist-info"
    information.mkdir(parents=True)
    (folder / "faulty_oracle.py").write_text(FAULTY)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[bnn_driver.oracles]\nfaulty = faulty_oracle:Faulty\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


def helium(charge: int = 0, x: float = 0.0) -> Frames:
    """One atom; the charge says what goes wrong."""
    return Frames(np.array([2]), np.array([[[x, 0.0, 0.0]]]), charge=charge)


def calls(work: Path, name: str = "calls") -> int:
    """How often the oracle was called by all workers of a folder."""
    return int((work / name).read_text())
