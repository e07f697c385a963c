"""The driver's side of one connection to i-PI: which message is answered by which, in every mode.

What keeps i-PI alive (each is a test): NEEDINIT is answered first, because only INIT tells the batch size; the header after
POSDATA is read before anything is computed, because i-PI hangs for good when a peer dies over unread bytes; a reply leaves in
one write, because i-PI gives up on a gap of 2 s inside one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnn_driver.errors import ProtocolError
from bnn_driver.ipi import wire
from bnn_driver.ipi.silence import Silence
from bnn_driver.ipi.transport import Channel, SharedArrays
from bnn_driver.records import Array
from bnn_driver.units import HARTREE, HARTREE_PER_BOHR

# i-PI sends a header right behind POSDATA (GETFORCE, or STATUS with consolidate_messages False); a server that sends none
# until it is answered is computed for after this many seconds
DRAIN_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class Asked:
    """The structures of one POSDATA as sent, padding included."""

    positions: Array
    """(B, A, 3) Å."""
    cell: Array
    """(B, 3, 3) Å, vectors in rows."""
    parameters: str
    """Text of INIT."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What goes back for one Asked, same order."""

    energy: Array
    """(B,) eV."""
    forces: Array
    """(B, A, 3) eV/Å."""
    virial: Array
    """(B, 3, 3) eV."""
    extras: Sequence[str]
    """B texts."""


class Connection:
    """State machine over one channel; `receive` and `answer` alternate."""

    def __init__(self, channel: Channel, shared_memory: bool, silence: Silence) -> None:
        self.spoken = False
        """Whether i-PI has sent anything: a connection it never took up says nothing."""
        self._channel = channel
        self._shared_memory = shared_memory
        self._silence = silence
        self._shared: SharedArrays | None = None
        self._parameters: str | None = None
        self._batch = 1
        self._pending = b""

    def _read(self, size: int) -> bytes:
        return self._silence.read(self._channel, size)

    def _write(self, data: bytes) -> None:
        self._silence.write(self._channel, data)

    def _header(self) -> bytes:
        self._silence.await_word(self._channel)
        word = self._read(wire.HEADER_SIZE)
        self.spoken = True
        return word

    def receive(self) -> Asked | None:
        """The next structures, or None when i-PI says EXIT.  Raises: IpiGone; ProtocolError for a message out of place."""
        while True:
            word = self._header()
            if word == wire.STATUS:
                self._write(wire.NEEDINIT if self._parameters is None else wire.READY)
            elif word == wire.INIT:
                self._read_init()
            elif word == wire.POSDATA:
                asked = self._read_posdata()
                self._pending = self._header() if self._channel.readable(DRAIN_SECONDS) else b""
                return None if self._pending == wire.EXIT else asked
            elif word == wire.EXIT:
                return None
            else:
                raise ProtocolError(f"expected STATUS, INIT, POSDATA or EXIT from {self._channel.name} but got {word!r}")

    def _read_init(self) -> None:
        self._read(4)  # a request id of i-PI, of no use here
        size = wire.unpack_count(self._read(4), "bytes of INIT")
        self._parameters = self._read(size).decode(errors="replace")
        self._batch = wire.batch_size(self._parameters)

    def _read_posdata(self) -> Asked:
        read = self._read
        if self._shared_memory:
            h, positions, n_atoms = self._read_shared()
        elif self._batch > 1:
            n_atoms = wire.unpack_atoms(read(4))
            h, positions = wire.split_batched_posdata(read(wire.posdata_body_size(n_atoms, self._batch)), n_atoms, self._batch)
        else:
            h = np.frombuffer(read(wire.CELLS_SIZE), np.float64)[None, :9]
            n_atoms = wire.unpack_atoms(read(4))
            positions = np.frombuffer(read(wire.posdata_body_size(n_atoms, 1)), np.float64)[None]
        x, cell = wire.decode_frames(h, positions, n_atoms)
        return Asked(x, cell, self._parameters or "")

    def _read_shared(self) -> tuple[Array, Array, int]:
        n_atoms = wire.unpack_atoms(self._read(4))
        if self._shared is None:
            names = {}
            for kind in wire.SEGMENTS:
                size = wire.unpack_count(self._read(4), "bytes of a segment's name", limit=4096)
                names[kind] = _text(self._read(size), "the name of a segment")
            self._shared = SharedArrays(names, self._batch, n_atoms)
        if n_atoms != self._shared.n_atoms:
            raise ProtocolError(f"i-PI sent {n_atoms} atoms through shared memory made for {self._shared.n_atoms}")
        return self._shared.arrays["h"], self._shared.arrays["pos"], n_atoms

    def answer(self, answer: Answer) -> bool:
        """Send the results; False when i-PI says EXIT instead of fetching them.  Raises: IpiGone, ProtocolError."""
        data = self._packed(answer)
        word = self._pending or self._header()
        while word == wire.STATUS:
            self._write(wire.HAVEDATA)
            word = self._header()
        if word == wire.EXIT:
            return False
        if word != wire.GETFORCE:
            raise ProtocolError(f"expected GETFORCE or STATUS from {self._channel.name} but got {word!r}")
        self._write(data)
        return True

    def _packed(self, answer: Answer) -> bytes:
        if self._shared is None:
            return wire.pack_forces(answer.energy, answer.forces, answer.virial, answer.extras)
        arrays = self._shared.arrays
        arrays["pot"][:, 0] = answer.energy / HARTREE
        arrays["force"][:] = answer.forces.reshape(len(answer.forces), -1) / HARTREE_PER_BOHR
        arrays["vir"][:] = answer.virial.reshape(-1, 9) / HARTREE
        return wire.FORCEREADY + wire.pack_extras(answer.extras)

    def hang_up(self) -> None:
        """End the connection at once, from any thread."""
        self._channel.hang_up()

    def close(self) -> None:
        """Hang up and free socket and shared memory."""
        self._channel.close()
        if self._shared is not None:
            self._shared.close()


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        raise ProtocolError(f"expected {what} in ASCII but got {data[:60]!r}") from error
