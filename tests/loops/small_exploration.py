"""A small exploration: water that dances, toy potential, toy oracle, real i-PI."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms

from bnn_driver.oracle import load_oracle
from bnn_driver.records import Frames

START = np.array([[0.0, 0.0, 0.0], [0.757, 0.586, 0.0], [-0.757, 0.586, 0.0]])

CONFIG = """
[run]
seed = 7
[ipi]
connect_timeout = "20 s"
[system]
periodic = false
charge = 1
[potential]
model = "toy"
dtype = "float64"
[ensemble]
members = 4
steps_per_update = 60
prior_sd = 0.2
force_noise = "0.1 eV/A"
loss_margin = 1e6
temperature_range = [0.0, 1000.0]
[accuracy]
energy = "400 meV"
[oracle]
kind = "toy"
timeout = "20 s"
[explore]
structure = "start.xyz"
temperatures = [300]
steps = 40
stride = 4
start = 3
batch = 3
rounds = 2
approach = 0
duplicates = "0.001 A"
"""

KNOWN = 'known = "known.extxyz"\nenergy_key = "REF_energy"\nforces_key = "REF_forces"'
"""Keys of [explore] for the file of `known_pool`."""


def write_exploration(folder: Path, *changes: tuple[str, str], config: str = CONFIG) -> Path:
    """Write structure and config; returns the config's path.  Args: changes: (old, new) in the config's text."""
    ase.io.write(folder / "start.xyz", Atoms("OH2", positions=START))
    for old, new in changes:
        assert old in config, old
        config = config.replace(old, new)
    (folder / "bnn.toml").write_text(config)
    return folder / "bnn.toml"


def known_pool(file: Path, said: str | None = "") -> None:
    """Twelve hydroxyls that the toy oracle labelled, thousands of eV from the model.  Args: said: of the settings, "" the right thing."""
    oracle, rng, out = load_oracle("toy", {}), np.random.default_rng(3), []
    for _ in range(12):
        positions = START[:2] + rng.normal(0, 0.05, (2, 3))
        label = oracle(Frames(np.array([8, 1]), positions[None], charge=1))
        atoms = Atoms("OH", positions=positions, info={"REF_energy": label.energy - 2053.6, "charge": 1})
        atoms.arrays["REF_forces"] = label.forces
        if said is not None:
            atoms.info["fingerprint"] = said or label.fingerprint
        out.append(atoms)
    ase.io.write(file, out, format="extxyz")


RECORDER = '''"""A calculator that writes down what it was asked for, and fails where it is told to."""

import json
from pathlib import Path

from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones


class Recorder(Calculator):
    implemented_properties = ["energy", "forces"]

    def __init__(self, file, fails=()):
        super().__init__()
        self.file, self.fails = Path(file), list(fails)

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        asked = self.file.read_text().splitlines() if self.file.exists() else []
        facts = {"charge": atoms.info.get("charge"), "multiplicity": atoms.info.get("multiplicity")}
        with self.file.open("a") as stream:
            stream.write(json.dumps(facts) + "\\n")
        if len(asked) in self.fails:
            raise RuntimeError("the SCF did not converge")
        pairs = LennardJones(sigma=0.8, epsilon=0.5)
        pairs.calculate(atoms, ["energy", "forces"])
        self.results = {name: pairs.results[name] for name in ("energy", "forces")}
'''


def recorder(folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: tuple[str, str]) -> Path:
    """A config whose oracle notes charge and multiplicity of every frame in asked.jsonl; returns its path."""
    (folder / "recording_calculator.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(folder)  # of this process, which checks the oracle
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")  # of those that label
    monkeypatch.delitem(sys.modules, "recording_calculator", raising=False)
    table = f"""kind = "ase"
[oracle.ase]
calculator = "recording_calculator:Recorder"
convergence = "exception"
code = "recorder 1"
charge_key = "info:charge"
multiplicity_key = "info:multiplicity"
stress = false
[oracle.ase.arguments]
file = "{folder / "asked.jsonl"}"
"""
    config = CONFIG.replace('kind = "toy"\ntimeout = "20 s"', 'timeout = "20 s"\n' + table)
    return write_exploration(folder, *changes, config=config)
