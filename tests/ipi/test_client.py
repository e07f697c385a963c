"""The client against a scripted i-PI: every mode, and everything that would hang the real one."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_ipi import FakeIpi
from harness import Serving
from toys import Harmonic

from bnn_driver.errors import BnnError, ConfigError, GuardStop, IpiGone, ProtocolError
from bnn_driver.ipi import connection, wire
from bnn_driver.ipi.client import Client, Reply, Request
from bnn_driver.ipi.transport import Channel

RNG = np.random.default_rng(3)
CELL = np.array([[10.0, 0.0, 0.0], [1.0, 9.0, 0.0], [-0.5, 0.7, 8.0]])
K = 0.5


def frames(count: int, atoms: int = 4) -> tuple[np.ndarray, np.ndarray]:
    return RNG.normal(size=(count, atoms, 3)), CELL + RNG.normal(size=(count, 1, 1)) * np.triu(np.ones((3, 3))).T


@pytest.fixture
def ipi(tmp_path: Path) -> Iterator[FakeIpi]:
    fake = FakeIpi(tmp_path)
    yield fake
    fake.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[int], list[FakeIpi]]]:
    """Several of them, closed at the end."""
    fakes: list[FakeIpi] = []

    def several(count: int) -> list[FakeIpi]:
        fakes.extend(FakeIpi(tmp_path) for _ in range(count))
        return fakes

    yield several
    for fake in fakes:
        fake.close()


def client(
    fakes: list[FakeIpi], handler: Callable[[Request], Reply], shared: bool = False, reconnects: int = 0, gather: float = 0.2
) -> Client:
    ends = [fake.endpoint for fake in fakes]
    return Client(ends, handler, shared_memory=shared, connect_timeout=20.0, reconnects=reconnects, gather_seconds=gather)


def expect(got: tuple, x: np.ndarray) -> None:
    """Energy, forces and virial of the harmonic toy; 1e-12: a few roundings of the unit conversion."""
    energy, forces, virial, extras = got
    np.testing.assert_allclose(energy, 0.5 * K * (x**2).sum(axis=(1, 2)), rtol=1e-12)
    np.testing.assert_allclose(forces, -K * x, rtol=1e-12)
    np.testing.assert_allclose(virial, np.einsum("bai,baj->bij", -K * x, x), rtol=1e-12, atol=1e-12)
    assert extras == ['{"toy": 1.0}'] * len(x)


def test_plain_exchange_and_exit(ipi: FakeIpi):
    handler = Harmonic(K)
    serving = Serving(client([ipi], handler))
    ipi.initialise(" template : init.xyz , ")
    for _ in range(3):
        x, cell = frames(1)
        ipi.ask(x, cell)
        expect(ipi.forces(1, 4), x)
        assert ipi.status() == wire.READY
    ipi.say(wire.EXIT)
    assert serving.join() == "exit"
    assert handler.sizes == [1, 1, 1]
    assert handler.parameters == {" template : init.xyz , "}


def test_cell_reaches_the_handler_with_vectors_in_rows(ipi: FakeIpi):
    seen = []
    toy = Harmonic(K)
    serving = Serving(client([ipi], lambda request: (seen.append(request), toy(request))[1]))
    ipi.initialise()
    x, cell = frames(1)
    ipi.ask(x, cell)
    ipi.forces(1, 4)
    ipi.say(wire.EXIT)
    assert serving.join() == "exit"
    assert seen[0].cell == pytest.approx(cell, rel=1e-12)
    assert seen[0].positions == pytest.approx(x, rel=1e-12)


def test_legacy_order_does_not_deadlock(ipi: FakeIpi):
    serving = Serving(client([ipi], Harmonic(K)))
    ipi.initialise()
    for _ in range(2):
        x, cell = frames(1)
        ipi.say(wire.pack_posdata(x, cell, batched=False))
        assert ipi.status() == wire.HAVEDATA
        ipi.say(wire.GETFORCE)
        expect(ipi.forces(1, 4), x)
        assert ipi.status() == wire.READY
    ipi.say(wire.EXIT)
    assert serving.join() == "exit"


def test_nothing_is_computed_before_the_next_header_is_read(ipi: FakeIpi):
    """A kill over an unread GETFORCE would give i-PI a reset."""
    handler = Harmonic(K)
    serving = Serving(client([ipi], handler))
    ipi.initialise()
    x, cell = frames(1)
    ipi.say(wire.pack_posdata(x, cell, batched=False))
    time.sleep(0.2)
    assert handler.sizes == []
    ipi.say(wire.GETFORCE)
    expect(ipi.forces(1, 4), x)
    ipi.say(wire.EXIT)
    assert serving.join() == "exit"


def test_server_that_says_nothing_after_posdata_is_computed_for(ipi: FakeIpi, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "DRAIN_SECONDS", 0.05)
    handler = Harmonic(K)
    serving = Serving(client([ipi], handler))
    ipi.initialise()
    x, cell = frames(1)
    ipi.say(wire.pack_posdata(x, cell, batched=False))
    for _ in range(1000):
        if handler.sizes:
            break
        time.sleep(0.02)
    assert handler.sizes == [1]
    assert ipi.status() == wire.HAVEDATA
    ipi.say(wire.GETFORCE)
    expect(ipi.forces(1, 4), x)
    ipi.say(wire.EXIT)
    assert serving.join() == "exit"


def test_batch_is_computed_without_its_duplicates_and_answered_with_them(ipi: FakeIpi):
    handler = Harmonic(K)
    serving = Serving(client([ipi], handler))
    ipi.initialise("  batch_size:5")
    x, cell = frames(2)
    rows = [1, 0, 1, 1, 1]
    ipi.ask(x[rows], cell[rows], batched=True)
    expect(ipi.forces(5, 4), x[rows])
    ipi.say(wire.EXIT)
    assert serving.join() == "exit"
    assert handler.sizes == [2]


def test_equal_positions_in_different_cells_are_different_structures(ipi: FakeIpi):
    handler = Harmonic(K)
    serving = Serving(client([ipi], handler))
    ipi.initialise("  batch_size:2")
    x, cell = frames(2)
    ipi.ask(x[[0, 0]], cell, batched=True)
    expect(ipi.forces(2, 4), x[[0, 0]])
    ipi.say(wire.EXIT)
    assert serving.join() == "exit"
    assert handler.sizes == [2]


@pytest.mark.parametrize("batch", [1, 3])
def test_shared_memory(ipi: FakeIpi, batch: int):
    serving = Serving(client([ipi], Harmonic(K), shared=True))
    ipi.initialise(f"  batch_size:{batch}" if batch > 1 else " ")
    arrays = ipi.share(batch, 4)
    for step in range(2):
        x, cell = frames(batch)
        h, _ = wire.encode_cell(cell)
        arrays["pos"][:], arrays["h"][:], arrays["force"][:] = x.reshape(batch, 12) / 0.5291772105638411, h, np.nan
        ipi.say(wire.POSDATA + np.int32(4).tobytes() + (ipi.segment_names() if step == 0 else b"") + wire.GETFORCE)
        assert ipi.hear(12) == wire.FORCEREADY
        extras = ipi.extras(batch)
        hartree, bohr = 27.211386024367243, 0.5291772105638411
        forces = arrays["force"].reshape(batch, 4, 3) * hartree / bohr
        expect((arrays["pot"][:, 0] * hartree, forces, arrays["vir"].reshape(batch, 3, 3) * hartree, extras), x)
        assert ipi.status() == wire.READY
    ipi.say(wire.EXIT)
    assert serving.join() == "exit"


def test_reply_leaves_in_one_write(ipi: FakeIpi, monkeypatch: pytest.MonkeyPatch):
    writes: list[int] = []
    write = Channel.write
    monkeypatch.setattr(
        Channel, "write", lambda self, data, seconds=None: (writes.append(len(data)), write(self, data, seconds))[1]
    )
    serving = Serving(client([ipi], Harmonic(K)))
    ipi.initialise("  batch_size:3")
    writes.clear()
    ipi.ask(*frames(3), batched=True)
    ipi.forces(3, 4)
    ipi.say(wire.EXIT)
    assert serving.join() == "exit"
    assert writes == [12 + 3 * 8 + 4 + 3 * 96 + 3 * 72 + 3 * (4 + len('{"toy": 1.0}'))]


@pytest.mark.parametrize("legacy", [False, True])
def test_death_in_a_calculation_is_an_end_of_file_for_ipi(ipi: FakeIpi, legacy: bool):
    def die(request: Request) -> Reply:
        raise KeyboardInterrupt

    serving = Serving(client([ipi], die))
    ipi.initialise()
    x, cell = frames(1)
    ipi.say(wire.pack_posdata(x, cell, batched=False) + (wire.STATUS if legacy else wire.GETFORCE))
    assert ipi.hear(12) == b""  # ConnectionResetError here is what hangs i-PI for good
    assert isinstance(serving.join(), KeyboardInterrupt)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"energy": np.array([NAN, 0.0])}, GuardStop, "energy of structure 0"),
        ({"energy": np.array([INF, 0.0])}, GuardStop, "energy of structure 0"),
        ({"forces": np.where(np.arange(24).reshape(2, 4, 3) == 17, -INF, 0.0)}, GuardStop, "structure 1, atom 1"),
        ({"virial": np.full((2, 3, 3), NAN)}, GuardStop, "virial"),
        ({"energy": np.zeros(1)}, BnnError, "energy of shape"),
        ({"forces": np.zeros((2, 5, 3))}, BnnError, "forces of shape"),
        ({"forces": np.zeros((2, 12))}, BnnError, "forces of shape"),
        ({"virial": np.zeros((2, 9))}, BnnError, "virial of shape"),
        ({"extras": ["{}"]}, BnnError, "texts of extras"),
        ({"extras": ["nada", "nada"]}, BnnError, "strict JSON"),
        ({"extras": ["", ""]}, BnnError, "strict JSON"),
        ({"extras": ["[1]", "[1]"]}, BnnError, "JSON object"),
        ({"extras": ['{"a": NaN}'] * 2}, BnnError, "strict JSON"),
        ({"extras": ['{"raw": 1}'] * 2}, BnnError, "raw"),
        ({"extras": ['{"uncertainty": 1}'] * 2}, BnnError, "uncertainty"),
        ({"extras": ['{"a": 1}', '{"a": 1, "b": 2}']}, BnnError, "keys of the extras changed"),
        ({"extras": ['{"a": [[[1]]]}'] * 2}, BnnError, "list of lists"),
        ({"extras": ['{"a": [[1], [1, 2]]}'] * 2}, BnnError, "list of lists"),
        ({"extras": ['{"a": {"b": 1}}'] * 2}, BnnError, "list of lists"),
    ],
)
def test_unfit_reply_is_never_sent(ipi: FakeIpi, change: dict, error: type, words: str):
    toy = Harmonic(K)

    def handler(request: Request) -> Reply:
        reply = toy(request)
        parts = {"energy": reply.energy, "forces": reply.forces, "virial": reply.virial, "extras": reply.extras}
        return Reply(**{**parts, **change})

    serving = Serving(client([ipi], handler))
    ipi.initialise("  batch_size:2")
    ipi.ask(*frames(2), batched=True)
    assert ipi.hear(12) == b""
    outcome = serving.join()
    assert isinstance(outcome, error)
    assert words in str(outcome)


def test_keys_of_the_extras_stay_the_same_through_the_run(ipi: FakeIpi):
    toy = Harmonic(K)
    serving = Serving(client([ipi], toy))
    ipi.initialise()
    x, cell = frames(1)
    ipi.ask(x, cell)
    expect(ipi.forces(1, 4), x)
    assert ipi.status() == wire.READY
    toy.extras = json.dumps({"other": 1.0})
    ipi.ask(*frames(1))
    assert ipi.hear(12) == b""
    assert "['other', 'toy']" in str(serving.join())


def test_large_plain_extras_are_fine(ipi: FakeIpi):
    toy = Harmonic(K, extras=json.dumps({"f": np.ones((8, 3000)).tolist(), "unit": "Å"}, ensure_ascii=False))
    serving = Serving(client([ipi], toy))
    ipi.initialise()
    ipi.ask(*frames(1))
    assert json.loads(ipi.forces(1, 4)[3][0])["unit"] == "Å"
    ipi.say(wire.EXIT)
    assert serving.join() == "exit"


def test_nan_positions_end_the_run_with_the_atom(ipi: FakeIpi):
    handler = Harmonic(K)
    serving = Serving(client([ipi], handler, reconnects=5))
    ipi.initialise()
    x, cell = frames(1)
    x[0, 2, 1] = np.nan
    ipi.ask(x, cell)
    outcome = serving.join()
    assert isinstance(outcome, GuardStop)
    assert "atom 2 of structure 0" in str(outcome)
    assert handler.sizes == []


@pytest.mark.parametrize("word", [b"NONSENSE    ", wire.GETFORCE, wire.FORCEREADY])
def test_message_out_of_place_ends_the_run(ipi: FakeIpi, word: bytes):
    serving = Serving(client([ipi], Harmonic(K), reconnects=5))
    ipi.initialise()
    ipi.say(word)
    outcome = serving.join()
    assert isinstance(outcome, ProtocolError)
    assert word.decode().strip() in str(outcome)


def test_ipi_that_dies_is_gone_within_the_grace(ipi: FakeIpi):
    serving = Serving(client([ipi], Harmonic(K), reconnects=5))
    ipi.initialise()
    start = time.monotonic()
    ipi.close()
    outcome = serving.join()
    assert isinstance(outcome, IpiGone)
    assert "listens no more" in str(outcome)
    assert time.monotonic() - start < 15.0  # a grace of 1 s, and not the limit of connecting


def test_dropped_client_returns_and_the_finished_work_is_not_done_again(ipi: FakeIpi):
    handler = Harmonic(K)
    gate = threading.Event()

    def slow(request: Request) -> Reply:
        gate.wait(30.0)
        return handler(request)

    serving = Serving(client([ipi], slow, reconnects=1))
    ipi.initialise("  batch_size:2")
    x, cell = frames(2)
    ipi.ask(x, cell, batched=True)
    assert ipi.peer is not None
    ipi.peer.close()
    gate.set()
    ipi.initialise("  batch_size:3")
    more, more_cell = frames(1)
    ipi.ask(np.concatenate([more, x]), np.concatenate([more_cell, cell]), batched=True)
    expect(ipi.forces(3, 4), np.concatenate([more, x]))
    ipi.say(wire.EXIT)
    assert handler.sizes == [2, 1]
    ipi.server.close()
    assert serving.join() == "exit"


def test_reconnects_in_a_row_are_limited(ipi: FakeIpi):
    serving = Serving(client([ipi], Harmonic(K), reconnects=2))
    for _ in range(3):
        ipi.accept().close()
    outcome = serving.join()
    assert isinstance(outcome, IpiGone)
    assert "given up after 2 reconnects" in str(outcome)


def test_delivered_reply_starts_the_count_of_reconnects_again(ipi: FakeIpi):
    serving = Serving(client([ipi], Harmonic(K), reconnects=1))
    for _ in range(3):
        ipi.initialise()
        x, cell = frames(1)
        ipi.ask(x, cell)
        expect(ipi.forces(1, 4), x)
        assert ipi.peer is not None
        ipi.peer.close()
    ipi.initialise()
    ipi.say(wire.EXIT)
    ipi.server.close()
    assert serving.join() == "exit"


def test_exit_of_a_dropped_client_is_not_the_end_while_ipi_listens(ipi: FakeIpi):
    serving = Serving(client([ipi], Harmonic(K), reconnects=1))
    ipi.initialise()
    ipi.say(wire.EXIT)
    ipi.initialise()
    x, cell = frames(1)
    ipi.ask(x, cell)
    expect(ipi.forces(1, 4), x)
    ipi.say(wire.EXIT)
    ipi.server.close()
    assert serving.join() == "exit"


def test_connection_never_taken_up_after_exit_is_an_exit(ipi: FakeIpi):
    serving = Serving(client([ipi], Harmonic(K), reconnects=3))
    ipi.initialise()
    ipi.say(wire.EXIT)
    time.sleep(0.3)  # the client has connected again: it waits in the backlog
    ipi.server.close()
    assert serving.join() == "exit"


def test_nobody_listens(tmp_path: Path):
    fake = FakeIpi(tmp_path)
    fake.close()
    ends = [fake.endpoint]
    lonely = Client(ends, Harmonic(K), shared_memory=False, connect_timeout=0.2, reconnects=3, gather_seconds=0.0)
    with pytest.raises(IpiGone, match="start i-PI or check <address>"):
        lonely.serve()


def test_requests_of_one_moment_are_one_call(make: Callable[[int], list[FakeIpi]]):
    fakes = make(3)
    handler = Harmonic(K)
    serving = Serving(client(fakes, handler, gather=20.0))  # no longer than until all have asked
    for fake in fakes:
        fake.initialise()
    x, cell = frames(3)
    for i, fake in enumerate(fakes):
        fake.ask(x[[i]], cell[[i]])
    for i, fake in enumerate(fakes):
        expect(fake.forces(1, 4), x[[i]])
        assert fake.status() == wire.READY
    fakes[0].say(wire.EXIT)  # the others go on without it, and without waiting for it
    for i in (1, 2):
        fakes[i].ask(x[[0]], cell[[0]])
    for i in (1, 2):
        expect(fakes[i].forces(1, 4), x[[0]])
        fakes[i].say(wire.EXIT)
    assert serving.join() == "exit"
    assert handler.sizes == [3, 1]


def test_different_atom_counts_and_parameters_are_different_calls(make: Callable[[int], list[FakeIpi]]):
    fakes = make(3)
    handler = Harmonic(K)
    serving = Serving(client(fakes, handler, gather=20.0))
    for fake, parameters in zip(fakes, (" ", " ", " a : 1 , "), strict=True):
        fake.initialise(parameters)
    asked = [frames(1, atoms) for atoms in (4, 5, 4)]
    for fake, (x, cell) in zip(fakes, asked, strict=True):
        fake.ask(x, cell)
    for fake, (x, _) in zip(fakes, asked, strict=True):
        expect(fake.forces(1, x.shape[1]), x)
        fake.say(wire.EXIT)
    assert serving.join() == "exit"
    assert handler.sizes == [1, 1, 1]


def test_other_connections_are_read_while_the_handler_works(make: Callable[[int], list[FakeIpi]]):
    fakes = make(2)
    handler, gate = Harmonic(K), threading.Event()

    def slow(request: Request) -> Reply:
        gate.wait(30.0)
        return handler(request)

    serving = Serving(client(fakes, slow))
    for fake in fakes:
        fake.initialise()
    fakes[0].ask(*frames(1))
    time.sleep(0.4)  # past the gather window: the handler is at work
    big, cell = frames(1, atoms=100_000)  # 2.4 MB: more than a socket's buffer
    assert fakes[1].peer is not None
    fakes[1].peer.settimeout(10.0)
    fakes[1].ask(big, cell)
    assert handler.sizes == []
    gate.set()
    fakes[1].peer.settimeout(30.0)
    expect(fakes[1].forces(1, 100_000), big)
    fakes[1].say(wire.EXIT)
    fakes[0].close()
    assert isinstance(serving.join(), IpiGone)  # one i-PI died


def test_error_of_one_connection_hangs_up_all(make: Callable[[int], list[FakeIpi]]):
    fakes = make(2)
    serving = Serving(client(fakes, Harmonic(K)))
    for fake in fakes:
        fake.initialise()
    fakes[0].say(b"NONSENSE    ")
    assert fakes[1].hear(12) == b""
    assert isinstance(serving.join(), ProtocolError)
    for fake in fakes:
        fake.close()


@pytest.mark.parametrize("count", [1, 2])
def test_close_from_another_thread_ends_serving_at_once(make: Callable[[int], list[FakeIpi]], count: int):
    fakes = make(count)
    closing = client(fakes, Harmonic(K), reconnects=3)
    serving = Serving(closing)
    for fake in fakes:
        fake.initialise()
    closing.close()
    closing.close()
    assert serving.join() == "closed"
    assert all(fake.hear(12) == b"" for fake in fakes)


@pytest.mark.parametrize("count", [1, 2])
def test_close_in_a_signal_handler_ends_serving_at_once(make: Callable[[int], list[FakeIpi]], count: int):
    fakes = make(count)
    closing = client(fakes, Harmonic(K), reconnects=3)
    before = signal.signal(signal.SIGUSR1, lambda *_: closing.close())
    main = threading.main_thread().ident
    assert main is not None
    script = threading.Thread(target=lambda: ([fake.initialise() for fake in fakes], signal.pthread_kill(main, signal.SIGUSR1)))
    try:
        script.start()
        assert closing.serve() == "closed"
    finally:
        signal.signal(signal.SIGUSR1, before)
        script.join()


@pytest.mark.parametrize("count", [1, 2])
def test_keyboard_interrupt_while_waiting_hangs_up_at_once(make: Callable[[int], list[FakeIpi]], count: int):
    fakes = make(count)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
    main = threading.main_thread().ident
    assert main is not None
    script = threading.Thread(target=lambda: ([fake.initialise() for fake in fakes], signal.pthread_kill(main, signal.SIGINT)))
    script.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            client(fakes, Harmonic(K), reconnects=3).serve()
    finally:
        signal.signal(signal.SIGINT, before)
    script.join()
    assert all(fake.hear(12) == b"" for fake in fakes)


def test_client_without_an_endpoint_says_so():
    with pytest.raises(ConfigError, match="no endpoint"):
        client([], Harmonic(K))


def test_close_while_the_handler_works_lets_ipi_go_before_it_ends(ipi: FakeIpi):
    gate = threading.Event()
    toy = Harmonic(K)
    closing = client([ipi], lambda request: (gate.wait(30.0), toy(request))[1])
    serving = Serving(closing)
    ipi.initialise()
    ipi.ask(*frames(1))
    time.sleep(0.1)
    closing.close()
    assert ipi.hear(12) == b""
    gate.set()
    assert serving.join() == "closed"


def test_an_ipi_that_lives_and_says_nothing_is_given_up(ipi: FakeIpi):
    lonely = Client(
        [ipi.endpoint],
        Harmonic(K),
        shared_memory=False,
        connect_timeout=20.0,
        reconnects=9,
        gather_seconds=0.0,
        silence_timeout=0.3,
    )
    serving = Serving(lonely)
    ipi.initialise()
    begin = time.monotonic()
    outcome = serving.join()
    assert isinstance(outcome, IpiGone)
    assert "nothing for 0.3 s" in str(outcome)
    assert "silence_timeout" in str(outcome)
    assert time.monotonic() - begin < 15.0


def impatient(ipi: FakeIpi, handler: Callable[[Request], Reply]) -> Serving:
    return Serving(
        Client(
            [ipi.endpoint], handler, shared_memory=False, connect_timeout=20.0, reconnects=9, gather_seconds=0.0, silence_timeout=0.3
        )
    )  # fmt: skip


def test_an_ipi_that_stops_amid_a_message_is_given_up(ipi: FakeIpi):
    serving = impatient(ipi, Harmonic(K))
    ipi.initialise()
    x, cell = frames(1)
    ipi.say(wire.pack_posdata(x, cell, False)[:-5])
    outcome = serving.join()
    assert isinstance(outcome, IpiGone)
    assert "sent a part of a message and no more for 0.3 s" in str(outcome)


def test_an_ipi_that_takes_no_reply_is_given_up(ipi: FakeIpi):
    serving = impatient(ipi, Harmonic(K))
    ipi.initialise()
    x, cell = frames(1, atoms=200_000)  # a reply of 4.8 MB, which no buffer of a socket holds
    ipi.ask(x, cell)
    outcome = serving.join()
    assert isinstance(outcome, IpiGone)
    assert "taken only a part of a reply for 0.3 s" in str(outcome)


def test_a_silence_that_is_ours_is_no_silence_of_ipi(make: Callable[[int], list[FakeIpi]]):
    busy, idle = make(2)

    def slow(request: Request) -> Reply:
        time.sleep(3.0)
        return Harmonic(K)(request)

    both = Client(
        [busy.endpoint, idle.endpoint],
        slow,
        shared_memory=False,
        connect_timeout=20.0,
        reconnects=0,
        gather_seconds=0.0,
        silence_timeout=2.0,
    )
    serving = Serving(both)
    for fake in (busy, idle):
        fake.initialise()
    x, cell = frames(1)
    busy.ask(x, cell)
    expect(busy.forces(1, 4), x)
    for fake in (busy, idle):
        fake.say(wire.EXIT)
        fake.server.close()
    assert serving.join() == "exit"


def test_a_reply_that_was_lost_on_the_way_is_sent_again_and_not_computed_again(ipi: FakeIpi):
    handler = Harmonic(K)
    serving = Serving(client([ipi], handler, reconnects=3))
    ipi.initialise()
    x, cell = frames(1)
    ipi.ask(x, cell)
    assert ipi.hear(20)[:12] == b"FORCEREADY  "  # the connection breaks in the middle of the reply
    ipi.initialise()
    ipi.ask(x, cell)
    expect(ipi.forces(1, 4), x)
    assert handler.sizes == [1]
    ipi.ask(x, cell)  # the same structure as a step of its own is a step
    expect(ipi.forces(1, 4), x)
    assert handler.sizes == [1, 1]
    ipi.say(wire.EXIT)
    ipi.server.close()
    assert serving.join() == "exit"
