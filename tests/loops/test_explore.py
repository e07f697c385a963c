"""Exploring through the command line with a real i-PI: what is kept, labelled and learnt, why it ends, and what a kill leaves."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from small_exploration import CONFIG, KNOWN, START, known_pool, recorder, write_exploration
from small_run import command, program, write_run

from bnn_driver.active.likeness import Gallery
from bnn_driver.errors import BnnError, ConfigError, GuardStop
from bnn_driver.loops import together
from bnn_driver.loops.assembly import STOP_SECONDS
from bnn_driver.loops.chains import Chains
from bnn_driver.loops.explore import check_exploration, explore
from bnn_driver.records import Frames, Prediction
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import read_events

pytestmark = [pytest.mark.ipi, pytest.mark.filterwarnings("ignore::UserWarning")]


def check(config: Path) -> None:
    check_exploration(config, lambda name, text: None)


def records(config: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((config.parent / "run" / "exploration").glob(f"{name}_*.json"))]


def events(config: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(config.parent / "run" / "events") if event["kind"] == kind]


def reason(config: Path) -> str:
    return str(events(config, "stop")[-1]["reason"])


def labels(config: Path) -> list[Any]:
    return LabelStore(config.parent / "run" / "labels").all()


def frames(config: Path, number: int, walker: str = "300K") -> list[ase.Atoms]:
    return ase.io.read(config.parent / "run" / "exploration" / f"round_{number:03d}" / f"{walker}.extxyz", ":")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished exploration of two rounds with audits and two temperatures; the config's path."""
    config = write_exploration(
        tmp_path_factory.mktemp("water"),
        ("[300]", '[300, "500 K"]'),
        ("rounds = 2", "rounds = 2\naudits = 2"),
    )
    done = program("explore", config)
    assert done.returncode == 0, done.stderr
    assert "all 2 rounds are done" in done.stdout
    return config


def test_rounds_are_simulated_labelled_learnt_and_reported(finished: Path) -> None:
    run = finished.parent / "run"
    assert [len(record["chosen"]) for record in records(finished, "chosen")] == [3, 3]
    assert len(records(finished, "screened")) == 3, "one more dynamics judges the last weights"
    assert all(record["frames"] == 2 * 11 for record in records(finished, "screened"))
    items = labels(finished)
    expected = [len(set(record["chosen"]) | set(record["audits"])) for record in records(finished, "chosen")]
    assert len(items) == sum(expected)
    assert {item.context["trajectory"] for item in items} <= {"300K", "500K"}
    assert {item.frame.charge for item in items} == {1}
    facts = json.loads(program("status", finished, "--json").stdout)
    assert [row["labels_before"] for row in facts["rounds"]] == [0, expected[0], sum(expected)]
    assert facts["rounds"][1]["audited"] == 2
    assert facts["rounds"][1]["selected"] > 0
    assert facts["rounds"][0]["known"] is None, "members that are one model have no level"
    assert facts["first_trajectory"]["before"] > 0
    assert facts["first_trajectory"]["after"] > 0
    assert (run / "exploration.png").read_bytes().startswith(b"\x89PNG")
    assert program("report", finished, "-o", finished.parent / "again.png").returncode == 0


def test_labels_are_of_kept_frames_and_no_two_nearly_the_same(finished: Path) -> None:
    gallery = Gallery(1e-3)
    kept = {(n, w): frames(finished, n, w) for n in (0, 1) for w in ("300K", "500K")}
    chosen = [item for item in labels(finished) if item.context["criterion"] != "audit"]
    for item in labels(finished):
        context = item.context
        same = [
            a
            for a in kept[context["round"], context["trajectory"]]
            if (a.info["step"], a.info["bead"]) == (context["step"], context["bead"])
        ]
        assert len(same) == 1
        np.testing.assert_array_equal(same[0].positions, item.frame.positions[0])
        assert context["step"] % 4 == 0
    for item in chosen:
        assert not gallery.has(item.frame)
        gallery.add(item.frame)


