"""A config either says exactly what it means or is refused with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnn_driver import units
from bnn_driver.config import read_config
from bnn_driver.errors import ConfigError

GOOD = """
[system]
periodic = false
[accuracy]
energy = "0.5 kcal/mol"
groups = {acid = {atoms = [8], forces = "50 meV/A"}}
[oracle]
kind = "toy"
timeout = "2 min"
[oracle.toy]
delay = "1 s"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "bnn.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_quantities_arrive_in_inner_units(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, GOOD))
    assert config.accuracy.energy == pytest.approx(0.5 * units.KCAL_PER_MOL)
    assert config.accuracy.groups["acid"].forces == pytest.approx(0.05)
    assert config.oracle.timeout == 120
    assert config.oracle.options == {"delay": "1 s"}


def test_the_published_recipe_has_the_published_numbers(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, GOOD + '\n[ensemble]\nrecipe = "rensmeyer2026"\n'))
    assert (config.ensemble.dispersion, config.ensemble.predicted_noise, config.ensemble.noise_head) == (0, ("forces",), (64, 16))
    e, c = config.ensemble, config.calibration
    assert (e.members, e.prior_sd, e.steps_per_update, e.batch_size, e.step_size, e.friction) == (8, 0.5, 2000, 5, 1e-3, 0.1)
    assert (e.stop_when_learnt, e.settling) == (False, 0.25)
    assert (c.a, c.b, c.forgetting, config.accuracy.confidence, config.trainer.max_lag) == (1.5, 10, 1, 0.95, 0)
    assert e.force_noise == pytest.approx(0.1 * units.KCAL_PER_MOL)
    assert e.stress_noise == pytest.approx(0.1 / 16 * units.KCAL_PER_MOL)


def test_a_key_in_the_file_wins_over_the_recipe(tmp_path: Path) -> None:
    text = GOOD + '\n[ensemble]\nrecipe = "rensmeyer2026"\ndispersion = 0.05\n[calibration]\nb = 7.0\n'
    config = read_config(written(tmp_path, text))
    assert (config.ensemble.dispersion, config.ensemble.step_size) == (0.05, 1e-3)
    assert (config.calibration.a, config.calibration.b) == (1.5, 7.0)
    plain = read_config(written(tmp_path, GOOD)).ensemble
    assert (plain.recipe, plain.predicted_noise, plain.dispersion) == ("dispersed", (), "auto")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"0.5 kcal/mol"', "0.5", "unit is missing"),
        ('"0.5 kcal/mol"', '"0.5"', 'write for example "0.5 eV"'),
        ('"0.5 kcal/mol"', '"0.5 kcal"', "unknown unit 'kcal'"),
        ('"0.5 kcal/mol"', '"-1 eV"', "accuracy.energy"),
        ("periodic = false", "periodik = false", "did you mean 'periodic'"),
        ("periodic = false", "", "system.periodic is missing"),
        ("[accuracy]", "[ensembel]\n[accuracy]", "did you mean 'ensemble'"),
        ("[accuracy]", "[ensemble]\nsettling = 0\n[accuracy]", "ensemble.settling"),
        ("[accuracy]", "[ensemble]\nstop_when_learned = true\n[accuracy]", "did you mean 'stop_when_learnt'"),
        ("[accuracy]", '[ensemble]\nstop_when_learnt = "soon"\n[accuracy]', "ensemble.stop_when_learnt"),
        ("[oracle.toy]", "[oracle.pyscf]", 'does not belong to kind = "toy"'),
        ('timeout = "2 min"', 'timeuot = "2 min"', "did you mean 'timeout'"),
        ("[system]", "[system", "not a TOML file"),
    ],
)
def test_bad_input_names_file_key_and_way_out(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path / "absent.toml")
