"""The configs of the examples for the published frames of FHI-aims, on these where they are present."""

from __future__ import annotations

import shutil
from pathlib import Path

import ase.io
import pytest
from small_run import program

from bnn_driver.report.selection import read_selection

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def prepared(example: str, folder: Path, shared_data: Path) -> Path:
    """A copy of the config beside the published frames."""
    data = shared_data / "zundel_eigen_qbc"
    if not data.is_dir():
        pytest.skip(f"there is no {data}")
    shutil.copy(data / "zundel_1000_rpbe-d3_aims.extxyz", folder / "train.extxyz")
    return Path(shutil.copy(EXAMPLES / example / "published.toml", folder / "bnn.toml"))


def test_a_few_published_frames_are_chosen_and_teach(tmp_path: Path, shared_data: Path) -> None:
    """Against 107 meV/Å after 20 and 59 after 40 labels of models from scratch (Stocco et al. 2025, on test frames of their own)."""
    config = prepared("zundel_qbc", tmp_path, shared_data)
    text = config.read_text().replace("rounds = 8", "rounds = 2").replace("baseline = 1", "baseline = 0")
    config.write_text(text.replace("members = 4", "members = 2"))
    done = program("select", config, timeout=580)
    assert done.returncode == 0, done.stderr
    found = read_selection(tmp_path / "run_published")
    errors = 1e3 * found.chosen.errors("force_error")
    assert found.chosen.labels.tolist() == [20, 30, 40]
    assert errors[0] < 107
    assert errors[-1] < min(59, errors[0])
    chosen = {i for record in found.chosen.rounds for i in record["chosen"]}
    assert len(chosen) == 40
    assert not chosen & set(found.chosen.rounds[0]["test"])
    assert {ase.io.read(f).info["charge"] for f in (tmp_path / "run_published" / "labels").glob("*.extxyz")} == {1}


def test_an_exploration_with_fhi_aims_passes_its_check(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the binary, which cannot be had here."""
    config = prepared("eigen_explore", tmp_path, shared_data)
    (tmp_path / "aims").mkdir()
    shutil.copy(shared_data / "zundel_eigen_qbc" / "aims" / "control_zundel.in", tmp_path / "aims" / "control.in")
    shutil.copy(EXAMPLES / "eigen_explore" / "eigen.xyz", tmp_path)
    (tmp_path / "mpirun").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    done = program("check", config)
    assert done.returncode == 0, done.stderr
    assert "13, molecule, charge +1" in done.stdout
    assert "1000 frames of 1 kinds" in done.stdout
    config.write_text(config.read_text().replace("same_level = true", "same_level = false"))
    assert "does not say by which settings" in program("check", config).stderr