def test_a_round_starts_from_the_last_good_frame_of_its_walker(finished: Path) -> None:
    for walker in ("300K", "500K"):
        for number in (1, 2):
            np.testing.assert_allclose(
                frames(finished, number, walker)[0].positions, frames(finished, number - 1, walker)[-1].positions, atol=1e-6
            )
    assert not np.allclose(frames(finished, 0, "300K")[-1].positions, frames(finished, 0, "500K")[-1].positions)


def test_seeds_come_from_the_root_seed_and_differ(finished: Path) -> None:
    folder = finished.parent / "run" / "exploration"
    texts = [path.read_text() for path in folder.glob("round_*/*K/input.xml")]
    seeds = {text.split("<seed>")[1].split("</seed>")[0] for text in texts}
    assert len(seeds) == len(texts) == 6


def test_a_finished_exploration_does_nothing_again(finished: Path) -> None:
    kinds = ("label", "update", "dynamics", "selection", "labelled")
    before = {kind: len(events(finished, kind)) for kind in kinds}
    assert before["dynamics"] == 6
    assert before["update"] == 2
    assert program("explore", finished).returncode == 0
    assert {kind: len(events(finished, kind)) for kind in kinds} == before


def test_more_rounds_go_on_and_other_physics_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "copy")
    config = tmp_path / "copy" / "bnn.toml"
    config.write_text(config.read_text().replace("rounds = 2", "rounds = 3") + "\n[output]\nkeep_generations = 1\n")
    for _ in range(2):
        explore(config)
        assert len(records(config, "chosen")) == 3
        assert len(events(config, "update")) == 3
    assert not (tmp_path / "copy" / "run" / "generations" / "000001").exists(), "weights of finished rounds are not needed"
    config.write_text(config.read_text().replace("seed = 7", "seed = 8"))
    with pytest.raises(ConfigError, match="seed: was 7, now 8"):
        explore(config)


def test_frames_by_lot_are_not_learnt_with_another_effort(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "copy")
    config = tmp_path / "copy" / "bnn.toml"
    text = config.read_text().replace("rounds = 2", "rounds = 2\nbaseline = 1")
    config.write_text(text.replace("steps_per_update = 60", "steps_per_update = 30"))
    with pytest.raises(ConfigError, match=r"\[ensemble\] steps_per_update = 30, and updates of this run had 60; set it back"):
        explore(config)


