"""Loading: what is not a MACE model is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_mace

from bnn_driver.errors import ConfigError, ModelError
from bnn_driver.potential.mace import load_mace, trainer_arguments


def test_a_missing_file_an_unknown_name_and_a_wrong_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model file"):
        load_mace(tmp_path / "nothing.model")
    with pytest.raises(ModelError, match="medium-mpa-0"):
        load_mace("no-such-model")
    text = tmp_path / "text.model"
    text.write_text("not a model")
    with pytest.raises(ModelError, match="cannot be read"):
        load_mace(text)
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save({"model": {}, "optimizer": {}}, checkpoint)
    with pytest.raises(ModelError, match="checkpoint of a training run"):
        load_mace(checkpoint)
    linear = tmp_path / "linear.model"
    torch.save(torch.nn.Linear(2, 2), linear)
    with pytest.raises(ModelError, match="holds a Linear"):
        load_mace(linear)


def test_an_unknown_head_is_refused_and_a_known_one_found(tmp_path: Path) -> None:
    file = tmp_path / "two.model"
    torch.save(random_mace(heads=["pbe", "wb97"]), file)
    assert load_mace(file, head="wb97").head == 1
    with pytest.raises(ModelError, match="pbe, wb97"):
        load_mace(file, head="ccsd")


def test_the_same_file_has_the_same_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "a.model"
    torch.save(random_mace(), file)
    first, second = load_mace(file), load_mace(file)
    assert first.sha256 == second.sha256
    assert first.elements == (1, 6, 8)
    assert first.cutoff == 4.0


def test_a_model_of_2022_is_read(shared_data: Any) -> None:
    path = shared_data / "models" / "mace_spice" / "MACE_SPICE_2022.model"
    if not path.is_file():
        pytest.skip("no MACE_SPICE_2022.model")
    loaded = load_mace(path)
    assert 17 in loaded.elements
    assert loaded.cutoff == pytest.approx(4.5)


def test_options_of_the_trainer_are_flags_or_have_values() -> None:
    assert trainer_arguments({"ema": True, "swa": False, "lora": True, "plot": False, "r_max": 5.0}) == [
        "--ema", "--lora=True", "--plot=False", "--r_max=5.0",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="ema: ignored explicit argument 'yes'"):
        trainer_arguments({"ema": "yes"})
