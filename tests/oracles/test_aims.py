"""FHI-aims as a process: a stand-in checks the input and answers in the words of the real code, rightly or with every fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_ins.inputs import RECORDED, aims_command, aims_folder, contents, species_folder, water

from bnn_driver.errors import (
    EnvironmentProblem,
    OracleConfigError,
    OracleCrashed,
    OracleInconsistent,
    SCFNotConverged,
)
from bnn_driver.executors import LocalExecutor
from bnn_driver.oracle import Oracle, fingerprint, label, load_oracle
from bnn_driver.records import Frames
from oracles.aims_output import read_result

WATER = Frames(*(lambda n, x: (n, x[None]))(*water()))
CRYSTAL = replace(WATER, cell=np.array([[[5.0, 0.1, 0.0], [0.0, 5.2, -0.3], [0.2, 0.0, 4.9]]]))
Make = Callable[..., Oracle]


@pytest.fixture
def aims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Oracles whose stand-in computes any structure; the current directory is that of a worker."""
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "worker")

    def make(*options: str, answer: str = "compute", general: str = "xc pbe\n", **settings: Any) -> Oracle:
        if "control" not in settings:
            settings["folder"] = str(aims_folder(tmp_path / "inputs", general))
        return load_oracle("aims", {"command": aims_command(answer, *options)} | settings)

    return make


def test_the_recorded_run_comes_back_to_the_last_digit(aims: Make, tmp_path: Path) -> None:
    oracle = aims(answer="replay")
    before = contents(tmp_path / "inputs")
    result = label(oracle, WATER)
    recorded = read_result((RECORDED / "aims" / "singlepoint.out").read_text())
    assert result.energy == recorded.energy
    np.testing.assert_array_equal(result.forces, recorded.forces)
    assert result.evidence == "'Self-consistency cycle converged.' and 'Have a nice day.' after 11 iterations"
    assert contents(tmp_path / "inputs") == before
    assert list(Path.cwd().iterdir()) == []


def test_the_stand_in_refuses_another_structure(aims: Make) -> None:
    moved = replace(WATER, positions=WATER.positions + np.array([0.0, 0.0, 1e-4]))
    with pytest.raises(OracleCrashed, match=r"exit status 1\)[\s\S]*stand-in: position"):
        label(aims(answer="replay"), moved)


def test_the_label_names_the_version_and_the_hartree_of_its_output(aims: Make) -> None:
    result = label(aims(), WATER)
    assert result.code == "aims 221103 cd81235a3"
    assert "version 221103 cd81235a3; 1 Ha = 27.211384500 eV" in result.evidence
    assert "exit status" not in result.evidence


def test_charge_spin_and_stress_reach_the_code(aims: Make) -> None:
    ion = replace(CRYSTAL, charge=1, multiplicity=2)
    wanted = ("charge 1", "spin collinear", "fixed_spin_moment 1", "compute_analytical_stress .true.", "k_grid 2 2 2")
    required = [word for wish in wanted for word in ("--require", wish)]
    result = label(aims(*required, general="xc pbe\nk_grid 2 2 2\n", stress=True), ion)
    assert result.stress is not None
    assert np.abs(result.stress - result.stress.T).max() < 1e-12
    assert np.abs(result.stress).max() > 1e-3


def test_a_molecule_has_no_stress_even_if_asked_for(aims: Make) -> None:
    assert label(aims(stress=True), WATER).stress is None


def test_settings_in_the_config_are_written_by_ase(aims: Make, tmp_path: Path) -> None:
    control = {"xc": "pbe0", "relativistic": "atomic_zora scalar", "sc_accuracy_rho": 1e-06, "k_grid": [2, 2, 1], "d3": True}
    wanted = ("xc pbe0", "relativistic atomic_zora scalar", "sc_accuracy_rho 1e-06", "k_grid 2 2 1", "d3 .true.")
    required = [word for wish in wanted for word in ("--require", wish)]
    settings = {"control": control, "species_dir": str(species_folder(tmp_path / "light"))}
    plain = label(aims(*required, **settings), CRYSTAL)
    from_file = label(aims(general="xc pbe\nk_grid 2 2 1\n"), CRYSTAL)
    assert plain.energy == from_file.energy
    assert plain.fingerprint != from_file.fingerprint


def test_the_fingerprint_sees_the_species_but_not_their_comments(aims: Make, tmp_path: Path) -> None:
    def named(folder: str, extra: str = "", **control: Any) -> str:
        directory = str(species_folder(tmp_path / folder, extra))
        return fingerprint(aims(control={"xc": "pbe"} | control, species_dir=directory))

    assert named("a") == named("b", "# more words\n") == named("c", charge=1, sc_iter_limit=30)
    assert len({named("a"), named("d", "     hydro 3 d 7.6\n"), named("a", xc="rpbe")}) == 3


@pytest.mark.parametrize(("keep", "kept"), [("none", (0, 0)), ("failed", (0, 1)), ("all", (1, 2))])
def test_folders_are_kept_as_asked(aims: Make, keep: str, kept: tuple[int, int]) -> None:
    def folders() -> int:
        return sum(path.is_dir() for path in Path.cwd().iterdir())

    label(aims(keep_files=keep), WATER)
    assert folders() == kept[0]
    with pytest.raises(SCFNotConverged):
        label(aims("--fault", "unconverged", keep_files=keep), WATER)
    assert folders() == kept[1]


