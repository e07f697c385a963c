"""Exploring with the real parts: a MACE whose chains learn labels of GFN1-xTB, an ion, export of the members."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from small_run import program

from bnn_driver.oracle import load_oracle
from bnn_driver.records import Frames
from bnn_driver.report.exploration import exploration_summary

pytestmark = [pytest.mark.slow, pytest.mark.ipi]
HYDRONIUM = Atoms("OH3", positions=[[0, 0, 0.2], [0.94, 0, -0.05], [-0.47, 0.81, -0.05], [-0.47, -0.81, -0.05]])
METHANE = Atoms(
    "CH4", positions=[[0, 0, 0], [0.63, 0.63, 0.63], [-0.63, -0.63, 0.63], [0.63, -0.63, -0.63], [-0.63, 0.63, -0.63]]
)

CONFIG = """
[run]
seed = 3
[system]
periodic = false
charge = 1
[ensemble]
members = 2
steps_per_update = 150
temperature = 0.0
step_size = 5e-4
[accuracy]
energy = "1 kcal/mol"
[oracle]
kind = "tblite"
workers = 2
[oracle.tblite]
method = "GFN1-xTB"
[explore]
structure = "start.xyz"
temperatures = [300]
steps = 60
stride = 5
batch = 3
rounds = 2
audits = 2
approach = 0
known = "known.extxyz"
energy_key = "REF_energy"
forces_key = "REF_forces"
charge_key = "charge"
"""


def known(file: Path, count: int) -> None:
    """Methane, neutral, and so of another composition, another charge and one more element."""
    oracle, rng, out = load_oracle("tblite", {"method": "GFN1-xTB"}), np.random.default_rng(0), []
    for _ in range(count):
        atoms = METHANE.copy()
        atoms.positions += rng.normal(0, 0.05, (5, 3))
        label = oracle(Frames(atoms.numbers, atoms.positions[None]))
        atoms.info |= {"REF_energy": label.energy, "charge": 0, "fingerprint": label.fingerprint}
        atoms.arrays["REF_forces"] = label.forces
        out.append(atoms)
    ase.io.write(file, out, format="extxyz")


def test_an_ion_is_explored_from_known_molecules_and_exported(tmp_path: Path) -> None:
    known(tmp_path / "known.extxyz", 8)
    ase.io.write(tmp_path / "start.xyz", HYDRONIUM)
    config = tmp_path / "bnn.toml"
    config.write_text(CONFIG)
    done = program("explore", config)
    assert done.returncode == 0, done.stderr
    facts = exploration_summary(tmp_path / "run")
    assert [row["chosen"] for row in facts["rounds"]] == [3, 3, 0]
    assert all(row["known"] > 0 for row in facts["rounds"])
    assert facts["rounds"][0]["audit_error"] < 1.0
    labels = [ase.io.read(f) for f in sorted((tmp_path / "run" / "labels").glob("*.extxyz"))]
    assert {a.info["charge"] for a in labels} == {1}
    assert len(labels) == facts["labels"] <= 10
    errors = [
        x for n in (0, 1) for x in json.loads((tmp_path / f"run/exploration/labelled_{n:03d}.json").read_text())["energy_error"]
    ]
    assert np.abs(errors).max() < 2.0, (
        "of a composition that what is known says nothing about, and of energies hundreds of eV away"
    )
    exported = program("export", config, "--to", "mace", "-o", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    assert len(list((tmp_path / "out").glob("member_*.model"))) == 2
    assert len(ase.io.read(tmp_path / "out" / "labels.extxyz", ":")) == len(labels)
