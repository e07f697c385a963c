"""Selecting from a labelled pool through the command line: what is chosen, what is never chosen, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from small_pool import CONFIG, frames, labelled, of_scratch, write_pool
from small_run import command, program

from bnn_driver.active.likeness import Gallery
from bnn_driver.config import Run
from bnn_driver.errors import ConfigError
from bnn_driver.loops.division import divide, open_pool
from bnn_driver.loops.pool import check_selection, select
from bnn_driver.pool_config import read_select_config
from bnn_driver.records import Frames
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import read_events

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def check(config: Path) -> None:
    check_selection(config, lambda name, text: None)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("round_*.json"))]


def events(config: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(config.parent / "run" / "events") if event["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished selection; the config's path."""
    config = write_pool(tmp_path_factory.mktemp("pool"))
    done = program("select", config)
    assert done.returncode == 0, done.stderr
    assert "all 3 rounds are done" in done.stdout
    return config


def test_rounds_are_labelled_learnt_and_reported(finished: Path) -> None:
    run = finished.parent / "run"
    rounds = records(run / "selection")
    assert [len(record["chosen"]) for record in rounds] == [6, 4, 4, 4]
    chosen = [i for record in rounds for i in record["chosen"]]
    labels = LabelStore(run / "labels").all()
    assert [item.context["frame"] for item in labels] == chosen
    truth = ase.io.read(finished.parent / "pool.extxyz", ":")
    for item in labels:
        frame = truth[item.context["frame"]]
        np.testing.assert_array_equal(item.frame.positions[0], frame.positions)
        assert item.label.energy == frame.info["REF_energy"]
    facts = json.loads(program("status", finished, "--json").stdout)
    assert [row["labels"] for row in facts["rounds"]] == [6, 10, 14, 18]
    assert facts["rounds"][-1]["force_error"] < 0.5 * facts["rounds"][0]["force_error"]
    assert all(row["random_runs"] == 1 for row in facts["rounds"])
    for row, record in zip(facts["rounds"], rounds[1:], strict=False):
        assert row["selected"] == pytest.approx(np.mean(record["frame_disagreement"]))
    assert (run / "selection.png").read_bytes().startswith(b"\x89PNG")


def test_no_frame_is_learnt_twice_or_tested_and_learnt(finished: Path) -> None:
    """Not even nearly: neither by the selection nor, for test frames, by the baseline."""
    run = finished.parent / "run"
    pool = ase.io.read(finished.parent / "pool.extxyz", ":")
    start = events(finished, "start")[0]
    rounds, lot = records(run / "selection"), records(run / "baseline" / "0")
    chosen, drawn = ([i for record in some for i in record["chosen"]] for some in (rounds, lot))
    assert len(set(chosen)) == len(chosen) == len(set(drawn)) == len(drawn) == 18
    assert chosen[:6] == drawn[:6], "both begin with the same frames"
    assert start["candidates"] == len(pool) - 12 - 6
    structures = [Frames(atoms.numbers, atoms.positions[None]) for atoms in pool]
    held, gallery = Gallery(0.02), Gallery(0.02)
    for i in rounds[0]["test"]:
        held.add(structures[i])
    assert len(rounds[0]["test"]) == 12
    assert not any(held.has(structures[i]) for i in chosen + drawn)
    for i in chosen:
        assert not gallery.has(structures[i])
        gallery.add(structures[i])


def test_offsets_put_labels_on_the_models_scale(finished: Path) -> None:
    """Labels lie thousands of eV from the model, by constants per atom; the errors on the test frames do not show them."""
    facts = json.loads(program("status", finished, "--json").stdout)
    assert abs(LabelStore(finished.parent / "run" / "labels").all()[0].label.energy) > 2000
    assert facts["rounds"][-1]["energy_rmse"] < 5.0


def test_a_finished_selection_does_nothing_again(finished: Path) -> None:
    before = {kind: len(events(finished, kind)) for kind in ("label", "update", "selection", "test", "baseline update")}
    assert before == {"label": 18, "update": 4, "selection": 3, "test": 4, "baseline update": 4}
    assert program("select", finished).returncode == 0
    assert {kind: len(events(finished, kind)) for kind in before} == before


