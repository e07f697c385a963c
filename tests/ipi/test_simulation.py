"""i-PI as a process, and what its input says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from harness import NVE, NVT, XYZ, Serving, Setup, client_of, columns, running
from toys import Harmonic

from bnn_driver.errors import ConfigError, EnvironmentProblem, IpiGone
from bnn_driver.ipi.simulation import IpiProcess, _restart_number, read_input
from bnn_driver.ipi.transport import Endpoint, listen
from bnn_driver.units import BOHR

TEMPLATES = sorted((Path(__file__).parents[2] / "ipi_inputs").glob("*.xml"))
CHECKPOINT = "<checkpoint stride='10' filename='chk'/>"
# i-PI writes over the only checkpoint it has: killed meanwhile, none is left; two of them are never torn together
CHECKPOINTS = {
    "two": CHECKPOINT + CHECKPOINT.replace("chk", "second"),
    "numbered": CHECKPOINT.replace("/>", " overwrite='False'/>"),
}


def test_input_tells_endpoint_beads_atoms_and_steps(tmp_path: Path):
    path = Setup("unix", batch=4, beads=8, steps=17, output=Setup.output + CHECKPOINT).write(tmp_path)
    text = path.read_text().replace("<simulation ", "<simulation sockets_prefix='/run/ipi_' ", 1)
    path.write_text(text)
    got = read_input(path)
    assert [(end.kind, end.path[:10]) for end in got.endpoints] == [("unix", "/run/ipi_t")]
    assert (got.batch_size, got.n_beads, got.total_steps, got.step, got.n_systems) == (4, 8, 17, 0, 1)
    assert got.numbers.tolist() == [8, 1, 1, 6]
    # i-PI's rounded Å: 3e-8
    assert got.positions == pytest.approx(np.loadtxt(XYZ.splitlines()[2:], usecols=(1, 2, 3)), rel=1e-7)
    assert got.cell == pytest.approx(12.0 * np.eye(3), rel=1e-7)
    assert (got.checkpoint_stride, got.checkpoint_files) == (10, ("sim.chk",))
    assert not got.shared_memory
    assert not got.exit_on_disconnect
    assert got.consolidated
    assert got.timeout == 0.0


def test_socket_without_a_mode_is_inet_as_in_ipi(tmp_path: Path):
    path = Setup("inet", port=31999).write(tmp_path)
    path.write_text(path.read_text().replace("mode='inet'", ""))
    assert read_input(path).endpoints == (Endpoint("inet", "localhost", 31999),)


def test_triclinic_cell_has_vectors_in_rows():
    cell = read_input(next(path for path in TEMPLATES if path.stem == "npt_flexible")).cell
    assert cell == pytest.approx(np.array([[10.6, 0, 0], [1.2, 10.4, 0], [-0.8, 0.9, 10.9]]), abs=1e-5)  # printed digits


INLINE = """<positions mode='manual'> [0.1, 0.2, 0.3, 0.9, 0.1, -0.2] </positions>
      <masses mode='manual' units='dalton'> [16, 2] </masses> <labels mode='manual'> [O, {}] </labels>
      <cell mode='abc' units='angstrom'> [9, 8, 7] </cell>"""


def test_positions_written_in_the_input_itself(tmp_path: Path):
    path = Setup().write(tmp_path)
    path.write_text(path.read_text().replace("<file mode='xyz'> init.xyz </file>", INLINE.format("D")))
    got = read_input(path)
    assert got.numbers.tolist() == [8, 1]
    # bohr, always: i-PI reads no units there
    assert got.positions == pytest.approx(BOHR * np.array([[0.1, 0.2, 0.3], [0.9, 0.1, -0.2]]), rel=1e-12)
    assert np.diag(got.cell) == pytest.approx([9, 8, 7], rel=1e-7)


def test_committee_around_the_socket_is_seen(tmp_path: Path):
    path = Setup().write(tmp_path)
    text = path.read_text()
    start, stop = text.index("<ffsocket"), text.index("</ffsocket>") + len("</ffsocket>")
    inner = text[start:stop].replace("name='ff0'", "name='inner'")
    path.write_text(text[:start] + f"<ffcommittee name='ff0'>{inner}<parse_json> True </parse_json></ffcommittee>" + text[stop:])
    assert len(read_input(path).endpoints) == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<file mode='xyz'> init.xyz", "<file mode='xyz'> nowhere.xyz", "nowhere.xyz.*not there.*relative"),
        ("<ffsocket", "<ffnothing", "i-PI cannot read"),
        ("</simulation>", "", "i-PI cannot read"),
        ("<total_steps> 5 ", "<total_steps> five ", "i-PI cannot read"),
    ],
)
def test_broken_input_is_a_config_error_with_the_file(tmp_path: Path, old: str, new: str, words: str):
    path = Setup().write(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=f"(?s)user.xml.*{words}|{words}"):
        read_input(path)


def test_input_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no\.xml is not there"):
        read_input(tmp_path / "no.xml")


def test_input_without_a_socket_says_what_to_add(tmp_path: Path):
    path = Setup(forcefield="<fflj name='ff0' pbc='false'><parameters>{eps: 0.1, sigma: 1}</parameters></fflj>").write(tmp_path)
    with pytest.raises(ConfigError, match="has no <ffsocket>: add one"):
        read_input(path)


def test_systems_of_different_atoms_are_refused(tmp_path: Path):
    path = Setup().write(tmp_path)
    (tmp_path / "other.xyz").write_text(XYZ.replace("C  0.20", "N  0.20"))
    text = path.read_text()
    start, stop = text.index("<system>"), text.index("</system>") + len("</system>")
    path.write_text(text[:stop] + text[start:stop].replace("init.xyz", "other.xyz") + text[stop:])
    with pytest.raises(ConfigError, match="different atoms"):
        read_input(path)
    (tmp_path / "other.xyz").write_text(XYZ)
    assert read_input(path).n_systems == 2


def test_labels_that_are_no_elements_are_named(tmp_path: Path):
    path = Setup().write(tmp_path)
    path.write_text(path.read_text().replace("<file mode='xyz'> init.xyz </file>", INLINE.format("Qq")))
    with pytest.raises(ConfigError, match="labelled Qq"):
        read_input(path)


def test_shared_memory_and_other_modes_do_not_mix(tmp_path: Path):
    path = Setup("shm", sockets=2).write(tmp_path)
    assert read_input(path).shared_memory
    path.write_text(path.read_text().replace("mode='shm'", "mode='unix'", 1))
    with pytest.raises(ConfigError, match="mixes"):
        read_input(path)


def test_reading_leaves_ipis_verbosity_as_it_was(tmp_path: Path):
    from ipi.utils.messages import verbosity

    verbosity.level = "high"
    read_input(Setup().write(tmp_path))
    assert verbosity.level == 3
    verbosity.level = "low"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # i-PI leaves the structure file open
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_template_is_read_by_ipi_and_by_us(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from ipi.engine.simulation import Simulation

    got = read_input(path)
    assert got.checkpoint_stride is not None
    assert got.batch_size in (1, got.n_beads)
    monkeypatch.chdir(path.parent)  # its structure is named relative to it
    with path.open() as stream:
        simulation = Simulation.load_from_xml(stream, read_only=True, custom_verbosity="quiet")
    assert simulation.tsteps == got.total_steps
    assert simulation.syslist[0].beads.nbeads == got.n_beads


# from here on a real i-PI runs


def half_run(tmp_path: Path, setup: Setup) -> IpiProcess:
    """An i-PI that was killed (no RESTART) well after its first checkpoint."""
    with running(setup, tmp_path) as (process, effective):
        serving = Serving(client_of(effective, Harmonic()))
        while effective.step < 40:
            time.sleep(0.05)
            rows = (tmp_path / "run" / "sim.out").read_text().splitlines()
            effective = replace(effective, step=len(rows))
        assert process._process is not None
        os.kill(process._process.pid, signal.SIGKILL)
        assert isinstance(serving.join(), IpiGone)
    return process


@pytest.mark.ipi
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_killed_run_goes_on_from_its_furthest_checkpoint(tmp_path: Path, kind: str):
    setup = Setup(steps=100_000, output=Setup.output + CHECKPOINTS[kind])
    process = half_run(tmp_path, setup)
    (process.folder / "RESTART").write_text("<simulation><step> 99999")  # torn: passed over
    furthest = process._furthest_restart()
    assert furthest is not None
    assert furthest.name != "RESTART"
    (process.folder / "sim.out").rename(process.folder / "before.out")
    effective = process.start()
    assert effective.step >= 10
    assert effective.step % 10 == 0
    try:
        process.wait_until_listening(effective, 20.0)
        serving = Serving(client_of(effective, Harmonic()))
        while len((process.folder / "sim.out").read_text().splitlines()) < 10 if (process.folder / "sim.out").exists() else True:
            time.sleep(0.05)
        assert process.stop(10.0, 5.0)
        assert serving.join() == "exit"
    finally:
        process.stop(0.0, 3.0)
    with running(replace(setup, steps=effective.step + 5, output=Setup.output), tmp_path / "whole") as (whole, plain):
        assert client_of(plain, Harmonic()).serve() == "exit"
        assert whole.wait(30.0)
    # the same trajectory as without the kill, from the step after the checkpoint on
    assert columns(tmp_path)[:5] == pytest.approx(columns(tmp_path / "whole")[-5:], rel=1e-9)


@pytest.mark.ipi
def test_stopped_run_goes_on_and_more_steps_can_be_added(tmp_path: Path):
    setup = Setup(steps=8)
    with running(setup, tmp_path) as (process, effective):
        assert client_of(effective, Harmonic()).serve() == "exit"
        assert process.wait(30.0)
        assert process.finished()
    with pytest.raises(ConfigError, match="has done all 8 steps; raise <total_steps>"):
        process.start()
    process.xml.write_text(process.xml.read_text().replace("<total_steps> 8 ", "<total_steps> 12 "))
    assert not process.finished()
    effective = process.start()
    assert (effective.step, effective.total_steps) == (8, 12)
    process.wait_until_listening(effective, 20.0)
    assert client_of(effective, Harmonic()).serve() == "exit"
    assert process.wait(30.0)
    assert process.finished()
    with running(replace(setup, steps=12), tmp_path / "whole") as (whole, effective):
        assert client_of(effective, Harmonic()).serve() == "exit"
        assert whole.wait(30.0)
    # floatformat carries 17 digits through RESTART
    assert columns(tmp_path)[-1] == pytest.approx(columns(tmp_path / "whole")[-1], rel=1e-12)


PARENT = textwrap.dedent("""
    import sys
    sys.path.insert(0, {here!r})
    from pathlib import Path
    from harness import client_of
    from toys import Harmonic
    from bnn_driver.ipi.simulation import IpiProcess
    folder = Path({folder!r})
    process = IpiProcess(folder / "user.xml", folder / "run", folder / "ipi.log")
    effective = process.start()
    process.wait_until_listening(effective, 20.0)
    print(process._process.pid, flush=True)
    client_of(effective, Harmonic()).serve()
