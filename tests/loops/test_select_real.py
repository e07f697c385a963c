"""Selecting with the real parts: a MACE whose chains learn labels of GFN1-xTB, and models that mace trains from scratch."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from small_pool import CONFIG, frames, of_scratch, write_pool
from small_run import program

from bnn_driver.loops.division import open_pool
from bnn_driver.loops.known import pooled_label
from bnn_driver.loops.scratch import FromScratch
from bnn_driver.oracle import load_oracle
from bnn_driver.pool_config import read_select_config
from bnn_driver.records import Frames

pytestmark = pytest.mark.slow
HYDRONIUM = Atoms("OH3", positions=[[0, 0, 0.2], [0.94, 0, -0.05], [-0.47, 0.81, -0.05], [-0.47, -0.81, -0.05]])

REAL = """
[system]
charge = 1
[ensemble]
members = 2
steps_per_update = 150
temperature = 0.0
step_size = 5e-4
[accuracy]
energy = "1 kcal/mol"
[pool]
file = "pool.extxyz"
energy_key = "REF_energy"
forces_key = "REF_forces"
test = 8
start = 4
batch = 4
rounds = 2
baseline = 0
"""


def hydronium(count: int) -> list[Atoms]:
    """Shaken, labelled with its charge."""
    oracle, rng, out = load_oracle("tblite", {"method": "GFN1-xTB"}), np.random.default_rng(0), []
    for _ in range(count):
        atoms = HYDRONIUM.copy()
        atoms.positions += rng.normal(0, 0.08, (4, 3))
        label = oracle(Frames(atoms.numbers, atoms.positions[None], charge=1))
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = label.energy, label.forces
        out.append(atoms)
    return out


def test_chains_of_a_mace_learn_an_ion_and_are_exported(tmp_path: Path) -> None:
    config = write_pool(tmp_path, hydronium(30), REAL)
    done = program("select", config)
    assert done.returncode == 0, done.stderr
    facts = json.loads(program("status", config, "--json").stdout)
    errors = [row["force_error"] for row in facts["rounds"]]
    assert [row["labels"] for row in facts["rounds"]] == [4, 8, 12]
    sizes = [np.linalg.norm(a.arrays["REF_forces"], axis=1).mean() for a in ase.io.read(tmp_path / "pool.extxyz", ":")]
    assert max(errors) < 0.25 * np.mean(sizes), (
        "updates of 150 steps are too short for more: they leave what their first steps kick up"
    )
    assert {ase.io.read(f).info["charge"] for f in (tmp_path / "run" / "labels").glob("*.extxyz")} == {1}
    exported = program("export", config, "--to", "mace", "-o", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    assert len(list((tmp_path / "out").glob("member_*.model"))) == 2
    assert len(ase.io.read(tmp_path / "out" / "labels.extxyz", ":")) == 12


SCRATCH = """
[committee]
kind = "scratch"
steps = 20
parallel = 2
mace = { num_channels = 4, max_L = 0, r_max = 3.0, correlation = 1, MLP_irreps = "4x0e", radial_MLP = "[8]" }
"""


def test_models_from_scratch_are_trained_by_mace_and_disagree(tmp_path: Path) -> None:
    """Their energies have the labels' zero, thousands of eV away, without being told."""
    text = of_scratch(CONFIG).replace("rounds = 3", "rounds = 1").replace("baseline = 1", "baseline = 0")
    config = write_pool(tmp_path, frames(60), text.replace("members = 4", "members = 2") + SCRATCH)
    done = program("select", config, timeout=580)
    assert done.returncode == 0, done.stderr
    facts = json.loads(program("status", config, "--json").stdout)
    assert facts["committee"] == "scratch"
    assert [row["labels"] for row in facts["rounds"]] == [6, 10]
    assert facts["rounds"][0]["selected"] > facts["rounds"][0]["remaining"] > 0
    assert all(row["energy_rmse"] < 50 for row in facts["rounds"])
    assert len(list((tmp_path / "run" / "generations").glob("*/member_*.model"))) == 4
    assert not list((tmp_path / "run" / "generations").glob("*/work_*"))
    exported = program("export", config, "--to", "ase", "-o", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    newest = tmp_path / "run" / "generations" / "000002"
    for file in newest.glob("member_*.model"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert len(ase.io.read(tmp_path / "out" / "labels.extxyz", ":")) == 10


def test_the_second_stage_of_mace_is_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With swa, mace leaves the models of both stages."""
    settings = of_scratch(CONFIG).replace("members = 4", "members = 2") + SCRATCH.replace(
        "mace = {", "mace = { swa = true, start_swa = 1,"
    )
    config_file = write_pool(tmp_path, frames(60), settings)
    config = read_select_config(config_file)
    pool = open_pool(config, tmp_path)
    members = FromScratch(config, config.committee, pool.elements, tmp_path / "generations", lambda kind, **facts: None)
    monkeypatch.setattr("bnn_driver.loops.scratch.shutil.rmtree", lambda path, **options: None)
    members.learn([[pooled_label(pool, i, "level", "start", {}) for i in range(8)]])
    for member in range(2):
        left = tmp_path / "generations" / "000001" / f"work_{member:02d}" / "models"
        assert (left / "member.model").is_file(), "of the first stage"
        assert not (left / "member_stagetwo.model").exists()
        assert (left.parents[1] / f"member_{member:02d}.model").is_file()


def test_a_training_that_fails_ends_with_the_words_of_mace(tmp_path: Path) -> None:
    config = write_pool(tmp_path, frames(60), of_scratch(CONFIG) + SCRATCH.replace('"[8]"', '"many"'))
    done = program("select", config)
    assert done.returncode == 3
    assert "ended with status 1 and no model" in done.stderr
    assert "malformed node or string" in done.stderr
