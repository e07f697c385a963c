"""Settings of the socket oracle: what can never work is refused, and the fingerprint is that of the input."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_code import CUBE, SCRIPTED, WATER, Make, moved, scripted

from bnn_driver.errors import EnvironmentProblem, OracleConfigError
from bnn_driver.oracle import fingerprint, label, load_oracle
from bnn_driver.records import Frames


@pytest.mark.parametrize(
    ("changes", "frame", "error", "words"),
    [
        ({"folder": "/nowhere"}, WATER, OracleConfigError, "template 'atoms' cannot be read"),
        ({"templates": ["atom"]}, WATER, OracleConfigError, "template 'atom' cannot be read"),
        ({"command": "true"}, WATER, OracleConfigError, "where the driver listens"),
        ({"command": "true {port}"}, WATER, OracleConfigError, "where the driver listens"),
        (
            {"command": "no-such-code {socket}"},
            WATER,
            EnvironmentProblem,
            "'no-such-code', which is no program here and no file of",
        ),
        ({"launcher": "no-such-mpirun -n 4"}, WATER, EnvironmentProblem, "'no-such-mpirun'"),
        ({"templates": []}, WATER, OracleConfigError, "which atom is which"),
        ({"templates": [], "species": "HOH"}, WATER, OracleConfigError, "for the atoms H O H, but the frame has O H H"),
        ({"templates": [], "species": "O?2"}, WATER, OracleConfigError, "no formula"),
        ({"templates": [], "species": "OH2"}, replace(WATER, charge=1), OracleConfigError, "for charge 0, but the frame has 1"),
        ({"templates": [], "species": "OH2"}, replace(WATER, multiplicity=3), OracleConfigError, "for multiplicity 1"),
        ({}, replace(WATER, cell=CUBE), OracleConfigError, "periodic = true"),
        ({"box": None}, WATER, OracleConfigError, "box is missing"),
    ],
)
def test_what_can_never_work_is_refused_by_the_check(
    make: Make, changes: dict[str, Any], frame: Frames, error: type[Exception], words: str
) -> None:
    settings = {key: value for key, value in scripted(**changes).items() if value is not None}
    settings["converged"] = "log: x"
    with pytest.raises(error, match=words):
        load_oracle("socket", settings).check(frame)


def test_a_box_is_needed_where_the_input_has_a_cell(make: Make) -> None:
    with pytest.raises(OracleConfigError, match="give the edge"):
        make(command=f"{sys.executable} spring.py {{socket}} {{a}}").check(WATER)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"converged": "SCF converged"}, "FILE: REGEX"),
        ({"converged": "log: ("}, "FILE: REGEX"),
        ({"failed": ": x"}, "FILE: REGEX"),
        ({"version": "log: Spring"}, "needs a group"),
        ({"restart_every": 0}, "restart_every must be positive"),
        ({"frame_timeout": "0 s"}, "frame_timeout must be positive"),
        ({"box": "-5 A"}, "must not be negative"),
        ({"net_force": "-1 eV/A"}, "must not be negative"),
        ({"command": " "}, "command is empty"),
        ({"command": "'unbalanced"}, "command = "),
    ],
)
def test_settings_that_mean_nothing_are_refused_at_once(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OracleConfigError, match=words):
        load_oracle("socket", scripted(**changes))


def copied(folder: Path) -> Path:
    folder.mkdir()
    for file in SCRIPTED.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_the_fingerprint_is_of_the_input_and_not_of_the_machine(make: Make, tmp_path: Path) -> None:
    plain = fingerprint(make())
    folder = copied(tmp_path / "inputs")
    assert fingerprint(make(folder=str(folder))) == plain
    (folder / "atoms").write_text((folder / "atoms").read_text().replace("\n", "  \n\n"))
    assert fingerprint(make(folder=str(folder))) == plain
    elsewhere = make(command=make().command.replace(sys.executable, Path(sys.executable).name))  # type: ignore[attr-defined]
    assert fingerprint(elsewhere) == plain
    (folder / "atoms").write_text("other {atoms}")
    assert fingerprint(make(folder=str(folder))) != plain
    (folder / "more").write_text("")
    assert len({fingerprint(make(folder=str(folder))), plain, fingerprint(make("silent"))}) == 3
    label(make(), WATER)
    assert fingerprint(make()) == plain


def test_inputs_that_change_in_a_run_are_noticed(make: Make, tmp_path: Path) -> None:
    folder = copied(tmp_path / "inputs")
    oracle = make(folder=str(folder), restart_every=1)
    label(oracle, WATER)
    (folder / "atoms").write_text("other {atoms}")
    with pytest.raises(OracleConfigError, match="were changed since the run began"):
        label(oracle, moved(0.1))
