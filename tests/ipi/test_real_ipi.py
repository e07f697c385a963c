"""The client against a real i-PI: all modes, and the faults that hang it when a driver is careless."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from harness import Serving, Setup, client_of, columns, running
from toys import Harmonic

from bnn_driver.errors import GuardStop, IpiGone
from bnn_driver.ipi.client import Reply, Request

pytestmark = [pytest.mark.ipi, pytest.mark.timeout(60)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Six beads through the plainest of all ways."""
    folder = tmp_path_factory.mktemp("reference")
    with running(Setup(beads=6), folder) as (process, effective):
        assert client_of(effective, Harmonic()).serve() == "exit"
        assert process.wait(30.0)
    return columns(folder)


@pytest.mark.parametrize(
    ("mode", "batch", "consolidate", "clients"),
    [
        ("unix", 1, False, 1),
        ("unix", 1, False, 3),
        ("unix", 1, True, 3),
        ("unix", 6, True, 1),
        ("unix", 4, True, 2),
        ("shm", 1, True, 1),
        ("shm", 4, True, 2),
        ("inet", 1, True, 2),
        ("inet", 6, True, 1),
    ],
)
def test_every_mode_gives_the_same_trajectory(
    tmp_path: Path, reference: np.ndarray, mode: str, batch: int, consolidate: bool, clients: int
):
    port = free_port() if mode == "inet" else 0
    handler = Harmonic()
    with running(Setup(mode, batch, beads=6, consolidate=consolidate, port=port), tmp_path) as (process, effective):
        assert client_of(effective, handler, clients).serve() == "exit"
        assert process.wait(30.0)
        assert process.finished()
    assert np.array_equal(columns(tmp_path), reference)  # bit for bit
    assert sum(handler.sizes) <= 6 * 5 + 6  # nothing is computed for padding; the six beads start equal
    if batch > 1:
        assert handler.parameters == {f"  batch_size:{batch}"}


def test_parameters_and_extras_pass_through(tmp_path: Path):
    handler = Harmonic(extras='{"bnn_sd": 0.25, "committee_pot": [1.0, 2.0]}')
    trajectory = "<trajectory filename='sd' stride='1' extra_type='bnn_sd'> extras </trajectory>"
    setup = Setup(steps=2, parameters="{template: init.xyz, extras: energy}", output=Setup.output + trajectory)
    with running(setup, tmp_path) as (process, effective):
        assert client_of(effective, handler).serve() == "exit"
        assert process.wait(30.0)
    assert handler.parameters == {" template : init.xyz , extras : energy , "}
    rows = [line for line in (tmp_path / "run" / "sim.sd_0").read_text().splitlines() if "#" not in line]
    assert [float(row) for row in rows] == [0.25, 0.25, 0.25]


def test_two_sockets_of_one_ipi_add_up(tmp_path: Path):
    with running(Setup(sockets=2), tmp_path / "two") as (process, effective):
        assert len(effective.endpoints) == 2
        assert client_of(effective, Harmonic(0.25)).serve() == "exit"
        assert process.wait(30.0)
    with running(Setup(), tmp_path / "one") as (process, effective):
        assert client_of(effective, Harmonic(0.5)).serve() == "exit"
        assert process.wait(30.0)
    assert columns(tmp_path / "two") == pytest.approx(columns(tmp_path / "one"), rel=1e-12)


DRIVER = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, {here!r})
    from pathlib import Path
    from harness import client_of
    from toys import Harmonic
    from bnn_driver.ipi.simulation import read_input
    toy = Harmonic()
    def handler(request):
        if len(toy.sizes) == 2:
            print("computing", flush=True)
            time.sleep(60)
        return toy(request)
    client_of(read_input(Path({path!r})), handler).serve()
