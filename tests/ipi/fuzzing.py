"""What the fuzz tests share: real sessions to mutate, mutations, a deadline for each case, and a bound on memory."""

from __future__ import annotations

import signal
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from toys import Harmonic

from bnn_driver.errors import BnnError
from bnn_driver.ipi import client as client_module
from bnn_driver.ipi.client import Client, Reply, Request
from bnn_driver.ipi.server import ForceServer, unique_endpoint
from bnn_driver.ipi.transport import Channel, Endpoint

CASE_SECONDS = 20.0
"""Beyond it a case counts as hung; all of them take milliseconds."""
MEMORY = 3 << 20
"""Bytes that a case may take beyond FACTOR times what the other side sent: a few reads of 1 MiB at once."""
FACTOR = 60
NUMBERS = [0, 1, -1, 2, 3, 5, 127, 9_999_999, 10_000_001, 2**31 - 1, -(2**31)]
DOUBLES = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324]
WORDS = [b"STATUS", b"INIT", b"POSDATA", b"GETFORCE", b"EXIT", b"NEEDINIT", b"READY", b"HAVEDATA", b"FORCEREADY", b"status", b""]


class Hang(AssertionError):
    """A case did not end in time."""


@contextmanager
def bounded(sent: int, seconds: float = CASE_SECONDS) -> Iterator[None]:
    """Fails when the block takes longer, or more memory than what was sent can justify."""

    def expired(number: int, frame: object) -> None:
        raise Hang(f"still busy after {seconds} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    tracemalloc.start()
    try:
        yield
    finally:  # also when it ended with an error, as most cases do
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY + FACTOR * sent, f"{peak} bytes were taken for a message of {sent}"


def canned(data: bytes, name: str, hang_up: bool = True) -> tuple[Channel, socket.socket]:
    """A channel on which all of `data` has come already, and its other end."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    theirs.settimeout(CASE_SECONDS)
    theirs.sendall(data)
    if hang_up:
        theirs.shutdown(socket.SHUT_WR)
    return Channel(ours, name), theirs


def tolerant(request: Request) -> Reply:
    """The harmonic toy, that lets absurd positions have infinite energies."""
    with np.errstate(over="ignore", invalid="ignore"):
        return Harmonic(0.5)(request)


def client_reads(data: bytes, shared: bool = False, hang_up: bool = True, seconds: float = 2.0) -> str:
    """Our client meets an i-PI that sends `data`, and hangs up or stays; how it ended.  Any exception but a BnnError passes through."""
    channel, theirs = canned(data, "i-PI", hang_up)
    original = client_module.connect
    client_module.connect = lambda *_: channel
    client = Client(
        [Endpoint("unix", "x")], tolerant, shared_memory=shared, connect_timeout=1.0, reconnects=0, gather_seconds=0.0,
        silence_timeout=seconds,
    )  # fmt: skip
    try:
        with bounded(len(data)):
            return client.serve()
    except BnnError as error:
        return type(error).__name__
    finally:
        client_module.connect = original
        channel.close()
        theirs.close()


def server_reads(data: bytes, folder: Path, frames: int = 3, atoms: int = 4, hang_up: bool = True, seconds: float = 2.0) -> str:
    """Our server meets a code that answers `data`; how it ended.  A result must be finite and of the right shape."""
    channel, theirs = canned(data, "the code", hang_up)
    force_server = ForceServer(
        unique_endpoint(f"{folder}/"), parameters=" ", connect_timeout=1.0, frame_timeout=seconds, alive=lambda: True
    )
    try:
        with force_server:
            force_server._channel = channel
            with bounded(len(data)):
                for number in range(frames):
                    x = np.random.default_rng(number).normal(size=(atoms, 3))
                    energy, forces, virial, extras = force_server.compute(x, 9.0 * np.eye(3))
                    assert np.isfinite(energy)
                    assert forces.shape == (atoms, 3)
                    assert virial.shape == (3, 3)
                    assert np.isfinite(forces).all()
                    assert np.isfinite(virial).all()
                    assert isinstance(extras, str)
        return "results"
    except BnnError as error:
        return type(error).__name__
    finally:
        channel.close()
        theirs.close()


def mutated(session: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """The session with one to three changes."""
    data = bytearray(session)
    for _ in range(rng.integers(1, 4)):
        if not data:
            break
        MUTATIONS[rng.integers(len(MUTATIONS))](data, others, rng)
    return bytes(data)


def _flip(data: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def _cut(data: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    del data[rng.integers(len(data)) :]


def _remove(data: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    start = rng.integers(len(data))
    del data[start : start + rng.integers(1, 40)]


def _insert(data: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    start = rng.integers(len(data))
    data[start:start] = rng.bytes(int(rng.integers(1, 40)))


def _repeat(data: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    start = int(rng.integers(len(data)))
    piece = data[start : start + int(rng.integers(1, 200))]
    data[start:start] = piece


def _number(data: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    start = rng.integers(len(data))
    data[start : start + 4] = np.int32(NUMBERS[rng.integers(len(NUMBERS))]).tobytes()


def _double(data: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    start = rng.integers(len(data))
    data[start : start + 8] = np.float64(DOUBLES[rng.integers(len(DOUBLES))]).tobytes()


def _word(data: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    start = rng.integers(len(data))
    data[start : start + 12] = WORDS[rng.integers(len(WORDS))].ljust(12)


def _count(data: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    """As `_number`, but where a number is: just after a header word, or after the cells of POSDATA."""
    places = [i + j for word in WORDS[:9] for i in _found(bytes(data), word.ljust(12)) for j in (12, 16, 20, 156)]
    places = [i for i in places if i < len(data)]
    if places:
        start = places[rng.integers(len(places))]
        data[start : start + 4] = np.int32(NUMBERS[rng.integers(len(NUMBERS))]).tobytes()


def _found(data: bytes, word: bytes) -> list[int]:
    return [i for i in range(len(data)) if data.startswith(word, i)]


def _splice(data: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    other = others[rng.integers(len(others))]
    data[rng.integers(len(data)) :] = other[rng.integers(len(other)) :]


MUTATIONS: list[Callable[[bytearray, list[bytes], np.random.Generator], None]] = [
    _flip, _cut, _remove, _insert, _repeat, _number, _double, _word, _count, _splice,
]  # fmt: skip


class Recorder:
    """Keeps what every channel received, by the name of the peer."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.received: dict[str, bytearray] = {}
        original = Channel._receive

        def record(channel: Channel, size: int, deadline: float | None) -> bytes:
            data = original(channel, size, deadline)
            self.received.setdefault(channel.name.split(" at ")[0], bytearray()).extend(data)
            return data

        patch.setattr(Channel, "_receive", record)


def talk(folder: Path, handler: Callable[[Request], Reply], frames: int = 3, atoms: int = 4) -> None:
    """Our server and our client, over a real socket."""
    with ForceServer(
        unique_endpoint(f"{folder}/"), parameters=" a : b ", connect_timeout=20.0, frame_timeout=3.0, alive=lambda: True
    ) as force_server:
        client = Client(
            [force_server.endpoint], handler, shared_memory=False, connect_timeout=20.0, reconnects=0, gather_seconds=0.0
        )
        thread = threading.Thread(target=client.serve)
        thread.start()
        for number in range(frames):
            force_server.compute(np.random.default_rng(number).normal(size=(atoms, 3)), 9.0 * np.eye(3))
    thread.join(3.0)