def test_more_rounds_go_on_from_where_it_ended(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "copy")
    config = tmp_path / "copy" / "bnn.toml"
    config.write_text(config.read_text().replace("rounds = 3", "rounds = 4").replace("baseline = 1", "baseline = 0"))
    done = program("select", config)
    assert done.returncode == 0, done.stderr
    assert [len(record["chosen"]) for record in records(config.parent / "run" / "selection")] == [6, 4, 4, 4, 4]
    assert len(events(config, "update")) == 5
    config.write_text(config.read_text().replace("test = 12", "test = 13"))
    refused = program("select", config)
    assert refused.returncode == 2
    assert "test: was 12, now 13" in refused.stderr


def test_frames_by_lot_are_not_learnt_with_another_effort(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "copy")
    config = tmp_path / "copy" / "bnn.toml"
    text = config.read_text().replace("baseline = 1", "baseline = 2")
    config.write_text(text.replace("steps_per_update = 150", "steps_per_update = 50"))
    with pytest.raises(ConfigError, match=r"\[ensemble\] steps_per_update = 50, and updates of this run had 150; set it back"):
        select(config)
    assert "steps_per_update = 50" in events(config, "stop")[-1]["reason"]
    assert not (config.parent / "run" / "baseline" / "1" / "generations").exists()