""")


@pytest.mark.parametrize(
    ("mode", "batch", "consolidate"), [("unix", 1, True), ("unix", 1, False), ("unix", 4, True), ("shm", 4, True)]
)
def test_driver_killed_in_a_calculation_is_replaced(tmp_path: Path, mode: str, batch: int, consolidate: bool):
    with running(Setup(mode, batch, beads=4 if batch > 1 else 1, consolidate=consolidate), tmp_path) as (process, effective):
        script = DRIVER.format(here=str(Path(__file__).parent), path=str(effective.path))
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as first:
            assert first.stdout is not None
            assert first.stdout.readline() == "computing\n"
            first.kill()
        assert client_of(effective, Harmonic()).serve() == "exit"
        assert process.wait(30.0)
        assert process.finished()
    assert len(columns(tmp_path)) == 6


def test_slow_handler_is_waited_for(tmp_path: Path):
    toy = Harmonic()

    def slow(request: Request) -> Reply:
        time.sleep(2.5 if len(toy.sizes) == 1 else 0.0)  # longer than the 2 s that i-PI grants inside a message
        return toy(request)

    with running(Setup(batch=2, beads=2, steps=2), tmp_path) as (process, effective):
        assert client_of(effective, slow, reconnects=0).serve() == "exit"
        assert process.wait(30.0)
    assert len(columns(tmp_path)) == 3


def test_driver_dropped_by_timeout_returns_with_its_result(tmp_path: Path):
    toy = Harmonic()

    def slow(request: Request) -> Reply:
        time.sleep(2.0 if len(toy.sizes) == 2 else 0.0)
        return toy(request)

    with running(Setup(steps=3, socket_extra="<timeout> 0.5 </timeout>"), tmp_path) as (process, effective):
        assert effective.timeout == 0.5
        assert client_of(effective, slow).serve() == "exit"
        assert process.wait(30.0)
        assert process.finished()
    assert len(toy.sizes) == 4  # first frame and three steps: the slow one was computed once


def test_exit_file_between_calls_ends_both(tmp_path: Path):
    with running(Setup(steps=100_000), tmp_path) as (process, effective):
        serving = Serving(client_of(effective, Harmonic()))
        time.sleep(0.3)
        assert process.stop(20.0, 20.0)
        assert serving.join() == "exit"
        assert not process.finished()  # although i-PI reports success
        assert (process.folder / "RESTART").exists()
        assert not (process.folder / "EXIT").exists()


def test_closing_in_a_call_lets_ipi_end_with_a_restart(tmp_path: Path):
    toy = Harmonic()
    gate = threading.Event()

    def stuck(request: Request) -> Reply:
        if len(toy.sizes) == 3:
            gate.wait(20.0)
        return toy(request)

    with running(Setup(steps=50), tmp_path) as (process, effective):
        client = client_of(effective, stuck)
        serving = Serving(client)
        while len(toy.sizes) < 3:
            time.sleep(0.01)
        client.close()
        assert process.stop(20.0, 20.0)
        assert (process.folder / "RESTART").exists()
        gate.set()
        assert serving.join() == "closed"


def test_killed_ipi_is_noticed_at_once(tmp_path: Path):
    with running(Setup(steps=100_000), tmp_path) as (process, effective):
        serving = Serving(client_of(effective, Harmonic()))
        time.sleep(0.3)
        assert process._process is not None
        os.kill(process._process.pid, signal.SIGKILL)
        start = time.monotonic()
        outcome = serving.join()
        assert isinstance(outcome, IpiGone)
        assert time.monotonic() - start < 15.0  # it may listen again within 1 s
        assert Path(effective.endpoints[0].path).exists()  # i-PI's litter
        assert process.wait(30.0)
        assert not Path(effective.endpoints[0].path).exists()
        assert not process.finished()


def test_nan_is_refused_and_ipi_ends_cleanly(tmp_path: Path):
    toy = Harmonic()

    def poisoned(request: Request) -> Reply:
        reply = toy(request)
        if len(toy.sizes) == 4:
            reply.forces[0, 1, 2] = np.nan
        return reply

    with running(Setup(steps=50), tmp_path) as (process, effective):
        outcome = Serving(client_of(effective, poisoned)).join()
        assert isinstance(outcome, GuardStop)
        assert "structure 0, atom 1" in str(outcome)
        assert process.stop(20.0, 20.0)
        assert np.isfinite(columns(tmp_path)).all()
        assert not re.search(r"\bnan\b", (process.folder / "RESTART").read_text())


def test_keys_that_change_are_stopped_before_ipi_dies_of_them(tmp_path: Path):
    toy = Harmonic()

    def changing(request: Request) -> Reply:
        toy.extras = '{"toy": 1.0}' if len(toy.sizes) < 3 else '{"other": 1.0}'
        return toy(request)

    with running(Setup(beads=2, steps=50), tmp_path) as (process, effective):
        outcome = Serving(client_of(effective, changing)).join()
        assert "keys of the extras changed" in str(outcome)
        assert process.is_running
        assert process.stop(20.0, 20.0)
