"""Whatever comes over a socket: a BnnError or a sound result, soon, and no more memory than was sent.

The number of mutated sessions per test is 400, or what the environment variable BNN_FUZZ says.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from fuzzing import DOUBLES, NUMBERS, WORDS, Recorder, client_reads, mutated, server_reads, talk
from harness import Serving, Setup, client_of, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import Harmonic

from bnn_driver.errors import BnnError, ProtocolError
from bnn_driver.ipi import wire
from bnn_driver.ipi.transport import Channel

CASES = int(os.environ.get("BNN_FUZZ", "400"))
EXAMPLES = settings(
    max_examples=max(100, CASES // 4),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ENDINGS = {"exit", "closed", "results"}
"""How a case may end beside a BnnError."""


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What real i-PI says to our client in each of its modes, and what our server and our client say to each other."""
    found: dict[str, bytes] = {}
    setups = {
        "plain": Setup(steps=3, parameters="{template:init.xyz}"),
        "legacy": Setup(steps=3, consolidate=False),
        "batched": Setup(steps=3, beads=4, batch=4),
        "padded": Setup(steps=2, beads=3, batch=2),
    }
    for name, setup in setups.items():
        with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
            recorder = Recorder(patch)
            process, effective = stack.enter_context(running(setup, tmp_path_factory.mktemp(name)))
            serving = Serving(client_of(effective, Harmonic(0.5)))
            assert serving.join(30.0) == "exit", process.tail(20)
            found[name] = bytes(recorder.received["i-PI"])
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        talk(tmp_path_factory.mktemp("talk"), Harmonic(0.5))
        found["old server"] = bytes(recorder.received["i-PI"])
        found["code"] = bytes(recorder.received["the code"])
    return found


def report(name: str, endings: Counter[str]) -> None:
    """Shown with `pytest -s`."""
    print(f"\n{name}: {sum(endings.values())} cases: {json.dumps(dict(endings.most_common()))}")


@pytest.mark.ipi
@pytest.mark.parametrize("mode", ["plain", "legacy", "batched", "padded", "old server"])
def test_sessions_of_ipi_with_bytes_changed(sessions: dict[str, bytes], mode: str) -> None:
    assert client_reads(sessions[mode]) in ENDINGS | {"IpiGone"}  # unchanged: the recording is whole
    rng = np.random.default_rng(1)
    endings = Counter(client_reads(mutated(sessions[mode], list(sessions.values()), rng)) for _ in range(CASES))
    report(mode, endings)
    # the mutations reach the places that matter
    assert {"ProtocolError", "IpiGone"} <= set(endings)


@pytest.mark.ipi
@pytest.mark.parametrize("mode", ["plain", "batched"])
def test_sessions_of_an_ipi_that_stays_and_says_no_more(sessions: dict[str, bytes], mode: str) -> None:
    rng, others = np.random.default_rng(3), list(sessions.values())
    endings = Counter(client_reads(mutated(sessions[mode], others, rng), hang_up=False, seconds=0.05) for _ in range(CASES // 4))
    report(f"{mode}, stays", endings)
    assert {"ProtocolError", "Hung"} <= set(endings)


@pytest.mark.ipi
@pytest.mark.parametrize("hang_up", [True, False])
def test_sessions_of_a_code_with_bytes_changed(sessions: dict[str, bytes], tmp_path: Path, hang_up: bool) -> None:
    assert server_reads(sessions["code"], tmp_path) == "results"
    rng, others = np.random.default_rng(2), list(sessions.values())
    count = CASES if hang_up else CASES // 4  # each that is left hanging takes its whole time
    endings = Counter(
        server_reads(mutated(sessions["code"], others, rng), tmp_path, hang_up=hang_up, seconds=2.0 if hang_up else 0.05)
        for _ in range(count)
    )
    report(f"code, hang_up={hang_up}", endings)
    assert {"OracleInconsistent", "OracleCrashed" if hang_up else "OracleTimeout", "results"} <= set(endings)


HELLO = wire.STATUS + wire.pack_init(" ") + wire.STATUS
CELLS = np.eye(3).tobytes() * 2


def posdata_of(said: int, atoms: int) -> bytes:
    return wire.POSDATA + CELLS + np.int32(said).tobytes() + bytes(24 * atoms)


@pytest.mark.parametrize(
    ("data", "shared", "ending"),
    [
        pytest.param(HELLO + posdata_of(0, 0) + wire.GETFORCE, False, "ProtocolError", id="no atoms"),
        pytest.param(HELLO + posdata_of(9_999_999, 0), False, "IpiGone", id="240 MB announced"),
        pytest.param(wire.STATUS + wire.pack_init("batch_size:²"), False, "IpiGone", id="a digit that is none"),
        pytest.param(wire.STATUS + wire.pack_init("batch_size:" + 5000 * "1"), False, "ProtocolError", id="5000 digits"),
        pytest.param(wire.STATUS + wire.pack_init("batch_size:2000000000"), False, "ProtocolError", id="2e9 structures"),
        pytest.param(
            HELLO + wire.POSDATA + np.array([1, 1], np.int32).tobytes() + b"\x80", True, "ProtocolError", id="a name beyond ASCII"
        ),
    ],
)
def test_what_the_fuzz_found_in_the_client(data: bytes, shared: bool, ending: str) -> None:
    assert client_reads(data, shared) == ending


def test_what_the_fuzz_found_in_the_server(tmp_path: Path) -> None:
    """A code that stops in the middle of a header was waited for without limit."""
    assert server_reads(wire.READY[:7], tmp_path, hang_up=False, seconds=0.05) == "OracleTimeout"


counts = st.one_of(st.sampled_from(NUMBERS), st.integers(0, 12), st.integers(-(2**31), 2**31 - 1))
numbers = st.one_of(st.sampled_from(DOUBLES), st.floats(-50, 50), st.floats())
texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [" ", "batch_size:3", " a : b , , batch_size:2", "batch_size:99999999999", "batch_size:²", "batch_size:" + 5000 * "1"]
    ),
    counts.map(lambda n: f"batch_size:{n}"),
)