MOMENTS = (
    "selection/round_000.json",
    "labels/000003.extxyz",
    "generations/000001",
    "selection/test_001.json",
    "selection/round_002.json",
    "generations/000003",
    "baseline/0/round_000.json",
    "baseline/0/generations/000002",
)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_labels_and_weights(finished: Path, tmp_path: Path) -> None:
    config = write_pool(tmp_path)
    for moment in MOMENTS:
        process = subprocess.Popen(command("select", config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / "run" / moment).exists():
            assert process.poll() is None, "it ended before"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = program("select", config)
    assert done.returncode == 0, done.stderr
    for place in ("selection", "baseline/0"):
        assert records(tmp_path / "run" / place) == records(finished.parent / "run" / place)
    for name in ("generations/000004", "baseline/0/generations/000004"):
        mine, other = (folder / "run" / name / "weights.safetensors" for folder in (tmp_path, finished.parent))
        assert mine.read_bytes() == other.read_bytes()
    told = [event["frame_id"] for event in events(config, "label")]
    assert len(told) == len(set(told)) == 18


def changed(**info: Any) -> Any:
    """The pool with something else in its third frame."""
    pool = frames(60)
    pool[2].info |= info
    return pool


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('energy_key = "REF_energy"\n', "", "energy_key is missing and is not guessed"),
        ('"REF_forces"', '"forces"', "there are: REF_forces"),
        ("batch = 4", "batch = 60", "batches of 60 are wanted"),
        ("test = 12", "test = 60", "60 test frames"),
        ("start = 6", "start = [0, 99]", "names frame 99"),
        ("start = 6", "start = [0, 1, 2]", "do not fix the constants of the energies of H1O1"),
        ("start = 6", "start = 1", "at least 2 start frames"),
        ("start = 6", "start = [3, 3]", "none twice"),
        ("start = 6", 'start = "absent.extxyz"', "absent.extxyz"),
        ("start = 6", "start = [0, 3, 60]", "start frames of the same structure"),
        ("rounds = 3", "rounds = 3\nmax_labels = 5", "max_labels = 5, but there are 6 start frames"),
        ("rounds = 3", 'rank = "forces"', "rank"),
        (
            "[accuracy]",
            '[committee]\nkind = "scratch"\nmace = { channels = 16 }\n[accuracy]',
            "[committee] mace: mace's trainer does not take these options: unrecognized arguments: --channels",
        ),
        ("[accuracy]", '[committee]\nkind = "scratch"\nmace = { r_max = "far" }\n[accuracy]', "r_max: invalid float value"),
        ("[accuracy]", '[executor]\nkind = "parsl"\n[accuracy]', "[executor] has no meaning"),
        ("[accuracy]", '[committee]\nkind = "scratch"\nmace = { seed = 3 }\n[accuracy]', "seed cannot be given"),
        ("[accuracy]", '[oracle]\nkind = "toy"\n[accuracy]', "[oracle] has no meaning"),
        ("[accuracy]", "[system]\nperiodic = true\n[accuracy]", "pbc says otherwise"),
        ("[accuracy]", "[committee]\nsteps = 100\n[accuracy]", "[committee] steps has no meaning here"),
        ("[accuracy]", '[trainer]\ndevice = "cuda"\n[accuracy]', "[trainer] device has no meaning here"),
        ("[accuracy]", "[output]\nstride = 2\n[accuracy]", "[output] stride has no meaning here"),
        ("seed = 7", 'seed = 7\nmargin = "5 min"', "[run] margin has no meaning here"),
        ("[potential]", '[committee]\nkind = "scratch"\n[potential]\nmodel = "toy"', "[potential] model has no meaning here"),
        (
            "members = 4",
            'members = 4\nsteps_per_update = 9\n[committee]\nkind = "scratch"',
            "[ensemble] steps_per_update has no meaning",
        ),
        ("baseline = 1", 'stress_key = "s"\n[committee]\nkind = "scratch"', "learn no stress"),
        ("duplicates", "", ""),
    ],
)
def test_a_mistake_is_named_before_any_work(tmp_path: Path, old: str, new: str, says: str) -> None:
    if old == "duplicates":
        old, new, says = "batch = 4", 'batch = 4\nduplicates = "3 A"', "nearly the same"
    assert old in CONFIG
    text = of_scratch(CONFIG) if "scratch" in new else CONFIG
    config = write_pool(tmp_path, [*frames(60), frames(1)[0]], text.replace(old, new))
    for verb in (check, select):
        with pytest.raises(ConfigError) as refusal:
            verb(config)
        assert says in str(refusal.value)
    assert not (tmp_path / "run").exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        (lambda: changed(REF_energy=np.nan), "frame 2 (line 11): REF_energy is not finite"),
        (lambda: changed(REF_energy=-9000.0), "do not mix"),
        (lambda: frames(60)[:14], "14 frames to choose from"),
    ],
)
def test_a_pool_that_cannot_be_used_is_refused_before_any_work(tmp_path: Path, pool: Any, says: str) -> None:
    config = write_pool(tmp_path, pool())
    with pytest.raises(ConfigError) as refusal:
        select(config)
    assert says in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_elements_that_the_model_does_not_know_are_named_with_the_frame(tmp_path: Path) -> None:
    iodine = ase.Atoms("HI", positions=[[0, 0, 0], [1.6, 0, 0]])
    iodine.info["REF_energy"], iodine.arrays["REF_forces"] = -1050.0, np.zeros((2, 3))
    config = write_pool(tmp_path, [*frames(60), iodine], CONFIG.replace('model = "toy"', 'model = "embedded"'))
    with pytest.raises(ConfigError, match=r"frame 60 \(line .*element I, which .*embedded"):
        select(config)


def test_start_frames_drawn_by_lot_fix_the_energies_of_all_compositions(tmp_path: Path) -> None:
    """One hydroxyl among sixty waters is drawn, whatever the seed: without it its constants would be unknown."""
    pool = frames(60, mixed=False)
    pool[17] = labelled("OH", pool[17].positions[:2])
    config = read_select_config(
        write_pool(tmp_path, pool, CONFIG.replace("start = 6", "start = 2").replace("test = 12", "test = 1"))
    )
    found = open_pool(config, tmp_path)
    for seed in range(8):
        division = divide(found, config.model_copy(update={"run": Run(seed=seed)}))
        assert 17 in [*division.start, *division.test]


