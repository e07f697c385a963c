"""A teacher gives what its file says, by code that the driver's own potential does not share."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from oracle_subjects import WATER

from bnn_driver.errors import ModelError, OracleConfigError
from bnn_driver.oracle import Oracle, absolute_paths, fingerprint, label, load_oracle
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.mace import EMBEDDED, load_mace
from bnn_driver.potential.params import repeat_weights
from bnn_driver.records import Frames
from bnn_driver.units import stress_from_virial

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "potential"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "loops"))
from random_models import crystals, molecules, random_mace
from small_run import program, write_run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def teacher(file: Path, **settings: Any) -> Oracle:
    return load_oracle("model", {"model": str(file)} | settings)


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "two [heads].model"
    torch.save(random_mace(heads=["a", "b"]), path)
    return path


@pytest.mark.parametrize("frames", [molecules(1), crystals(1)], ids=["molecule", "crystal"])
@pytest.mark.parametrize("head", ["a", "b"])
def test_the_drivers_own_potential_agrees(two_heads: Path, frames: Frames, head: str) -> None:
    """Neighbour lists, derivatives and network are written twice; only the weights are shared."""
    loaded = load_mace(two_heads, head)
    potential = make_potential(loaded.module, frames.numbers, torch.float64, "cpu", head=loaded.head)
    ours = Ensemble(potential, repeat_weights(potential.weights, 2), 0, None).predict(frames)
    theirs = label(teacher(two_heads, head=head), frames)
    assert theirs.energy == pytest.approx(ours.mean_energy[0], abs=1e-9)
    np.testing.assert_allclose(theirs.forces, ours.mean_forces[0], atol=1e-9)
    if frames.cell is not None:
        np.testing.assert_allclose(theirs.stress, stress_from_virial(ours.mean_virial, frames.cell)[0], atol=1e-10)


def test_a_head_has_to_be_named_where_there_are_several(two_heads: Path) -> None:
    for head in ({}, {"head": "c"}):
        with pytest.raises(OracleConfigError, match=r"has the heads a, b, got head = '(c|)'"):
            teacher(two_heads, **head).check(molecules(1))


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path, two_heads: Path) -> None:
    copy = tmp_path / "copy.model"
    shutil.copy(EMBEDDED, copy)
    assert fingerprint(teacher(copy)) == fingerprint(load_oracle("model", {"model": "embedded"}))
    assert fingerprint(teacher(two_heads)) != fingerprint(teacher(copy))
    assert fingerprint(teacher(copy, device="cuda")) == fingerprint(teacher(copy))


def test_single_precision_differs_by_its_rounding_only() -> None:
    double, single = (label(load_oracle("model", {"model": "embedded", "dtype": d}), WATER) for d in ("float64", "float32"))
    # the total energy is 138 eV, whose seventh digit is 1e-5 eV
    assert single.energy == pytest.approx(double.energy, abs=2e-4)
    np.testing.assert_allclose(single.forces, double.forces, atol=1e-3)
    assert single.energy != double.energy


@pytest.mark.parametrize("content", [None, b"no model", {"weights": torch.zeros(3)}], ids=["absent", "no pickle", "no network"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "some.model"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ModelError, match=r"some\.model.*expected a \.model file"):
        teacher(path).check(WATER)


def test_unknown_elements_and_a_negative_delay_are_refused() -> None:
    with pytest.raises(OracleConfigError, match="knows the elements H C N O, but the frame has Si"):
        load_oracle("model", {"model": "embedded"}).check(replace(WATER, numbers=np.array([8, 1, 14])))
    with pytest.raises(OracleConfigError, match="delay"):
        load_oracle("model", {"model": "embedded", "delay": "-1 s"})


def test_any_calculator_of_mace_is_checked_for_elements_too() -> None:
    settings = {
        "calculator": "mace.calculators:MACECalculator",
        "arguments": {"model_paths": str(EMBEDDED), "device": "cpu", "default_dtype": "float64"},
        "convergence": "exception",
    }
    oracle = load_oracle("ase", settings)
    with pytest.raises(OracleConfigError, match="the frame has Si"):
        oracle.check(replace(WATER, numbers=np.array([8, 1, 14])))
    assert label(oracle, WATER).energy == label(load_oracle("model", {"model": "embedded"}), WATER).energy


def test_a_file_beside_the_config_is_found_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "teacher.model").write_bytes(b"")
    for given, expected in (
        ("teacher.model", str(tmp_path / "teacher.model")),
        ("embedded", "embedded"),
        ("/x.model", "/x.model"),
    ):
        assert absolute_paths("model", {"model": given, "head": "teacher.model"}, tmp_path) == {
            "model": expected,
            "head": "teacher.model",
        }


@pytest.mark.ipi
@pytest.mark.slow
def test_a_run_is_rehearsed_with_a_teacher_beside_its_config(tmp_path: Path) -> None:
    """Real i-PI, driver and worker, which runs in a folder of its own; the labels are those of the teacher."""
    shutil.copy(EMBEDDED, tmp_path / "teacher.model")
    config = write_run(tmp_path, steps=4)
    text = config.read_text().replace('kind = "toy"', 'kind = "model"')
    text = text.replace("[oracle.toy]", '[oracle.model]\nmodel = "teacher.model"')
    text = text.replace('timeout = "20 s"', 'timeout = "2 min"')  # loading mace may take long
    config.write_text(text.replace("step_size = 3e-3", "step_size = 1e-4"))  # the toy that learns is far from this teacher
    done = program("run", config, timeout=300)
    assert done.returncode == 0, done.stderr
    labels = sorted((tmp_path / "run" / "labels").glob("*.extxyz"))
    assert labels
    for file in labels:
        atoms = ase.io.read(file)
        frame = Frames(atoms.numbers, atoms.positions[None])
        again = label(load_oracle("model", {"model": "embedded"}), frame)
        np.testing.assert_allclose(atoms.arrays["REF_forces"], again.forces, atol=1e-6)
        assert atoms.info["fingerprint"] == again.fingerprint
