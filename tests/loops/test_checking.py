"""`check` finds what would stop a run, says what a run would do and cost, and changes nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_run import command, program, write_run

from bnn_driver.ipi.transport import Endpoint, listen
from bnn_driver.oracle import read_done
from bnn_driver.store.dataset import LabelStore

#: an oracle whose forces, or stress, are those of another energy
WRONG = """
from dataclasses import dataclass, replace
from typing import Literal
from bnn_driver.oracle import make_label
from oracles.toy import Toy

@dataclass(frozen=True)
class Wrong(Toy):
    fault: Literal["forces", "stress", "none"] = "none"

    def physics(self):
        return super().physics() | {"fault": self.fault}

    def __call__(self, frame):
        right = super().__call__(frame)
        forces = 1.05 * right.forces if self.fault == "forces" else right.forces
        stress = -right.stress if self.fault == "stress" else right.stress
        return make_label(self, frame, right.energy, forces, stress, evidence="analytic")
"""


def listing(folder: Path) -> set[tuple[str, int]]:
    return {(str(p), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def value(said: str, name: str) -> str:
    """The text of a finding."""
    found = re.search(rf"^{name} +(.*)$", said, re.MULTILINE)
    assert found, said
    return found[1]


def checked(config: Path, *options: str, code: int = 0) -> str:
    done = program("check", *options, config)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def replaced(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_fresh_run_is_described_and_nothing_is_written(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=40, beads=4)
    before = listing(tmp_path)
    said = checked(config)
    assert listing(tmp_path) == before
    assert value(said, "accuracy").startswith("0.4 eV = 9.224 kcal/mol of the total energy, with 95 %")
    assert value(said, "socket").endswith("free")
    assert "<batch_size>4</batch_size>" in value(said, "note")
    assert "4 beads, 40 steps, checkpoint every 5" in value(said, "i-PI")
    assert "1 workers of 1 threads" in value(said, "executor")
    assert "not known" in value(said, "per label")
    assert value(said, "time").startswith("40 steps alone")
    assert "would begin at step 0 of 40" in value(said, "run")


def test_a_label_is_tried_tested_and_kept_for_the_run(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=2, delay="0.3 s")
    said = checked(config, "--label")
    assert "labelling the start structure" in said
    assert float(value(said, "label").split(" s (")[0].split()[-1]) >= 0.3
    assert said.count("energies against forces") == 2
    model, oracle = (float(re.search(pattern, said)[1]) for pattern in (r"energy (-?[\d.]+) eV", r"label +(-?[\d.]+) eV"))  # type: ignore[index]
    assert float(value(said, "offset").split()[0]) == pytest.approx(model - oracle, abs=2e-4)
    assert "updating the chains" in value(said, "per label")
    done = tmp_path / "run" / "oracle" / "spool" / "done"
    assert len(list(done.glob("*.json"))) == 5
    before = {p: p.stat().st_mtime_ns for p in done.glob("*.json")}
    assert checked(config, "--label").count("energies against forces") == 2
    assert {p: p.stat().st_mtime_ns for p in done.glob("*.json")} == before, "computed once"


@pytest.mark.ipi
def test_the_first_frame_of_the_run_takes_that_label(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=2)
    checked(config, "--label")
    spool = tmp_path / "run" / "oracle" / "spool"
    before = {p.stem: p.stat().st_mtime_ns for p in (spool / "done").glob("*.json")}
    assert program("run", config).returncode == 0
    first = LabelStore(tmp_path / "run" / "labels").read(0).label
    assert first.frame_id in before
    assert (spool / "done" / f"{first.frame_id}.json").stat().st_mtime_ns == before[first.frame_id]
    kept = read_done(spool, first.frame_id)
    assert kept is not None
    assert kept.energy == first.energy


@pytest.mark.ipi
def test_a_run_that_was_begun_would_resume_or_is_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=6)
    assert program("run", config).returncode == 0
    labels = len(LabelStore(tmp_path / "run" / "labels").all())
    assert "finished, with" in value(checked(config), "run")
    replaced(tmp_path / "input.xml", "6</total_steps>", "9</total_steps>")
    said = checked(config)
    assert f"would resume at step 6 of 9 with {labels} labels and generation" in value(said, "run")
    assert value(said, "time").startswith("3 steps alone")
    assert "at the pace so far" in value(said, "time")
    assert "not known" not in value(said, "per label")
    replaced(config, "[oracle.toy]", '[oracle.toy]\ndepth = "2 eV"')
    by_check, by_run = checked(config, code=2), program("run", config)
    assert by_run.returncode == 2
    assert "other physics" in by_run.stderr
    assert by_run.stderr.strip() in by_check


@pytest.mark.ipi
def test_a_driver_at_work_is_told_and_left_alone(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=4000, delay="0.2 s")
    process = subprocess.Popen(
        command("run", config), stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        done = tmp_path / "run" / "oracle" / "spool" / "done"
        end = time.monotonic() + 60
        while not list(done.glob("*.json")) and time.monotonic() < end:
            time.sleep(0.05)
        said = checked(config, "--label")
        assert f"a driver works here, pid {process.pid}" in value(said, "run")
        assert "`run` would be refused" in value(said, "socket")
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed oracle of a third party."""
    package = tmp_path / "site"
    information = package / "wrong-1.dist-info"
    information.mkdir(parents=True)
    (package / "wrong_oracle.py").write_text(WRONG)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[bnn_driver.oracles]\nwrong = wrong_oracle:Wrong\n")
    monkeypatch.setenv("PYTHONPATH", f"{package}:{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.usefixtures("wrong")
@pytest.mark.parametrize(("fault", "code"), [("none", 0), ("forces", 4), ("stress", 4)])
def test_labels_that_contradict_themselves_are_refused(tmp_path: Path, fault: str, code: int) -> None:
    config = write_run(tmp_path)
    replaced(config, "periodic = false", "periodic = true")
    replaced(tmp_path / "init.xyz", "20.0 20.0 20.0", "2.4 2.4 2.4")
    replaced(config, 'kind = "toy"', 'kind = "wrong"')
    replaced(config, '[oracle.toy]\ndelay = "0 s"', f'[oracle.wrong]\nfault = "{fault}"')
    replaced(config, "[trainer]", '[sanity]\nmax_force = "1e4 eV/A"\n[trainer]')
    said = checked(config, "--label", code=code)
    if fault == "none":
        assert "energies against stress along a random strain" in said
        assert "everything is in order" in said
    else:
        assert f"energies and {fault} do not belong together" in said
        assert "everything is in order" not in said


def test_an_oracle_that_fails_is_told_in_its_own_words(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    replaced(config, 'kind = "toy"', 'kind = "tblite"')
    replaced(config, '[oracle.toy]\ndelay = "0 s"', "[oracle.tblite]\nmax_iterations = 2")
    assert "converge" in checked(config, "--label", code=4)


def test_sockets_that_are_stale_or_taken_are_told(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    name = (tmp_path / "input.xml").read_text().split("<address>")[1].split("<")[0]
    server, endpoint = listen(Endpoint("unix", name))
    try:
        assert "somebody listens" in value(checked(config), "socket")
    finally:
        server.close()
    assert "a socket file that nobody listens on" in value(checked(config), "socket")
    assert Path(endpoint.path).exists()
    Path(endpoint.path).unlink()
    Path(endpoint.path).write_text("")
    try:
        assert "no socket" in checked(config, code=3)
    finally:
        Path(endpoint.path).unlink()


def test_findings_of_the_ipi_input_are_listed(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    replaced(tmp_path / "input.xml", "<checkpoint stride='5'/>", "")
    assert "no <checkpoint>" in value(checked(config), "note")