""")


@pytest.mark.ipi
def test_ipi_ends_with_a_restart_when_the_driver_is_killed(tmp_path: Path):
    Setup(steps=100_000).write(tmp_path)
    script = PARENT.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert "i-pi" in " ".join(child.cmdline())
        wait_for_steps(tmp_path)
        parent.kill()
    gone, _ = psutil.wait_procs([child], timeout=20.0)
    assert gone or child.status() == psutil.STATUS_ZOMBIE
    assert (tmp_path / "run" / "RESTART").exists()


@pytest.mark.ipi
def test_ipi_told_to_end_again_and_again_leaves_a_restart(tmp_path: Path):
    """By the kernel for each thread of a killed driver, by a scheduler, by the next driver; alone, i-PI obeys the second at once."""
    with running(Setup(steps=100_000), tmp_path) as (process, effective):
        serving = Serving(client_of(effective, Harmonic()))
        wait_for_steps(tmp_path)
        end, told = time.monotonic() + 20.0, 0
        while process.is_running and time.monotonic() < end:
            assert process._process is not None
            process._process.terminate()
            told += 1
            time.sleep(0.02)
        assert process.wait(0.0)
        assert serving.join() is not None
    assert told > 1
    assert 3 <= (_restart_number(process.folder / "RESTART", "step") or 0) < 100_000


@pytest.mark.ipi
def test_ipi_told_to_end_while_it_starts_ends(tmp_path: Path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in what a shell starts with &, and all that this starts
    try:
        process = IpiProcess(Setup().write(tmp_path), tmp_path / "run", tmp_path / "log")
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert process._process is not None
        process._process.terminate()
        assert process.wait(10.0)
    finally:
        process.stop(0.0, 3.0)


def wait_for_steps(folder: Path) -> None:
    """Until three steps are written: an i-PI in its first step has no RESTART to write."""
    end = time.monotonic() + 30
    while len(rows(folder / "run" / "sim.out")) < 3:
        assert time.monotonic() < end, (folder / "ipi.log").read_text()
        time.sleep(0.05)


def rows(output: Path) -> list[str]:
    """Steps that are written; the head of the file comes before the first one."""
    return [line for line in output.read_text().splitlines() if not line.startswith("#")] if output.exists() else []


@pytest.mark.ipi
def test_ipi_left_by_an_earlier_driver_is_ended_and_its_socket_taken_over(tmp_path: Path):
    with running(Setup(steps=50), tmp_path) as (first, _):
        second = IpiProcess(first.xml, first.folder, first.log_file)
        try:
            effective = second.start()
            assert first.wait(30.0)
            second.wait_until_listening(effective, 20.0)
            assert client_of(effective, Harmonic()).serve() == "exit"
            assert second.wait(30.0)
            assert second.finished()
        finally:
            second.stop(0.0, 3.0)


OFTEN = Setup().output + "<checkpoint stride='4'/>"


@pytest.mark.ipi
def test_the_last_whole_checkpoint_is_kept_while_ipi_writes_the_next(tmp_path: Path):
    with running(Setup(steps=12, output=OFTEN), tmp_path) as (process, effective):
        assert client_of(effective, Harmonic()).serve() == "exit"
        assert process.wait(30.0)
        (written,) = (file for pattern in effective.checkpoint_files for file in process.folder.glob(pattern))
        process.keep_checkpoint()
        whole = written.read_bytes()
        (process.folder / "RESTART").unlink()
        for torn in (b"", whole[: len(whole) // 2]):  # i-PI opens the file before it makes its text
            written.write_bytes(torn)
            process.keep_checkpoint()
            assert (process.folder / "kept.checkpoint").read_bytes() == whole
            assert process.reached() == 12


@pytest.mark.ipi
def test_what_a_start_began_with_is_the_last_resort(tmp_path: Path):
    with running(Setup(steps=8, output=OFTEN), tmp_path) as (process, effective):
        assert client_of(effective, Harmonic()).serve() == "exit"
        assert process.wait(30.0)
    Setup(steps=16, output=OFTEN).write(tmp_path)
    process.start()
    process.stop(0.0, 3.0)
    for file in (process.folder / "RESTART", *process.folder.glob("*check*"), *process.folder.glob("*restart")):
        file.unlink(missing_ok=True)
    assert process.reached() == 8


CHECKPOINTED = Setup(steps=12, dynamics=NVT, output=Setup().output + "<checkpoint stride='4' overwrite='False' filename='chk'/>")


@pytest.mark.ipi
def test_going_back_takes_another_way_from_an_earlier_checkpoint(tmp_path: Path):
    with running(CHECKPOINTED, tmp_path) as (process, effective):
        assert client_of(effective, Harmonic()).serve() == "exit"
        assert process.wait(30.0)
        first = columns(tmp_path)
        assert process.rewind(11, seed=5) == 8
        assert process.reached() == 8
        effective = process.start()
        assert effective.step == 8
        process.wait_until_listening(effective, 20.0)
        assert client_of(effective, Harmonic()).serve() == "exit"
        assert process.wait(30.0)
        assert process.finished()
    again = columns(tmp_path)[len(first) :]
    assert again[:, 0].tolist() == [9, 10, 11, 12]
    moved = np.abs(again[:, 2] - first[9:, 2])
    # the potential energy moves by 0.012 eV per step
    assert moved[0] < 0.002, "it begins where the checkpoint was"
    assert moved[-1] > moved[0] > 1e-9, "and takes another way"


@pytest.mark.ipi
def test_going_back_again_goes_further_and_at_last_to_the_start(tmp_path: Path):
    with running(CHECKPOINTED, tmp_path) as (process, effective):
        assert client_of(effective, Harmonic()).serve() == "exit"
        assert process.wait(30.0)
    assert [process.rewind(below, seed=5) for below in (8, 4, 0)] == [4, 0, None]
    assert process.reached() == 0, "what cannot be is not begun"
    assert process.start().step == 0
    process.stop(0.0, 3.0)


@pytest.mark.ipi
def test_without_checkpoints_nothing_that_was_done_is_given_up(tmp_path: Path):
    with running(Setup(steps=6), tmp_path) as (process, effective):
        assert client_of(effective, Harmonic()).serve() == "exit"
        assert process.wait(30.0)
    assert process.rewind(6, seed=5) is None
    assert process.reached() == 6


def test_the_copies_of_checkpoints_are_in_order_and_no_more_than_four(tmp_path: Path):
    process = IpiProcess(Setup(output=OFTEN).write(tmp_path), tmp_path / "run", tmp_path / "log")
    process.folder.mkdir()
    process._checkpoints = ("sim.chk",)
    for step in range(6):
        (process.folder / "sim.chk").write_text(f"<simulation><step> {step} </step></simulation>")
        os.utime(process.folder / "sim.chk", ns=(step, step))
        process.keep_checkpoint()
    found = {file.name: _restart_number(file, "step") for file in process.folder.glob("*.checkpoint")}
    assert found == {"kept.checkpoint": 5, "older_1.checkpoint": 4, "older_2.checkpoint": 3, "older_3.checkpoint": 2}


def test_recorded_pid_that_is_another_program_now_is_left_alone(tmp_path: Path):
    process = IpiProcess(tmp_path / "user.xml", tmp_path, tmp_path / "log")
    (tmp_path / "ipi.pid").write_text(f'{{"pid": {os.getpid()}}}')
    process._end_previous()  # this test is still alive
    assert not (tmp_path / "ipi.pid").exists()


@pytest.mark.ipi
def test_socket_of_another_live_process_is_not_taken(tmp_path: Path):
    path = Setup().write(tmp_path)
    server, endpoint = listen(read_input(path).endpoints[0])
    try:
        with pytest.raises(EnvironmentProblem, match="already listens"):
            IpiProcess(path, tmp_path / "run", tmp_path / "log").start()
    finally:
        server.close()
    process = IpiProcess(path, tmp_path / "run", tmp_path / "log")
    try:
        process.wait_until_listening(process.start(), 20.0)  # now it is only a stale file
    finally:
        process.stop(0.0, 3.0)
    assert Path(endpoint.path).parent == Path("/tmp")


@pytest.mark.ipi
def test_ipi_that_cannot_start_is_gone_with_the_end_of_its_log(tmp_path: Path):
    path = Setup(ensemble="<pressure units='bar'> 1 </pressure>", dynamics=NVE.replace("nve", "npt")).write(tmp_path)
    path.write_text(path.read_text().replace("forcefield='ff0'", "forcefield='nobody'"))
    process = IpiProcess(path, tmp_path / "run", tmp_path / "ipi.log")
    effective = process.start()
    with pytest.raises(IpiGone, match=r"(?s)ended before it listened.*Error"):
        process.wait_until_listening(effective, 20.0)


@pytest.mark.ipi
def test_wait_until_listening_is_true_for_inet(tmp_path: Path):
    with running(Setup("inet", port=29471), tmp_path) as (process, effective):
        assert client_of(effective, Harmonic()).serve() == "exit"
        assert process.wait(30.0)


@pytest.mark.ipi
def test_ipi_that_does_not_react_is_killed_in_time(tmp_path: Path):
    with running(Setup(), tmp_path) as (process, _):
        assert process._process is not None
        os.kill(process._process.pid, signal.SIGSTOP)
        start = time.monotonic()
        assert not process.stop(0.3, 0.3)
        assert time.monotonic() - start < 15.0
        assert not process.is_running
        assert not process.finished()


def test_named_files_are_found_from_the_working_folder(tmp_path: Path):
    path = Setup(dynamics=NVE, structure=XYZ).write(tmp_path / "user" / "inputs")
    (tmp_path / "user" / "shared.xyz").write_text(XYZ)
    (path.parent / "sub").mkdir()
    (path.parent / "sub" / "plumed.dat").write_text("# nothing")
    text = path.read_text().replace("<ffsocket", "<!-- sub/plumed.dat ../shared.xyz --><ffsocket")
    path.write_text(text)
    process = IpiProcess(path, tmp_path / "run", tmp_path / "log")
    process.folder.mkdir()
    target = process._prepare()
    assert target.parent == process.folder
    assert (process.folder / "init.xyz").read_text() == XYZ
    assert (process.folder / "sub" / "plumed.dat").exists()
    assert str((tmp_path / "user" / "shared.xyz").resolve()) in target.read_text()
    assert read_input(target).numbers.tolist() == [8, 1, 1, 6]
