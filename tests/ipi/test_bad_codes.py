"""Codes that hang, trickle, flood, lie about sizes or come twice: the server is done with each in bounded time and memory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fuzzing import bounded
from toys import Harmonic

from bnn_driver.errors import GuardStop, IpiGone, OracleCrashed, OracleInconsistent, OracleTimeout
from bnn_driver.ipi import wire
from bnn_driver.ipi.client import Client
from bnn_driver.ipi.replies import Reply, ReplyCheck, Request
from bnn_driver.ipi.server import ForceServer, unique_endpoint
from bnn_driver.ipi.transport import Channel, connect

CELL = 9.0 * np.eye(3)
LIMIT = 0.4
"""Seconds that a frame of a code that hangs may take."""
SOON = 8.0
"""Seconds within which all must be over on a busy machine; what is not bounded takes for ever."""
ZERO = np.zeros((1, 3, 3))


def server(folder: Path, limit: float = 30.0, alive: Callable[[], bool] = lambda: True) -> ForceServer:
    return ForceServer(unique_endpoint(f"{folder}/"), parameters=" ", connect_timeout=30.0, frame_timeout=limit, alive=alive)


@contextmanager
def code(force_server: ForceServer, script: Callable[[Channel], None]) -> Iterator[None]:
    """A client that does what the script says, and stays connected until the test is over."""
    over = threading.Event()

    def run() -> None:
        channel = connect(force_server.endpoint, 30.0)
        with contextlib.suppress(IpiGone, TimeoutError):
            script(channel)
        over.wait(30.0)
        channel.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30.0)
        assert not thread.is_alive()


def up_to_getforce(channel: Channel, atoms: int = 2) -> None:
    channel.read(12)
    channel.write(wire.READY)
    channel.read(12 + 18 * 8 + 4 + 24 * atoms + 12)
    channel.write(wire.HAVEDATA)
    channel.read(12)


RESULT = wire.pack_forces(np.ones(1), np.zeros((1, 2, 3)), ZERO, ["{}"])

HUGE = RESULT[:24] + np.full(6, 1.7e308).tobytes() + RESULT[72:]


def says(data: bytes) -> Callable[[Channel], None]:
    """Everything right, but the reply is `data` and then silence."""

    def script(channel: Channel) -> None:
        up_to_getforce(channel)
        channel.write(data)

    return script


def floods(answer: bytes) -> Callable[[Channel], None]:
    def script(channel: Channel) -> None:
        while True:
            channel.write(1000 * answer, 1.0)

    return script


def trickles(channel: Channel) -> None:
    up_to_getforce(channel)
    for byte in 100 * RESULT[:30]:
        channel.write(bytes([byte]))
        time.sleep(0.01)


def absurd(atoms: int = 2, extras: int = 0) -> bytes:
    reply = bytearray(wire.pack_forces(np.ones(1), np.zeros((1, 2, 3)), ZERO, [""]))
    reply[20:24], reply[-4:] = np.int32(atoms).tobytes(), np.int32(extras).tobytes()
    return bytes(reply)


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        pytest.param(lambda channel: None, OracleTimeout, "did not finish", id="silent from the start"),
        pytest.param(lambda channel: channel.write(b"REA"), OracleTimeout, "did not finish", id="stops in a header"),
        pytest.param(floods(wire.READY), OracleTimeout, "did not finish", id="READY for ever"),
        pytest.param(floods(wire.NEEDINIT), OracleTimeout, "did not finish", id="NEEDINIT for ever"),
        pytest.param(trickles, OracleTimeout, "did not finish", id="a byte now and then"),
        pytest.param(says(RESULT[:16]), OracleTimeout, "did not finish", id="stops in the energy"),
        pytest.param(says(RESULT[:50]), OracleTimeout, "did not finish", id="stops in the forces"),
        pytest.param(says(RESULT[:-1]), OracleTimeout, "did not finish", id="stops in the extras"),
        pytest.param(says(b"\x00" * 12), OracleInconsistent, "expected FORCEREADY", id="zeros"),
        pytest.param(floods(b"garbage!"), OracleInconsistent, "expected NEEDINIT or READY", id="garbage"),
        pytest.param(says(absurd(atoms=2**31 - 1)), OracleInconsistent, "forces of 2147483647 atoms", id="2^31 - 1 atoms"),
        pytest.param(says(absurd(atoms=-1)), OracleInconsistent, "forces of -1 atoms", id="-1 atoms"),
        pytest.param(says(absurd(extras=2**31 - 1)), OracleInconsistent, "bytes of extras", id="2^31 - 1 bytes of extras"),
        pytest.param(says(absurd(extras=9_000_000)), OracleTimeout, "did not finish", id="9 MB of extras announced"),
        pytest.param(
            says(wire.pack_forces(np.ones(1), np.full((1, 2, 3), np.nan), ZERO, [""])), OracleInconsistent, "not finite", id="NaN"
        ),
        pytest.param(says(HUGE), OracleInconsistent, "not finite", id="infinite in eV/Å only"),
    ],
)
def test_a_code_that_misbehaves_costs_bounded_time_and_memory(
    tmp_path: Path, script: Callable[[Channel], None], error: type[Exception], words: str
) -> None:
    with server(tmp_path, LIMIT if error is OracleTimeout else 30.0) as force_server, code(force_server, script):
        start = time.monotonic()
        with bounded(0), pytest.raises(error, match=words):
            force_server.compute(np.zeros((2, 3)), CELL)
        force_server.__exit__(None, None, None)
        assert time.monotonic() - start < SOON


@pytest.mark.parametrize("after", range(0, len(RESULT), 7))
def test_a_socket_cut_anywhere_in_a_reply_is_noticed_at_once(tmp_path: Path, after: int) -> None:
    def script(channel: Channel) -> None:
        says(RESULT[:after])(channel)
        channel.close()

    with server(tmp_path) as force_server, code(force_server, script):
        start = time.monotonic()
        with pytest.raises(OracleCrashed, match="left in a calculation"):
            force_server.compute(np.zeros((2, 3)), CELL)
        assert time.monotonic() - start < SOON


def test_empty_extras_end_a_reply_though_the_code_says_nothing_more(tmp_path: Path) -> None:
    """CP2K sends none: waiting for their first byte takes the whole time limit."""
    with server(tmp_path) as force_server, code(force_server, says(absurd())):
        assert force_server.compute(np.zeros((2, 3)), CELL)[3] == ""


def test_a_code_that_reads_nothing_does_not_block_the_server(tmp_path: Path) -> None:
    def script(channel: Channel) -> None:
        channel.read(12)
        channel.write(wire.READY)

    with server(tmp_path, LIMIT) as force_server, code(force_server, script):
        start = time.monotonic()
        with pytest.raises(OracleTimeout, match="did not finish"):
            force_server.compute(np.zeros((500_000, 3)), CELL)  # 12 MB: more than a socket holds
        assert time.monotonic() - start < SOON


def test_a_process_that_is_gone_is_noticed_though_its_child_holds_the_socket(tmp_path: Path) -> None:
    lives = [True]

    def script(channel: Channel) -> None:
        says(RESULT[:50])(channel)
        lives[0] = False

    with server(tmp_path, alive=lambda: lives[0]) as force_server, code(force_server, script):
        start = time.monotonic()
        with pytest.raises(OracleCrashed, match="ended by itself"):
            force_server.compute(np.zeros((2, 3)), CELL)
        assert time.monotonic() - start < SOON


def harmonic(force_server: ForceServer) -> threading.Thread:
    client = Client(
        [force_server.endpoint], Harmonic(), shared_memory=False, connect_timeout=20.0, reconnects=0, gather_seconds=0.0
    )
    thread = threading.Thread(target=_serve, args=(client,), daemon=True)
    thread.start()
    return thread


def _serve(client: Client) -> None:
    with contextlib.suppress(IpiGone, TimeoutError):
        client.serve()


def test_two_clients_are_refused(tmp_path: Path) -> None:
    """Four ranks of a serial program, started by mpirun, each connect, and all write the same log."""
    with server(tmp_path) as force_server:
        clients = [harmonic(force_server) for _ in range(2)]
        time.sleep(0.1)
        with pytest.raises(OracleInconsistent, match="two clients connected"):
            force_server.compute(np.zeros((2, 3)), CELL)
        for client in clients:
            client.join(30.0)
            assert not client.is_alive()


def test_what_else_connected_is_not_taken_for_the_next_code(tmp_path: Path) -> None:
    with server(tmp_path) as force_server, code(force_server, lambda channel: channel.write(b"nonsense....")):
        channel = force_server.connect()
        with code(force_server, lambda channel: channel.write(b"and another.")):
            time.sleep(0.1)
            with pytest.raises(OracleInconsistent, match="expected NEEDINIT or READY"):
                force_server.compute(np.zeros((2, 3)), CELL)
            thread = harmonic(force_server)
            x = np.ones((2, 3))
            assert force_server.compute(x, CELL)[1] == pytest.approx(-0.5 * x)
            assert force_server.connect() is not channel
    thread.join(30.0)


def test_a_reply_of_a_large_system_is_refused_in_little_memory() -> None:
    """The error names the shortest distance: all pairs of 20,000 atoms would take 10 GB."""
    x = np.random.default_rng(0).uniform(0.0, 60.0, size=(1, 20_000, 3))
    x[0, 1] = x[0, 0] + 0.25
    request = Request(x, CELL[None], "", 1, 0)
    forces = np.zeros_like(x)
    forces[0, 7, 1] = np.nan
    with bounded(x.nbytes), pytest.raises(GuardStop, match=r"atom 7 is nan.*shortest distance there is 0\.\d+ Å"):
        ReplyCheck()(request, Reply(np.zeros(1), forces, np.zeros((1, 3, 3)), ["{}"]))
