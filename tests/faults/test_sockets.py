"""A socket cut in the middle of a message, and a client that sends garbage to our server side."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sysconfig
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from campaign import LIMIT, TIMES, Place, Table
from verify import check

from bnn_driver.errors import OracleCrashed, OracleInconsistent, OracleTimeout
from bnn_driver.ipi import wire
from bnn_driver.ipi.server import ForceServer, unique_endpoint
from bnn_driver.ipi.transport import Channel, connect

SEED = int(os.environ.get("BNN_FAULTS_SEED", "5"))


class Relay:
    """Between i-PI and the driver; cuts both sides after so many bytes of one direction, as often as there are cuts left."""

    def __init__(self, ipi: str, cuts: list[tuple[str, int]]) -> None:
        self.ipi, self.path = ipi, f"/tmp/ipi_relay-{uuid.uuid4().hex[:12]}"
        self.cuts, self.made = list(cuts), 0
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(self.path)
        self._server.listen(4)
        self._server.settimeout(0.1)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        self._server.close()
        os.unlink(self.path)

    def _serve(self) -> None:
        while not self._done.is_set():
            try:
                driver, _ = self._server.accept()
            except TimeoutError:
                continue
            with driver, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as ipi:
                try:
                    ipi.connect(self.ipi)
                except OSError:
                    if self.made:  # i-PI has ended
                        self._server.close()
                        return
                    continue
                self._pass_on(driver, ipi)

    def _pass_on(self, driver: socket.socket, ipi: socket.socket) -> None:
        side, left = self.cuts[0] if self.cuts else ("", 0)
        other = {driver: ipi, ipi: driver}
        while not self._done.is_set():
            for source in select.select([driver, ipi], [], [], 0.1)[0]:
                try:
                    data = source.recv(1 << 16)
                    counted = (side == "driver" and source is driver) or (side == "i-PI" and source is ipi)
                    if counted and len(data) >= left:
                        other[source].sendall(data[:left])
                        self.cuts.pop(0)
                        self.made += 1
                        return
                    left -= len(data) if counted else 0
                    other[source].sendall(data)
                except OSError:
                    return
                if not data:
                    return


@dataclass(frozen=True)
class CutSocket:
    """The connection breaks at random bytes of either direction; `serve` makes it again and i-PI asks again."""

    name: str
    seed: int

    def attack(self, folder: Path) -> None:
        """An i-PI of the user, a relay that cuts, and the driver."""
        rng = np.random.default_rng((SEED, self.seed))
        place = Place(folder, steps=16)
        place.edit("[ipi]", "[ipi]\nreconnects = 30")
        # one reply with its extras is some 3000 bytes, one request some 300
        cuts = [
            ("driver", int(rng.integers(12, 6000))) if rng.random() < 0.6 else ("i-PI", int(rng.integers(12, 900)))
            for _ in range(5)
        ]
        text = (folder / "input.xml").read_text()
        name = text.split("<address>")[1].split("<")[0]
        outputs = place.run / "ipi"
        outputs.mkdir(parents=True)
        for file in ("input.xml", "init.xyz"):
            (outputs / file).write_text((folder / file).read_text())
        script = Path(sysconfig.get_path("scripts")) / "i-pi"
        with (folder / "ipi.log").open("w") as log:
            ipi = subprocess.Popen([script, "input.xml"], cwd=outputs, stdout=log, stderr=log)
        relay = Relay(f"/tmp/ipi_{name}", cuts)
        try:
            self._drive(place, relay)
            assert ipi.wait(LIMIT) == 0
        finally:
            relay.close()
            ipi.kill()
            ipi.wait()
        check(place)

    def _drive(self, place: Place, relay: Relay) -> None:
        address = relay.path.removeprefix("/tmp/ipi_")
        time.sleep(0.5)
        code, said = place.end(place.start(arguments=("serve", "-u", "-a", address, str(place.config))))
        assert code == 0, said
        assert "Traceback" not in said, said
        assert relay.made >= 3, f"only {relay.made} cuts were made"
        row = "socket cut mid-message"
        Table.attempt(row, relay.made)
        place.hits.extend([row] * relay.made)


@pytest.mark.ipi
@pytest.mark.parametrize("trial", [CutSocket(f"cut {n}", n) for n in range(TIMES)], ids=lambda trial: trial.name)
def test_a_connection_cut_in_the_middle_of_a_message_is_made_again(trials: dict[str, Future[None]], trial: CutSocket) -> None:
    trials[trial.name].result()


def garbage(rng: np.random.Generator) -> bytes:
    """What a confused or foreign program might send."""
    noise = rng.bytes(int(rng.integers(1, 400)))
    begun = wire.READY + wire.HAVEDATA + wire.FORCEREADY
    energy, atoms, nothing = np.zeros(1).tobytes(), wire.pack_int(3), wire.pack_int(0)
    body = energy + atoms + np.zeros(18).tobytes() + nothing
    match rng.integers(6):
        case 0:
            return noise
        case 1:
            return b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        case 2:
            return begun + energy + wire.pack_int(int(rng.integers(4, 2**31 - 1)) * (-1) ** int(rng.integers(2)))
        case 3:
            return begun + body[: rng.integers(len(body))]
        case 4:
            return begun + energy + atoms + np.full(18, np.nan).tobytes() + nothing
        case _:
            return wire.READY + noise


@contextmanager
def confused_client(path_of: ForceServer, data: bytes) -> Iterator[None]:
    """Connects, sends at once all it has, and leaves."""

    def run() -> None:
        channel: Channel = connect(path_of.endpoint, 3.0)
        try:
            channel.write(data, 1.0)
            time.sleep(0.05)
        finally:
            channel.close()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(10.0)


@pytest.mark.parametrize("number", range(40 * TIMES))
def test_garbage_never_becomes_a_label(tmp_path: Path, number: int) -> None:
    row = "garbage from a client to our server side"
    Table.attempt(row)
    rng = np.random.default_rng((SEED, number))
    server = ForceServer(
        unique_endpoint(f"{tmp_path}/"), parameters=" ", connect_timeout=5.0, frame_timeout=2.0, alive=lambda: True
    )
    begin = time.monotonic()
    with server, confused_client(server, garbage(rng)):
        with pytest.raises((OracleInconsistent, OracleCrashed, OracleTimeout)):
            server.compute(np.zeros((3, 3)) + np.arange(3)[:, None], 10 * np.eye(3))
    assert time.monotonic() - begin < 10
    assert not Path(server.endpoint.path).exists()
    Table.survive(row)
