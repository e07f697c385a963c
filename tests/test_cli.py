"""Bad input ends with a message that says what to do and with its own exit code, before anything is spent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bnn_driver.cli import main

sys.path.insert(0, str(Path(__file__).parent / "loops"))
from small_run import write_run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def outcome(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and what was said on standard error."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.err + captured.out


def edited(config: Path, old: str, new: str) -> Path:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    return config


@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        ("seed = 7", "sead = 7", 2, "did you mean 'seed'"),
        ('energy = "400 meV"', "energy = 0.4", 2, "unit is missing"),
        ('kind = "toy"', 'kind = "toi"', 2, "does not belong to kind"),
        ('delay = "0 s"', 'delya = "0 s"', 2, "did you mean 'delay'"),
        ('input = "input.xml"', 'input = "absent.xml"', 2, "absent.xml"),
        ('model = "toy"', 'model = "absent.model"', 3, "absent.model"),
        ("[audit]", 'species = {Xx = "1 eV/A"}\n[audit]', 2, "no element"),
        ("periodic = false", "periodic = false\nmultiplicity = 0", 2, "multiplicity"),
    ],
)
def test_a_mistake_in_the_config_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, code: int, says: str
) -> None:
    config = edited(write_run(tmp_path), old, new)
    got, said = outcome(capsys, "run", config)
    assert says in said
    assert got == code
    assert not list((tmp_path / "run" / "labels").glob("*.extxyz")), "nothing was spent"


def test_a_file_that_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "some.model")
    config = edited(write_run(tmp_path), 'model = "toy"', 'model = "some.model"')
    code, said = outcome(capsys, "check", config)
    assert code == 3
    assert "some.model" in said
    assert "expected a .model file" in said


def test_atoms_that_the_model_does_not_know_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = edited(write_run(tmp_path), 'model = "toy"', 'model = "embedded"')
    (tmp_path / "init.xyz").write_text((tmp_path / "init.xyz").read_text().replace("O  10", "S  10"))
    code, said = outcome(capsys, "check", config)
    assert code == 3
    assert "16" in said or "S" in said


def test_a_missing_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = outcome(capsys, "run", tmp_path / "absent.toml")
    assert code == 2
    assert "no such file" in said


def test_status_of_no_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = outcome(capsys, "status", tmp_path)
    assert code == 2
    assert "no run here" in said


def test_a_timeout_of_ipi_shorter_than_a_label_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path)
    edited(tmp_path / "input.xml", "</address>", "</address><timeout>5</timeout>")
    code, said = outcome(capsys, "run", config)
    assert code == 2
    assert "<timeout>" in said


def test_check_says_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = outcome(capsys, "check", write_run(tmp_path))
    assert code == 0
    assert "in order" in said
    assert "fingerprint" in said
