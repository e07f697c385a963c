"""A scripted i-PI: says what the test tells it to say, one message at a time, over a real Unix socket."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import numpy as np

from bnn_driver.ipi import wire
from bnn_driver.ipi.transport import Endpoint

BOHR, HARTREE = 0.5291772105638411, 27.211386024367243  # Å, eV


class FakeIpi:
    """Listens at once; `accept` takes the next connection."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = Endpoint("unix", uuid.uuid4().hex[:8], prefix=f"{folder}/")
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.server.bind(self.endpoint.path)
        self.server.listen(4)
        self.server.settimeout(30.0)
        self.peer: socket.socket | None = None
        self.segments: dict[str, shared_memory.SharedMemory] = {}

    def accept(self) -> socket.socket:
        if self.peer is not None:
            self.peer.close()
        self.peer, _ = self.server.accept()
        self.peer.settimeout(30.0)
        return self.peer

    def close(self) -> None:
        """Leave without a word."""
        for sock in (self.peer, self.server):
            if sock is not None:
                sock.close()
        with contextlib.suppress(OSError):
            os.unlink(self.endpoint.path)
        for segment in self.segments.values():
            segment.close()
            resource_tracker.register(segment._name, "shared_memory")  # type: ignore[attr-defined]  # the client took it off the list
            segment.unlink()
        self.segments = {}

    def say(self, data: bytes) -> None:
        assert self.peer is not None
        self.peer.sendall(data)

    def hear(self, size: int) -> bytes:
        """Exactly `size` bytes; fewer when the peer has left."""
        assert self.peer is not None
        data = b""
        while len(data) < size and (part := self.peer.recv(size - len(data))):
            data += part
        return data

    def status(self) -> bytes:
        self.say(wire.STATUS)
        return self.hear(12)

    def initialise(self, parameters: str = " ") -> None:
        """Accept, learn that INIT is needed, send it."""
        self.accept()
        assert self.status() == wire.NEEDINIT
        self.say(wire.pack_init(parameters))
        assert self.status() == wire.READY

    def ask(self, positions: np.ndarray, cell: np.ndarray, batched: bool = False) -> None:
        """POSDATA and GETFORCE in one send, as i-PI's default."""
        self.say(wire.pack_posdata(positions, cell, batched) + wire.GETFORCE)

    def forces(self, count: int, atoms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """The reply in eV and Å, read by the layout of i-PI's documentation and not by our code."""
        assert self.hear(12) == b"FORCEREADY  "
        energy = np.frombuffer(self.hear(8 * count)) * HARTREE
        assert np.frombuffer(self.hear(4), np.int32)[0] == atoms
        forces = np.frombuffer(self.hear(24 * atoms * count)).reshape(count, atoms, 3) * (HARTREE / BOHR)
        virial = np.frombuffer(self.hear(72 * count)).reshape(count, 3, 3) * HARTREE
        return energy, forces, virial, self.extras(count)

    def extras(self, count: int) -> list[str]:
        return [self.hear(int(np.frombuffer(self.hear(4), np.int32)[0])).decode() for _ in range(count)]

    def share(self, batch: int, atoms: int) -> dict[str, np.ndarray]:
        """Make i-PI's six segments."""
        width = {"pos": 3 * atoms, "h": 9, "ih": 9, "pot": 1, "force": 3 * atoms, "vir": 9}
        arrays = {}
        for kind, n in width.items():
            name = f"fake_{uuid.uuid4().hex[:8]}_{kind}"
            self.segments[kind] = shared_memory.SharedMemory(create=True, size=8 * batch * n, name=name)
            arrays[kind] = np.ndarray((batch, n), np.float64, buffer=self.segments[kind].buf)
        return arrays

    def segment_names(self) -> bytes:
        names = [self.segments[kind].name.encode() for kind in ("pos", "h", "ih", "pot", "force", "vir")]
        return b"".join(np.int32(len(name)).tobytes() + name for name in names)