def packed(values: list[float]) -> bytes:
    return np.array(values, np.float64).tobytes()


def doubles(size: int) -> st.SearchStrategy[bytes]:
    return st.lists(numbers, min_size=size, max_size=size).map(packed)


@st.composite
def posdata(draw: st.DrawFn) -> bytes:
    """POSDATA, plain or batched, with as many numbers as it says, or not."""
    atoms, batch = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    said = draw(st.one_of(st.just(atoms), counts))
    body = b"".join(draw(doubles(18)) for _ in range(batch)), draw(doubles(3 * atoms * batch))
    count = np.int32(said).tobytes()
    return wire.POSDATA + (body[0] + count if draw(st.booleans()) else count + body[0]) + body[1]


@st.composite
def init(draw: st.DrawFn) -> bytes:
    text = draw(texts).encode()
    said = draw(st.one_of(st.just(len(text)), counts))
    return wire.INIT + np.int32(draw(counts)).tobytes() + np.int32(said).tobytes() + text


@st.composite
def forceready(draw: st.DrawFn) -> bytes:
    atoms, text = draw(st.one_of(st.just(4), st.integers(0, 5))), draw(st.binary(max_size=20))
    said, length = draw(st.one_of(st.just(atoms), counts)), draw(st.one_of(st.just(len(text)), counts))
    return b"".join(
        [wire.FORCEREADY, draw(doubles(1)), np.int32(said).tobytes(), draw(doubles(3 * atoms)), draw(doubles(9)),
         np.int32(length).tobytes(), text]
    )  # fmt: skip


words = st.sampled_from(WORDS).map(lambda word: word.ljust(12))
from_ipi = st.lists(
    st.one_of(words, init(), posdata(), posdata().map(lambda m: m + wire.GETFORCE), st.binary(max_size=30)), max_size=8
)
polite = st.lists(st.one_of(posdata().map(lambda m: m + wire.GETFORCE), words), max_size=5).map(
    lambda messages: [wire.STATUS, wire.pack_init(" "), wire.STATUS, *messages]
)
from_code = st.lists(st.one_of(words, forceready(), st.binary(max_size=30)), max_size=8)
obedient = st.lists(forceready(), max_size=3).map(lambda ms: [wire.READY + wire.HAVEDATA + m for m in ms])


@EXAMPLES
@given(messages=st.one_of(from_ipi, polite), shared=st.booleans())
def test_any_messages_to_the_client(messages: list[bytes], shared: bool) -> None:
    client_reads(b"".join(messages), shared)


@EXAMPLES
@given(messages=st.one_of(from_code, obedient))
def test_any_messages_to_the_server(messages: list[bytes], tmp_path: Path) -> None:
    server_reads(b"".join(messages), tmp_path)


@EXAMPLES
@given(names=st.lists(st.binary(max_size=30), min_size=6, max_size=6), atoms=counts, text=texts)
def test_any_names_of_shared_memory(names: list[bytes], atoms: int, text: str) -> None:
    segments = b"".join(np.int32(len(name)).tobytes() + name for name in names)
    start = wire.STATUS + wire.pack_init(text) + wire.STATUS
    client_reads(start + wire.POSDATA + np.int32(atoms).tobytes() + segments + wire.GETFORCE, shared=True)


@EXAMPLES
@given(text=texts)
def test_any_text_has_a_batch_size_or_is_refused(text: str) -> None:
    try:
        assert 1 <= wire.batch_size(text) <= 1_000_000
    except ProtocolError:
        assert "batch_size" in text


@EXAMPLES
@given(data=st.data(), batch=st.integers(1, 3), atoms=st.integers(1, 5))
def test_positions_and_cells_come_back(data: st.DataObject, batch: int, atoms: int) -> None:
    x = np.array(data.draw(st.lists(st.floats(-1e6, 1e6), min_size=3 * batch * atoms, max_size=3 * batch * atoms)))
    x = x.reshape(batch, atoms, 3)
    cell = np.eye(3) * data.draw(st.floats(0.5, 1e3)) + np.triu(np.full((3, 3), data.draw(st.floats(-0.2, 0.2))), 1)
    message = wire.pack_posdata(x, np.repeat(cell[None], batch, axis=0), batched=True)
    back, cells = wire.decode_frames(*wire.split_batched_posdata(message[16:], atoms, batch), atoms)
    np.testing.assert_allclose(back, x, rtol=1e-14, atol=0)
    np.testing.assert_allclose(cells, np.repeat(cell[None], batch, axis=0), rtol=1e-14, atol=1e-300)


@EXAMPLES
@given(pieces=st.lists(st.binary(min_size=1, max_size=300), max_size=12), sizes=st.lists(st.integers(0, 400), max_size=12))
def test_reads_do_not_depend_on_the_pieces_that_come(pieces: list[bytes], sizes: list[int]) -> None:
    import socket

    ours, theirs = socket.socketpair()
    channel, whole, at = Channel(ours, "x"), b"".join(pieces), 0
    for piece in pieces:
        theirs.sendall(piece)
    theirs.close()
    try:
        for size in sizes:
            if at + size > len(whole):
                with pytest.raises(BnnError):
                    channel.read(size)
                break
            assert channel.read(size) == whole[at : at + size]
            at += size
    finally:
        channel.close()