def test_test_and_start_frames_may_be_files(tmp_path: Path) -> None:
    """Frames of the pool that are nearly a test frame are never chosen, wherever they lie and however they are turned."""
    pool = frames(40, mixed=False)
    turned = [a.copy() for a in pool[:10]]
    for atoms in turned:
        atoms.rotate(70, "x", rotate_cell=False)
        atoms.positions += [5.0, 0.0, 1.0]
        atoms.arrays["REF_forces"] = labelled("OH2", atoms.positions).arrays["REF_forces"]
    ase.io.write(tmp_path / "test.extxyz", turned, format="extxyz")
    ase.io.write(tmp_path / "start.extxyz", frames(5, seed=9, mixed=False), format="extxyz")
    text = CONFIG.replace("test = 12", 'test = "test.extxyz"').replace(
        "start = 6", 'start = "start.extxyz"\nduplicates = "0.001 A"'
    )
    config = write_pool(tmp_path, pool, text.replace("rounds = 3", "rounds = 20").replace("baseline = 1", "baseline = 0"))
    cheap = (
        config.read_text()
        .replace("steps_per_update = 150", "steps_per_update = 5")
        .replace("loss_margin = 50.0", "loss_margin = 1e9")
    )
    config.write_text(cheap)
    select(config)
    rounds = records(tmp_path / "run" / "selection")
    assert rounds[0]["chosen"] == [50, 51, 52, 53, 54]
    chosen = {i for record in rounds[1:] for i in record["chosen"]}
    assert chosen
    assert not chosen & set(range(10))
    assert "used up" in events(config, "stop")[-1]["reason"]


def test_the_budget_cuts_the_last_batch(tmp_path: Path) -> None:
    config = write_pool(tmp_path, config=CONFIG.replace("rounds = 3", "max_labels = 12"))
    select(config)
    for place in ("selection", "baseline/0"):
        assert [len(record["chosen"]) for record in records(tmp_path / "run" / place)] == [6, 4, 2]
    assert "12 labels" in events(config, "stop")[-1]["reason"]


def test_a_plateau_ends_it(tmp_path: Path) -> None:
    text = CONFIG.replace("rounds = 3\nplateau = false", "plateau_rounds = 2\nplateau_fall = 0.9\nplateau_approach = 1e6")
    config = write_pool(tmp_path, config=text.replace("baseline = 1", "baseline = 0"))
    select(config)
    assert "level" in events(config, "stop")[-1]["reason"]
    assert len(records(tmp_path / "run" / "selection")) < 10, "not because the pool was used up"


def test_charges_and_levels_of_the_frames_go_with_their_labels(tmp_path: Path) -> None:
    pool = frames(60)
    for i, atoms in enumerate(pool):
        atoms.info |= {"q": i % 2, "theory": "pbe"}
    text = CONFIG.replace("rounds = 3", 'rounds = 1\ncharge_key = "q"\nlevel_key = "theory"').replace(
        "baseline = 1", "baseline = 0"
    )
    config = write_pool(tmp_path, pool, text.replace("steps_per_update = 150", "steps_per_update = 40"))
    select(config)
    items = LabelStore(tmp_path / "run" / "labels").all()
    assert [item.frame.charge for item in items] == [item.context["frame"] % 2 for item in items]
    assert {item.frame.charge for item in items} == {0, 1}


@pytest.mark.parametrize("rank", ["energy", "predictive", "atom"])
def test_frames_are_ranked_by_what_was_asked_for(tmp_path: Path, rank: str) -> None:
    text = CONFIG.replace("rounds = 3", f'rounds = 1\nrank = "{rank}"\ndiversity = false').replace("baseline = 1", "baseline = 0")
    config = write_pool(tmp_path, config=text.replace("steps_per_update = 150", "steps_per_update = 40"))
    select(config)
    record = records(tmp_path / "run" / "selection")[1]
    assert record["rank"] == rank
    if rank == "predictive":
        pool = ase.io.read(tmp_path / "pool.extxyz", ":")
        per_atom = [sd / len(pool[i]) for sd, i in zip(record["frame_energy_sd"], record["chosen"], strict=True)]
        assert per_atom == sorted(per_atom, reverse=True)


def test_a_target_on_the_test_frames_ends_it(tmp_path: Path) -> None:
    config = write_pool(
        tmp_path, config=CONFIG.replace("rounds = 3", 'target = "100 eV/A"').replace("baseline = 1", "baseline = 0")
    )
    select(config)
    assert len(records(tmp_path / "run" / "selection")) == 1
    assert "target is reached" in events(config, "stop")[-1]["reason"]
