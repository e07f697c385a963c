"""The server's side against real client codes, and codes that hang, die or answer nonsense."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from harness import Serving
from toys import Harmonic

from bnn_driver.errors import EnvironmentProblem, OracleCrashed, OracleInconsistent, OracleTimeout
from bnn_driver.ipi import wire
from bnn_driver.ipi.client import Client, Reply, Request
from bnn_driver.ipi.server import ForceServer, unique_endpoint
from bnn_driver.ipi.transport import Channel, Endpoint, connect
from bnn_driver.units import BOHR, HARTREE

RNG = np.random.default_rng(5)
CELL = np.array([[9.0, 0.0, 0.0], [1.0, 8.0, 0.0], [0.5, -0.5, 7.0]])


def server(endpoint: Endpoint, frame: float = 30.0, start: float = 30.0, alive: Callable[[], bool] = lambda: True) -> ForceServer:
    return ForceServer(endpoint, parameters=" ", connect_timeout=start, frame_timeout=frame, alive=alive)


def serving(endpoint: Endpoint, handler: Callable[[Request], Reply]) -> Serving:
    return Serving(
        Client([endpoint], handler, shared_memory=False, connect_timeout=20.0, reconnects=0, gather_seconds=0.0),
    )


@contextmanager
def scripted(endpoint: Endpoint, script: Callable[[Channel], None]) -> Iterator[None]:
    """A code that does what the script says."""

    def run() -> None:
        channel = connect(endpoint, 30.0)
        script(channel)
        channel.close()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(30.0)


def test_our_client_as_the_code(tmp_path: Path):
    toy = Harmonic(0.7)
    seen: list[Request] = []
    with server(unique_endpoint(f"{tmp_path}/")) as force_server:
        code = serving(force_server.endpoint, lambda request: (seen.append(request), toy(request))[1])
        for _ in range(3):
            x = RNG.normal(size=(5, 3))
            energy, forces, virial, extras = force_server.compute(x, CELL)
            assert energy == pytest.approx(0.35 * (x**2).sum(), rel=1e-12)
            assert forces == pytest.approx(-0.7 * x, rel=1e-12)
            assert virial == pytest.approx(-0.7 * np.einsum("ai,aj->ij", x, x), rel=1e-12, abs=1e-12)
            assert extras == toy.extras
            assert seen[-1].cell[0] == pytest.approx(CELL, rel=1e-12)
    assert code.join() == "exit"
    assert not Path(force_server.endpoint.path).exists()


@pytest.mark.ipi
@pytest.mark.parametrize("kind", ["unix", "inet"])
def test_ipis_own_driver_as_the_code(tmp_path: Path, kind: str):
    driver = Path(sysconfig.get_path("scripts")) / "i-pi-driver-py"
    k = 1.3  # hartree/bohr^2
    endpoint = unique_endpoint(f"{tmp_path}/") if kind == "unix" else Endpoint("inet", "localhost", 0)
    with server(endpoint, start=20.0) as force_server:
        end = force_server.endpoint
        where = ["-u", "-a", end.address, "-S", end.prefix] if kind == "unix" else ["-a", end.address, "-p", str(end.port)]
        with subprocess.Popen(
            [sys.executable, str(driver), *where, "-m", "harmonic", "-o", str(k)], stdout=subprocess.DEVNULL
        ) as code:
            force_server._alive = lambda: code.poll() is None
            for _ in range(2):
                x = RNG.normal(size=(4, 3))
                energy, forces, virial, extras = force_server.compute(x, CELL)
                assert energy == pytest.approx(0.5 * k * ((x / BOHR) ** 2).sum() * HARTREE, rel=1e-12)
                assert forces == pytest.approx(-k * (x / BOHR) * HARTREE / BOHR, rel=1e-12)
                assert not virial.any()
                assert extras == "nada"
            force_server.__exit__(None, None, None)
            assert code.wait(30.0) == 0  # EXIT was said


def test_code_that_never_comes(tmp_path: Path):
    with server(unique_endpoint(f"{tmp_path}/"), start=0.3) as force_server:
        with pytest.raises(OracleTimeout, match=r"did not connect within 0\.3 s"):
            force_server.compute(np.zeros((2, 3)), CELL)


def test_code_that_ended_before_it_came_is_noticed_before_the_timeout(tmp_path: Path):
    with server(unique_endpoint(f"{tmp_path}/"), start=30.0, alive=lambda: False) as force_server:
        start = time.monotonic()
        with pytest.raises(OracleCrashed, match="ended by itself"):
            force_server.compute(np.zeros((2, 3)), CELL)
        assert time.monotonic() - start < 5.0


def test_code_that_hangs_is_left_and_the_server_closes_at_once(tmp_path: Path):
    gate = threading.Event()
    toy = Harmonic()
    force_server = server(unique_endpoint(f"{tmp_path}/"), frame=0.4)
    with force_server:
        code = serving(force_server.endpoint, lambda request: (gate.wait(60.0), toy(request))[1])
        with pytest.raises(OracleTimeout, match=r"did not finish within 0\.4 s"):
            force_server.compute(np.zeros((2, 3)), CELL)
        start = time.monotonic()
    assert time.monotonic() - start < 10.0
    gate.set()
    code.join()


def test_code_that_dies_in_a_calculation_and_is_started_again(tmp_path: Path):
    def die(request: Request) -> Reply:
        raise RuntimeError

    toy = Harmonic()
    x = RNG.normal(size=(2, 3))
    with server(unique_endpoint(f"{tmp_path}/")) as force_server:
        first = serving(force_server.endpoint, die)
        with pytest.raises(OracleCrashed, match="left in a calculation"):
            force_server.compute(x, CELL)
        assert isinstance(first.join(), RuntimeError)
        second = serving(force_server.endpoint, toy)
        assert force_server.compute(x, CELL)[1] == pytest.approx(-toy.k * x, rel=1e-12)
    assert second.join() == "exit"


def answers(energy: float = 1.0, atoms: int = 2, word: bytes = wire.FORCEREADY) -> Callable[[Channel], None]:
    """A code that needs no INIT, is READY once more after POSDATA, and answers as told."""

    def script(code: Channel) -> None:
        assert code.read(12) == wire.STATUS
        code.write(wire.READY)
        assert code.read(12) == wire.POSDATA
        code.read(148 + 2 * 24)
        assert code.read(12) == wire.STATUS
        code.write(wire.READY)
        assert code.read(12) == wire.STATUS
        code.write(wire.HAVEDATA)
        assert code.read(12) == wire.GETFORCE
        forces = np.zeros((1, atoms, 3))
        code.write(word + wire.pack_forces(np.array([energy]), forces, np.zeros((1, 3, 3)), [""])[12:])
        code.readable(2.0)

    return script


def test_code_without_init_and_without_extras(tmp_path: Path):
    with server(unique_endpoint(f"{tmp_path}/")) as force_server, scripted(force_server.endpoint, answers()):
        energy, forces, _, extras = force_server.compute(np.zeros((2, 3)), CELL)
        assert (energy, extras) == (pytest.approx(1.0, rel=1e-12), "")
        assert forces.shape == (2, 3)
        force_server.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (answers(energy=float("nan")), "not finite"),
        (answers(atoms=3), "forces of 3 atoms, but 2 were sent"),
        (answers(word=b"FORCEREDY   "), "expected FORCEREADY"),
    ],
)
def test_nonsense_is_never_a_result(tmp_path: Path, script: Callable[[Channel], None], words: str):
    with server(unique_endpoint(f"{tmp_path}/")) as force_server, scripted(force_server.endpoint, script):
        with pytest.raises(OracleInconsistent, match=words):
            force_server.compute(np.zeros((2, 3)), CELL)


def test_address_that_is_taken(tmp_path: Path):
    endpoint = unique_endpoint(f"{tmp_path}/")
    with server(endpoint), pytest.raises(EnvironmentProblem, match="cannot listen"):
        server(endpoint).__enter__()


def test_server_that_is_not_open_says_so(tmp_path: Path):
    with pytest.raises(OracleCrashed, match="with"):
        server(unique_endpoint(f"{tmp_path}/")).compute(np.zeros((2, 3)), CELL)


def test_two_servers_never_share_a_name():
    assert unique_endpoint("/tmp/a") != unique_endpoint("/tmp/a")