def test_the_start_structure_is_labelled_before_the_first_round(tmp_path: Path) -> None:
    """With --label, by the oracle of the run; a walker or a pool have no such thing."""
    config = write_exploration(tmp_path)
    done = program("check", config, "--label")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^label .* eV in .* s \(", done.stdout, re.MULTILINE)
    assert re.search(r"^differences .*energies against forces", done.stdout, re.MULTILINE)
    assert "everything is in order" in done.stdout
    assert not list((tmp_path / "run").glob("labels/*")), "no round was begun"
    assert "at all walkers of an exploration at once" in program("check", config, "--walker", "300K").stderr


MOMENTS = (
    "exploration/round_000/300K.extxyz",
    "exploration/chosen_000.json",
    "labels/000001.extxyz",
    "exploration/labelled_000.json",
    "generations/000001",
    "exploration/round_001/300K.extxyz",
    "labels/000004.extxyz",
    "labels/000007.extxyz",
    "generations/000002",
)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_counts_every_label_once(tmp_path: Path) -> None:
    config = write_exploration(
        tmp_path,
        ('kind = "toy"\n', 'kind = "toy"\nmax_labels = 8\ntoy = { delay = "0.1 s" }\n'),
        ("rounds = 2", "rounds = 2\naudits = 1"),
    )
    for moment in MOMENTS:
        process = subprocess.Popen(command("explore", config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / "run" / moment).exists():
            assert process.poll() is None, f"it ended before {moment}"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = program("explore", config)
    assert done.returncode == 0, done.stderr
    told = [event["frame_id"] for event in events(config, "label")]
    items = labels(config)
    assert len(told) == len(set(told)) == len(items) == 8
    for number in (0, 1):
        atoms = frames(config, number)
        assert [a.info["step"] for a in atoms] == list(range(0, 41, 4)), "every kept step stands there once"
    used = [name for record in records(config, "labelled") for name in record["labels"]]
    assert sorted(used) == sorted(item.label.frame_id for item in items), "a spent budget keeps no label from being learnt"
    state = json.loads((tmp_path / "run" / "generations" / "000002" / "state.json").read_text())
    assert sorted(state["label_ids"]) == sorted(used)


def test_audits_of_walkers_that_start_from_one_structure_are_of_different_ones(tmp_path: Path) -> None:
    config = write_exploration(
        tmp_path,
        ("[300]", "[300, 400]"), ("steps = 40", "steps = 4"), ("start = 3", "start = 2"), ("batch = 3", "batch = 2\naudits = 2"),
        ("rounds = 2", "rounds = 1"), ("steps_per_update = 60", "steps_per_update = 5"),
    )  # fmt: skip
    explore(config)
    record = records(config, "labelled")[0]
    assert len(set(record["labels"])) == len(record["labels"]) == len(labels(config))
    assert record["audited"] == 2


@pytest.mark.slow
def test_a_label_that_outlasts_every_job_is_said_to_need_more_time(tmp_path: Path) -> None:
    config = write_exploration(
        tmp_path,
        ('kind = "toy"\ntimeout = "20 s"', 'kind = "toy"\ntimeout = "90 s"\ntoy = { delay = "60 s" }'), ("seed = 7", 'seed = 7\nmargin = "3 s"'),
        ("rounds = 2", "rounds = 1"),
    )  # fmt: skip
    stopped = program("explore", "--until", "30 s", config)
    assert stopped.returncode == 75, stopped.stderr
    assert "wall limit" in reason(config)
    refused = program("explore", "--until", "20 s", config)
    assert refused.returncode == 7, refused.stderr
    assert "ask for more time" in refused.stderr
    config.write_text(config.read_text().replace('delay = "60 s"', 'delay = "0 s"'))
    explore(config)
    assert "all 1 rounds are done" in reason(config)


BESIDE = (
    "baseline/labels/000000.extxyz",
    "baseline/labels/000003.extxyz",
    "baseline/0/drawn_000.json",
    "baseline/0/tested_001.json",
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exploration from known frames with two baselines, killed at four moments of these; the config's path."""
    folder = tmp_path_factory.mktemp("compared")
    known_pool(folder / "known.extxyz")
    config = write_exploration(
        folder,
        ("approach = 0", f"approach = 0\n{KNOWN}"),
        ("batch = 3", "batch = 3\naudits = 2\nbaseline = 2"), ('kind = "toy"\n', 'kind = "toy"\nmax_labels = 10\n'),
    )  # fmt: skip
    for moment in BESIDE:
        process = subprocess.Popen(command("explore", config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (folder / "run" / "exploration" / moment).exists():
            assert process.poll() is None, f"it ended before {moment}"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = program("explore", config)
    assert done.returncode == 0, done.stderr
    assert "by lot" in done.stdout
    return config


def test_frames_by_lot_are_as_many_of_the_same_dynamics_and_labelled_once(compared: Path) -> None:
    beside = compared.parent / "run" / "exploration" / "baseline"
    chosen, labelled = records(compared, "chosen")[0], records(compared, "labelled")[0]
    audits = {name for name, is_audit in zip(labelled["labels"], labelled["is_audit"], strict=True) if is_audit}
    own = {item.label.frame_id: item for item in labels(compared)}
    extra = {item.label.frame_id: item for item in LabelStore(beside / "labels").all()}
    assert own
    assert extra
    assert not own.keys() & extra.keys(), "what the run had labelled is not computed again"
    assert len(list((compared.parent / "run" / "oracle" / "spool" / "done").glob("*.json"))) == len(own) + len(extra)
    kept = frames(compared, 0)
    lots = []
    for number in ("0", "1"):
        drawn = json.loads((beside / number / "drawn_000.json").read_text())["rows"]
        assert len(set(drawn)) == len(labelled["labels"]) - len(audits)
        assert not set(drawn) & set(chosen["audits"])
        state = json.loads((beside / number / "generations" / "000002" / "state.json").read_text())
        learnt = [name for name in state["label_ids"] if name in own or name in extra]
        assert len(state["label_ids"]) == 12 + len(labelled["labels"]), "the same number, beside the twelve known ones"
        assert audits <= set(learnt)
        by_name = own | extra
        places = [by_name[name].frame.positions[0] for name in learnt if name not in audits]
        for row, place in zip(drawn, places, strict=True):
            np.testing.assert_array_equal(place, kept[row].positions)
        assert not list((beside / number).glob("drawn_001.json")), "nothing is left to test the last round by"
        lots.append(drawn)
    assert lots[0] != lots[1]


def test_baselines_are_tested_at_the_same_audits(compared: Path) -> None:
    beside = compared.parent / "run" / "exploration" / "baseline"
    tests = [json.loads((beside / "0" / f"tested_{n:03d}.json").read_text()) for n in (0, 1)]
    before, after = records(compared, "labelled")
    assert tests[0]["audit_error"] == pytest.approx(before["audit_error"], rel=1e-6), "nothing differs yet but the folder"
    assert tests[1]["labels"] == len(before["labels"])
    assert len(tests[1]["force_error"]) == after["audited"]
    rows = json.loads(program("status", compared, "--json").stdout)["rounds"]
    other = json.loads((beside / "1" / "tested_001.json").read_text())["audit_error"]
    assert rows[1]["lot_error"] == pytest.approx((tests[1]["audit_error"] + other) / 2)
    assert rows[1]["lot_runs"] == 2
    assert tests[1]["audit_error"] != after["audit_error"], "other frames were learnt"


def test_labels_by_lot_are_neither_counted_nor_bought_from_the_budget(compared: Path) -> None:
    told = [event["frame_id"] for event in events(compared, "label")]
    assert sorted(told) == sorted(item.label.frame_id for item in labels(compared))
    assert len(told) == json.loads(program("status", compared, "--json").stdout)["labels"] <= 10
    before = len(events(compared, "baseline update"))
    assert before == 4, "two weights for each baseline, none learnt twice"
    assert program("explore", compared).returncode == 0
    assert len(events(compared, "baseline update")) == before


def with_own_inputs(folder: Path, steps: int, explore_section: str) -> Path:
    """Two walkers with inputs of the user's own."""
    write_run(folder, steps=steps, walkers=2)
    text = CONFIG.split("[explore]")[0].replace("charge = 1\n", "").replace('[ipi]\nconnect_timeout = "20 s"\n', "")
    config = folder / "bnn.toml"
    config.write_text(f'{text}[ipi.walkers]\ncold = "w0.xml"\nhot = "w1.xml"\n[explore]\n{explore_section}')
    return config


def test_an_exploding_walker_is_stopped_and_what_it_saw_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_own_inputs(tmp_path, 40, "stride = 3\nstart = 2\nbatch = 2\nrounds = 1\napproach = 1e6\n")
    hot = (tmp_path / "w1.xml").read_text()
    (tmp_path / "w1.xml").write_text(hot.replace("'femtosecond'> 0.5 <", "'femtosecond'> 5 <"))
    explore(config)
    ended = {event["walker"]: event for event in events(config, "dynamics") if event["round"] == 0}
    assert not ended["cold"]["stopped"]
    assert "below the limit of 0.5 Å" in ended["hot"]["stopped"]
    last = ended["hot"]["step"]
    assert 1 < last < 40
    seen = frames(config, 0, "hot")
    assert [a.info["step"] for a in seen] == sorted({*range(0, last + 1, 3), last}), "what it saw, its last good step too"
    assert len(frames(config, 0, "cold")) == 14
    assert "walker hot left the sanity window at step" in capsys.readouterr().err
    again = frames(config, 1, "hot")[0].positions
    assert not np.allclose(again, seen[-1].positions), "not from where it was lost"
    assert any(np.allclose(again, a.positions, atol=1e-6) for a in seen[:-1])
    assert "converged" not in reason(config), "nothing has converged while walkers are lost"


def test_a_start_outside_the_sanity_window_ends_it(tmp_path: Path) -> None:
    config = write_exploration(tmp_path, ("[explore]", '[sanity]\nmin_distance = "1.5 A"\n[explore]'))
    with pytest.raises(GuardStop, match="walker 300K: the start structure is outside the sanity window"):
        explore(config)
    assert labels(config) == []


def test_frames_of_a_ring_are_its_beads(tmp_path: Path) -> None:
    config = write_exploration(tmp_path, ("steps = 40", "steps = 8\nbeads = 4"), ("rounds = 2", "rounds = 1"))
    explore(config)
    for number in (0, 1):
        last = [a for a in frames(config, number) if a.info["step"] == 8]
        assert [a.info["bead"] for a in last] == [0, 1, 2, 3]
        spread = np.std([a.positions for a in last], axis=0)
        assert spread.max() > 1e-3, "beads, not the centroid four times"
    first = [a.positions for a in frames(config, 1) if a.info["step"] == 0]
    np.testing.assert_allclose(first, [a.positions for a in frames(config, 0) if a.info["step"] == 8], atol=1e-6)


def test_inputs_of_the_users_own_are_run_and_started_again_elsewhere(tmp_path: Path) -> None:
    config = with_own_inputs(tmp_path, 12, 'stride = 4\nstart = 2\nbatch = 2\nrounds = 1\nduplicates = "0.001 A"\n')
    explore(config)
    for walker in ("cold", "hot"):
        assert [a.info["step"] for a in frames(config, 0, walker)] == [0, 4, 8, 12]
        np.testing.assert_allclose(
            frames(config, 1, walker)[0].positions, frames(config, 0, walker)[-1].positions, atol=1e-6
        )  # fmt: skip
    assert not np.allclose(frames(config, 0, "cold")[-1].positions, frames(config, 0, "hot")[-1].positions)


def test_charge_and_multiplicity_reach_the_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recorder(tmp_path, monkeypatch, ("charge = 1", "charge = 1\nmultiplicity = 2"), ("rounds = 2", "rounds = 1"))
    explore(config)
    told = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert len(told) == 3
    assert {(x["charge"], x["multiplicity"]) for x in told} == {(1, 2)}
    assert {(x.frame.charge, x.frame.multiplicity) for x in labels(config)} == {(1, 2)}


def test_an_oracle_without_charge_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recorder(tmp_path, monkeypatch, ('charge_key = "info:charge"\n', ""))
    for verb in (check, explore):
        with pytest.raises(BnnError, match="neutral systems only, but the charge is \\+1"):
            verb(config)
    assert not (tmp_path / "run").exists()


def test_a_frame_that_cannot_be_labelled_is_replaced_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recorder(
        tmp_path, monkeypatch, ("rounds = 2", "rounds = 1"), ("[oracle.ase.arguments]", "[oracle.ase.arguments]\nfails = [1]")
    )
    explore(config)
    record = records(config, "labelled")[0]
    assert len(record["failed"]) == 1
    assert len(record["labels"]) == len(labels(config)) == 3
    assert record["failed"][0] == records(config, "chosen")[0]["chosen"][1]
    assert "could not be labelled and is in quarantine" in capsys.readouterr().err
    assert len(list((tmp_path / "run" / "oracle" / "quarantine").glob("*.json"))) == 1
    assert [event["frame"] for event in events(config, "failed")] == record["failed"]


def test_a_frame_that_was_replaced_before_a_kill_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that might be labelled now: the budget is spent on the one that stands in for it."""
    fails = ("[oracle.ase.arguments]", "[oracle.ase.arguments]\nfails = [1]")
    config = recorder(tmp_path, monkeypatch, ("rounds = 2", "rounds = 1\naudits = 1"), fails)
    explore(config)
    folder, asked = tmp_path / "run", (tmp_path / "asked.jsonl").read_text()
    whole, spent = records(config, "labelled")[0], len(labels(config))
    (failure,) = (folder / "oracle" / "quarantine").glob("*.json")
    failure.write_text(json.dumps(json.loads(failure.read_text()) | {"class": "OracleCrashed"}))  # not one that would be repeated
    (folder / "exploration" / "labelled_000.json").unlink()
    config.write_text(config.read_text().replace('kind = "ase"', f'kind = "ase"\nmax_labels = {spent}'))
    explore(config)
    assert (tmp_path / "asked.jsonl").read_text() == asked
    again = records(config, "labelled")[0]
    assert [again[name] for name in ("labels", "is_chosen", "is_audit", "failed")] == [
        whole[name] for name in ("labels", "is_chosen", "is_audit", "failed")
    ]


def test_it_ends_when_fresh_dynamics_is_as_certain_as_what_is_known(tmp_path: Path) -> None:
    known_pool(tmp_path / "known.extxyz")
    config = write_exploration(
        tmp_path,
        ("approach = 0", f"approach = 50\n{KNOWN}"),
    )  # fmt: skip
    explore(config)
    assert reason(config).startswith("converged: the disagreement on fresh dynamics is")
    assert labels(config) == [], "what is known is no label of the run"
    first = records(config, "screened")[0]
    assert first["generation"] == 1, "known frames give a spread before the first dynamics"
    assert first["fresh"] <= 50 * first["known"]


def test_labels_of_another_composition_are_known_first_and_learnt_together(tmp_path: Path) -> None:
    known_pool(tmp_path / "known.extxyz")
    config = write_exploration(
        tmp_path,
        ("approach = 0", f"approach = 0\n{KNOWN}"),
        ("rounds = 2", "rounds = 1"), ("duplicates", "max_disagreement = \"100 eV/A\"\nduplicates"),
    )  # fmt: skip
    explore(config)
    chosen = records(config, "chosen")[0]
    assert len(chosen["chosen"]) == 3
    assert chosen["selected"] > 0, "chosen by disagreement from the first round on"
    state = json.loads((tmp_path / "run" / "generations" / "000002" / "state.json").read_text())
    assert len(state["label_ids"]) == 12 + 3
    errors = records(config, "labelled")[0]["energy_error"]
    assert max(map(abs, errors)) < 50, "thousands of eV apart before the constants are taken off"


def test_it_ends_when_the_promise_holds_on_audits(tmp_path: Path) -> None:
    config = write_exploration(
        tmp_path,
        ("rounds = 2", "rounds = 5\naudits = 8"), ('energy = "400 meV"', 'energy = "500 eV"\nconfidence = 0.55'),
        ("steps_per_update = 60", "steps_per_update = 10"),
    )  # fmt: skip
    explore(config)
    assert reason(config).startswith("the promise holds: by 8 audits at most 0.37 of all frames")
    audited = records(config, "labelled")[1]
    assert audited["beyond"] == {"energy": 0}
    assert len(records(config, "labelled")) == 2, "audits of members without a spread prove nothing"
    last = json.loads((tmp_path / "run" / "generations" / "000002" / "state.json").read_text())
    assert len(last["label_ids"]) == len(labels(config)), "audits are learnt too"


def test_the_budget_of_labels_ends_it(tmp_path: Path) -> None:
    config = write_exploration(tmp_path, ('kind = "toy"', 'kind = "toy"\nmax_labels = 5'), ("rounds = 2", "rounds = 9"))
    explore(config)
    assert reason(config) == "the budget of 5 labels is spent"
    assert len(labels(config)) == 5


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('structure = "start.xyz"\ntemperatures = [300]\nsteps = 40\n', "", "neither is given"),
        ('structure = "start.xyz"\n', "", "temperatures belongs to dynamics from `structure`"),
        ("[ipi]\n", '[ipi]\ninput = "input.xml"\n', "both are given"),
        ('structure = "start.xyz"', 'structure = "absent.xyz"', "absent.xyz"),
        ("temperatures = [300]\n", "", "temperatures is missing"),
        ("temperatures = [300]", "temperatures = [300, 300]", "twice"),
        ("temperatures = [300]", 'temperatures = ["300 C"]', "unknown unit"),
        ("steps = 40", 'steps = 40\ntimestep = "0.5"', "unit is missing"),
        ("steps = 40", "steps = 40\nsame_level = true", "same_level belongs to labelled frames"),
        ("rounds = 2", 'rank = "forces"', "rank"),
        ("rounds = 2", "baseline = 1", "but audits = 0"),
        ("start = 3", "start = 30", "a round has 11 frames"),
        ("stride = 4", "stride = 400", "no frame but the first would be pooled"),
        ("[explore]", '[trainer]\nexecutor = "parsl"\n[explore]', "[trainer] executor has no meaning"),
        ("[explore]", "[trainer]\nthreads = 2\n[explore]", "[trainer] threads has no meaning"),
        ("[explore]", "[output]\nstride = 2\n[explore]", "[output] stride has no meaning"),
        ("charge = 1", 'charge = 1\nstructure = "start.xyz"', "[system] structure has no meaning"),
        ('"start.xyz"', '"two.xyz"', "has 2 structures, expected one"),
        ('"start.xyz"', '"cell.extxyz"', "periodic = false, but in"),
        ("rounds = 2", "round = 2", "did you mean 'rounds'"),
        ("[explore]", "[audit]\nexpected = 3\n[explore]", "use [explore] audits"),
        ("periodic = false", "periodic = true", "periodic = true, but in"),
        ("rounds = 2", 'known = "known.extxyz"', "energy_key is missing and is not guessed"),
        ("rounds = 2", 'known = "known.extxyz"\nenergy_key = "REF_energy"\nforces_key = "f"', "there are: REF_forces"),
        ("rounds = 2", 'known = "foreign.extxyz"\nenergy_key = "REF_energy"\nforces_key = "REF_forces"', "same_level = true"),
        (
            "rounds = 2",
            'known = "other.extxyz"\nenergy_key = "REF_energy"\nforces_key = "REF_forces"',
            "labelled with other settings",
        ),
        ('energy = "400 meV"', 'energy = "400 meV"\ngroups = { far = { atoms = [7], forces = "1 eV/A" } }', "names atom 7"),
    ],
)
def test_a_mistake_is_named_before_any_work(tmp_path: Path, old: str, new: str, says: str) -> None:
    known_pool(tmp_path / "known.extxyz")
    known_pool(tmp_path / "foreign.extxyz", said=None)
    known_pool(tmp_path / "other.extxyz", said="0123")
    water = ase.Atoms("OH2", positions=START)
    ase.io.write(tmp_path / "two.xyz", [water, water])
    ase.io.write(tmp_path / "cell.extxyz", ase.Atoms("OH2", positions=START, cell=[9, 9, 9], pbc=True))
    config = write_exploration(tmp_path, (old, new))
    for verb in (check, explore):
        with pytest.raises(ConfigError) as refusal:
            verb(config)
        assert says in str(refusal.value)
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_a_charge_that_the_structure_contradicts_is_named(tmp_path: Path) -> None:
    config = write_exploration(tmp_path, ('"start.xyz"', '"start.extxyz"'))
    atoms = ase.Atoms("OH2", positions=START)
    atoms.info["charge"] = 0
    ase.io.write(tmp_path / "start.extxyz", atoms)
    with pytest.raises(ConfigError, match=r"says charge = 0, but \[system\] charge is 1"):
        check(config)


def test_the_charge_of_the_structure_reaches_the_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recorder(
        tmp_path, monkeypatch, ("charge = 1\n", ""), ('"start.xyz"', '"start.extxyz"'), ("rounds = 2", "rounds = 1")
    )
    atoms = ase.Atoms("OH2", positions=START)
    atoms.info |= {"charge": -1, "multiplicity": 3}
    ase.io.write(tmp_path / "start.extxyz", atoms)
    explore(config)
    told = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert {(x["charge"], x["multiplicity"]) for x in told} == {(-1, 3)}
    atoms.info["charge"] = 1.7
    ase.io.write(tmp_path / "start.extxyz", atoms)
    with pytest.raises(ConfigError, match=r"charge = 1\.7, expected an integer"):
        check(config)


def test_elements_of_what_is_known_that_the_model_does_not_know_are_named(tmp_path: Path) -> None:
    config = write_exploration(
        tmp_path,
        ('model = "toy"', 'model = "embedded"'), ("stride = 4", "stride = 4\nsame_level = true"),
        ("rounds = 2", KNOWN),
    )  # fmt: skip
    iodine = ase.Atoms("HI", positions=[[0, 0, 0], [1.6, 0, 0]])
    iodine.info |= {"REF_energy": -1050.0, "charge": 1}
    iodine.arrays["REF_forces"] = np.zeros((2, 3))
    ase.io.write(tmp_path / "known.extxyz", iodine, format="extxyz")
    with pytest.raises(BnnError, match=r"frame 0 .*element I, which .*embedded"):
        check(config)


def test_elements_that_the_model_does_not_know_are_named(tmp_path: Path) -> None:
    config = write_exploration(tmp_path, ('model = "toy"', 'model = "embedded"'))
    ase.io.write(tmp_path / "start.xyz", ase.Atoms("OI", positions=[[0, 0, 0], [1.9, 0, 0]]))
    with pytest.raises(BnnError, match=r"also has \[53\]"):
        check(config)


def test_walkers_move_at_the_same_time_by_one_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_exploration(
        tmp_path,
        ("[300]", "[300, 400]"), ("steps = 40", "steps = 20\nbeads = 3"), ("rounds = 2", "rounds = 1"),
        ("steps_per_update = 60", "steps_per_update = 5"),
    )  # fmt: skip
    sizes, predict = list[int](), Chains.predict

    def noted(self: Chains, asked: Frames) -> Prediction:
        if not sizes:  # twenty steps are over sooner than another i-PI has started
            logs = [tmp_path / "run" / "log" / f"ipi_000_{name}.log" for name in ("300K", "400K")]
            while not all(log.exists() and "Handshaking was successful" in log.read_text() for log in logs):
                time.sleep(0.05)
        sizes.append(len(asked))
        return predict(self, asked)

    monkeypatch.setattr(Chains, "predict", noted)
    monkeypatch.setattr(together, "WINDOW", 5.0)  # a machine that is busy may need it
    explore(config)
    assert sizes.count(6) > 10, "a ring each, most of the time"


def test_walkers_with_one_address_are_refused(tmp_path: Path) -> None:
    config = with_own_inputs(tmp_path, 12, "stride = 4\nstart = 2\nbatch = 2\nrounds = 1\n")
    address = re.compile("<address>.*</address>")
    (same,) = address.findall((tmp_path / "w0.xml").read_text())
    (tmp_path / "w1.xml").write_text(address.sub(same, (tmp_path / "w1.xml").read_text()))
    for verb in (check, explore):
        with pytest.raises(ConfigError, match="walkers 'cold' and 'hot' both listen on"):
            verb(config)
    assert not (tmp_path / "run").exists()


def test_a_request_to_stop_while_ipi_starts_is_not_waited_out(tmp_path: Path) -> None:
    config = write_exploration(tmp_path, ("[300]", "[300, 400]"), ("rounds = 2", "rounds = 1"))
    process = subprocess.Popen(command("explore", config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    started = [tmp_path / "run" / "exploration" / "round_000" / name / "ipi.pid" for name in ("300K", "400K")]
    while not all(file.exists() for file in started):
        assert process.poll() is None
        time.sleep(0.01)
    begin = time.monotonic()
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert time.monotonic() - begin < STOP_SECONDS - 5, "i-PI was told to end, and not only left alone"
    assert not any(file.exists() for file in started), "i-PI has ended"


@pytest.mark.slow
def test_a_request_to_stop_ends_ipi_too_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config = write_exploration(
        tmp_path,
        ("[300]", "[300, 400]"),
        ("steps = 40", "steps = 800"),
        ("stride = 4", "stride = 50"),
        ("rounds = 2", "rounds = 1"),
    )
    process = subprocess.Popen(command("explore", config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    walkers = ("300K", "400K")
    kept = [tmp_path / "run" / "exploration" / "round_000" / f"{name}.extxyz" for name in walkers]
    while not all(file.exists() and file.stat().st_size > 600 for file in kept):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 75, process.stderr.read() if process.stderr else ""
    if process.stderr:
        process.stderr.close()
    assert "stopped on request" in reason(config)
    for name, file in zip(walkers, kept, strict=True):
        folder = file.parent / name
        assert (folder / "RESTART").exists()
        assert not (folder / "ipi.pid").exists(), "i-PI has ended"
        assert 2 <= len(frames(config, 0, name)) < 17, "both were on their way"
    config.write_text(config.read_text().replace("rounds = 1", 'rounds = 1\nmax_disagreement = "1 meV/A"'))
    explore(config)
    for name in walkers:
        assert [a.info["step"] for a in frames(config, 0, name)] == list(range(0, 801, 50)), "it went on where it was"
    stopped = [event for event in events(config, "dynamics") if event["round"] == 1]
    assert "above the limit of 0.001 eV/Å" in stopped[0]["stopped"]
    assert len(frames(config, 1)) == 1, "the frame on which the members disagree too much is kept"
