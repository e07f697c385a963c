"""A path in the config means the same to the driver and to its workers, which run in folders of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from ase.build import molecule
from ase.io import write
from stand_ins.inputs import aims_command, aims_folder, species_folder, water

from bnn_driver.errors import OracleConfigError
from bnn_driver.executors import LocalExecutor
from bnn_driver.loops.checking import check_session
from bnn_driver.oracle import absolute_paths, fingerprint, load_oracle
from bnn_driver.records import Frames


def test_only_fields_that_are_paths_are_seen_from_the_folder_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = {"command": "aims.x in", "folder": "inputs", "species_dir": "~/light", "version": "1"}
    wanted = {"command": "aims.x in", "folder": "/base/inputs", "species_dir": "/home/somebody/light", "version": "1"}
    assert absolute_paths("aims", settings, Path("/base")) == wanted
    assert absolute_paths("aims", {"folder": "/there", "species_dir": ""}, Path("/base")) == {
        "folder": "/there",
        "species_dir": "",
    }
    assert absolute_paths("socket", {"folder": "inputs", "code": "x"}, Path("/base")) == {"folder": "/base/inputs", "code": "x"}
    assert absolute_paths("toy", {"depth": "2 eV"}, Path("/base")) == {"depth": "2 eV"}


def test_a_relative_base_still_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_paths("vasp", {"folder": "in"}, Path("sub")) == {"folder": str(tmp_path / "sub" / "in")}


def test_a_worker_elsewhere_labels_with_the_users_folder(tmp_path: Path) -> None:
    aims_folder(tmp_path / "inputs")
    settings = absolute_paths("aims", {"command": aims_command("compute"), "folder": "inputs"}, tmp_path)
    numbers, positions = water()
    with LocalExecutor("aims", settings, 1, 60.0, tmp_path / "run" / "work", 1, tmp_path / "run" / "spool") as executor:
        result = executor.submit(Frames(numbers, positions[None])).result()
    assert result.fingerprint == fingerprint(load_oracle("aims", settings))


def test_the_fingerprint_does_not_depend_on_where_the_files_lie(tmp_path: Path) -> None:
    names = set()
    for place in ("here", "there"):
        by_folder = {"command": "x", "folder": str(aims_folder(tmp_path / place / "inputs"))}
        by_config = {"command": "x", "control": {"xc": "pbe"}, "species_dir": str(species_folder(tmp_path / place / "light"))}
        names |= {fingerprint(load_oracle("aims", by_folder)), fingerprint(load_oracle("aims", by_config))}
    assert len(names) == 2


def test_the_config_names_the_folder_relative_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = aims_folder(tmp_path / "project" / "aims_inputs")
    write(tmp_path / "project" / "water.xyz", molecule("H2O"))
    config = tmp_path / "project" / "bnn.toml"
    command = ", ".join(f"'{word}'" for word in aims_command("compute"))
    config.write_text(
        "[system]\nperiodic = false\nstructure = 'water.xyz'\n[accuracy]\nenergy = '1 kcal/mol'\n"
        f"[oracle]\nkind = 'aims'\n[oracle.aims]\ncommand = [{command}]\nfolder = 'aims_inputs'\n"
    )
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    check_session(config, lambda name, text: said.append(text))
    assert f"fingerprint {fingerprint(load_oracle('aims', {'command': 'x', 'folder': str(inputs)}))[:12]}" in "\n".join(said)
    (inputs / "control.in").write_text("xc pbe\nrelax_geometry bfgs 1e-2\n")
    with pytest.raises(OracleConfigError, match=rf"{inputs}/control\.in, line 2: relax_geometry bfgs 1e-2 moves the atoms"):
        check_session(config, lambda name, text: None)