def test_the_ladder_is_climbed_to_the_first_rung_that_converges(aims: Make) -> None:
    ladder = [{"charge_mix_param": 0.1}, {"charge_mix_param": 0.02, "n_max_pulay": 12}, {"mixer": "linear"}]
    plain = label(aims(), WATER)
    result = label(aims("--converges-with", "charge_mix_param 0.02", ladder=ladder, keep_files="all"), WATER)
    assert (result.rung, plain.rung) == (2, 0)
    assert (result.fingerprint, result.frame_id) == (plain.fingerprint, plain.frame_id)
    folders = {path.name.removeprefix(f"aims-{plain.frame_id[:12]}") for path in Path.cwd().iterdir() if path.is_dir()}
    assert folders == {"", "-rung1", "-rung2"}


def test_the_end_of_the_ladder_is_a_failure_of_every_rung(aims: Make) -> None:
    with pytest.raises(SCFNotConverged, match=r"rung 0: [\s\S]*rung 1: [\s\S]*did not converge"):
        label(aims("--fault", "unconverged", ladder=[{"charge_mix_param": 0.02}]), WATER)


def test_only_a_failed_scf_climbs(aims: Make) -> None:
    with pytest.raises(OracleCrashed):
        label(aims("--fault", "truncated", ladder=[{"charge_mix_param": 0.02}]), WATER)
    assert len([path for path in Path.cwd().iterdir() if path.is_dir()]) == 1


def test_a_prescribed_version_is_part_of_the_theory(aims: Make) -> None:
    given = aims(version="221103")
    assert label(given, WATER).code == given.code == "aims 221103"
    assert fingerprint(given) != fingerprint(aims())
    with pytest.raises(OracleInconsistent, match=r'says version "240507 cd81235a3", but \[oracle.aims\] version = "221103"'):
        label(aims("--version", "240507", version="221103"), WATER)
    with pytest.raises(OracleInconsistent, match='says version "nothing"'):
        label(aims(answer="replay", version="221103"), WATER)


def test_a_failure_lends_no_density_on(aims: Make) -> None:
    label(aims(restart=True), WATER)
    with pytest.raises(SCFNotConverged):
        label(aims("--fault", "unconverged", restart=True), WATER)
    assert "started from" not in label(aims(restart=True), WATER).evidence


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give either folder"),
        ({"folder": "x", "control": {"xc": "pbe"}}, "not both"),
        ({"control": {"xc": "pbe"}}, "control needs species_dir"),
        ({"folder": "x", "species_dir": "y"}, "folder needs no species_dir"),
        ({"folder": "x", "ladder": [{"xc": "lda"}]}, "'xc' is not among them"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(OracleConfigError, match=said):
        load_oracle("aims", {"command": "aims.x"} | settings)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"command": "no-such-aims.x -v"}, EnvironmentProblem, "starts with 'no-such-aims.x', which is no program here"),
        ({"command": "./aims.x"}, OracleConfigError, "relative to a folder"),
        ({"command": "  "}, OracleConfigError, "command is empty"),
        ({"folder": "/nowhere"}, OracleConfigError, r"/nowhere/control\.in cannot be read"),
        ({"folder": "", "control": {"xc": "pbe"}, "species_dir": "/nowhere"}, OracleConfigError, "holds no file like 01_H_default"),
        ({"folder": "", "control": {"spin": "none"}, "species_dir": "SPECIES"}, OracleConfigError, "ASE cannot write.*KeyError 'xc'"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_any_work(
    aims: Make, tmp_path: Path, settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    whole = {"folder": str(aims_folder(tmp_path / "inputs")), "command": aims_command("compute")} | settings
    if whole.get("species_dir") == "SPECIES":
        whole["species_dir"] = str(species_folder(tmp_path / "light"))
    oracle = load_oracle("aims", whole)
    with pytest.raises(error, match=said):
        oracle.check(WATER)
    assert list(Path.cwd().iterdir()) == []


def test_a_missing_species_is_said_before_any_work(aims: Make, tmp_path: Path) -> None:
    gold = Frames(np.array([79, 79]), np.array([[[0.0, 0, 0], [2.5, 0, 0]]]))
    with pytest.raises(OracleConfigError, match="has no Au"):
        aims().check(gold)
    with pytest.raises(OracleConfigError, match=r"there is no .*79_Au_default"):
        aims(control={"xc": "pbe"}, species_dir=str(species_folder(tmp_path / "light"))).check(gold)


def test_odd_electrons_need_another_multiplicity_unless_bands_share_them(aims: Make) -> None:
    with pytest.raises(OracleConfigError, match=r"9 electrons .* cannot have multiplicity 1"):
        aims().check(replace(WATER, charge=1))
    aims().check(replace(WATER, charge=1, multiplicity=2))
    aims(general="xc pbe\nk_grid 1 1 1\n").check(replace(CRYSTAL, charge=1))


def test_through_the_executor_two_labels_at_once(aims: Make, tmp_path: Path) -> None:
    oracle = aims()
    settings = {"command": aims_command("compute"), "folder": str(tmp_path / "inputs")}
    frames = [replace(WATER, positions=WATER.positions * scale) for scale in (1.0, 1.1, 1.2)]
    with LocalExecutor("aims", settings, 2, 60.0, tmp_path / "work", 1, tmp_path / "spool") as executor:
        got = [future.result() for future in [executor.submit(frame) for frame in frames]]
    for frame, theirs in zip(frames, got, strict=True):
        mine = label(oracle, frame)
        assert theirs.energy == mine.energy
        assert theirs.forces.tobytes() == mine.forces.tobytes()
