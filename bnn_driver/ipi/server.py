"""The server's side, for one code that is an i-PI client: positions out, energy, forces and virial back.

The strict order of old i-PI (STATUS, INIT, STATUS, POSDATA, STATUS, GETFORCE, one message at a time), which every code knows.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from bnn_driver.errors import IpiGone, OracleCrashed, OracleError, OracleInconsistent, OracleTimeout, ProtocolError
from bnn_driver.ipi import wire
from bnn_driver.ipi.transport import Channel, Endpoint, Listener, accept, listen
from bnn_driver.records import Array

log = logging.getLogger(__name__)

ALIVE_SECONDS = 0.2  # how often a waiting server looks whether the code still runs


def unique_endpoint(prefix: str) -> Endpoint:
    """A Unix socket that no other job of any user has: `prefix` + 16 random hexadecimal digits."""
    return Endpoint("unix", uuid.uuid4().hex[:16], prefix=prefix)


class ForceServer:
    """Serves one client code; a context manager, whose end tells the code to EXIT."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        parameters: str,
        connect_timeout: float,
        frame_timeout: float,
        alive: Callable[[], bool],
    ) -> None:
        """Nothing is opened yet.

        Args: endpoint: where to listen; inet port 0 takes a free one.   parameters: text of INIT.
            connect_timeout: s for the code to start and connect.   frame_timeout: s for each calculation.
            alive: whether the code's process still runs, so that its death is noticed at once.
        """
        self.endpoint = endpoint
        self._parameters = parameters
        self._connect_timeout = connect_timeout
        self._frame_timeout = frame_timeout
        self._alive = alive
        self._server: Listener | None = None
        self._channel: Channel | None = None

    def __enter__(self) -> Self:
        """Listen.  Raises: EnvironmentProblem when the address is taken."""
        self._server, self.endpoint = listen(self.endpoint)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """EXIT to the code, close, remove the socket file; never waits for the code."""
        self._drop(say_exit=True)
        if self._server is not None:
            self._server.close()
            self._server = None
        if self.endpoint.kind == "unix":
            Path(self.endpoint.path).unlink(missing_ok=True)

    def _drop(self, say_exit: bool) -> None:
        if self._channel is not None:
            if say_exit:
                with contextlib.suppress(IpiGone, TimeoutError):
                    self._channel.write(wire.EXIT, seconds=1.0)
            self._channel.close()
            self._channel = None
        self._refuse_others()

    def _refuse_others(self) -> bool:
        """Close what else has connected: it must not be taken for the code that is started next."""
        refused = False
        while self._server is not None and (other := accept(self._server, 0.0, "another client")) is not None:
            other.close()
            refused = True
        return refused

    def compute(self, positions: Array, cell: Array) -> tuple[float, Array, Array, str]:
        """One calculation.

        Args: positions: (A, 3) Å.   cell: (3, 3) Å, vectors in rows; a molecule needs a box too.
        Returns: energy eV, forces (A, 3) eV/Å, virial (3, 3) eV (W = Σ f⊗r), extras.
        Raises: OracleTimeout past connect_timeout or frame_timeout; OracleCrashed when the code left;
            OracleInconsistent for a result of the wrong size or not finite, a broken protocol, or a second client.  The
            connection is dropped then: the code has to be started again.
        """
        try:
            channel = self.connect()
            result = self._exchange(channel, positions, cell)
            if self._refuse_others():
                raise OracleInconsistent(
                    f"two clients connected to {self.endpoint}, expected one: is a serial program started by mpirun or srun? "
                    "Its ranks write one log, so nothing says which of them converged"
                )
            return result
        except (IpiGone, OracleError) as error:
            self._drop(say_exit=not isinstance(error, IpiGone))
            if isinstance(error, ProtocolError):
                raise OracleInconsistent(f"the code at {self.endpoint} broke the i-PI protocol: {error}") from error
            if isinstance(error, IpiGone):
                raise OracleCrashed(f"the code at {self.endpoint} left in a calculation ({error}); see its output") from error
            raise

    def connect(self) -> Channel:
        """Wait until the code has connected; at once when it has.  Raises: OracleTimeout, OracleCrashed."""
        if self._server is None:
            raise OracleCrashed("the server is not open: use it in a `with` block")
        end = time.monotonic() + self._connect_timeout
        while self._channel is None:
            self._channel = accept(self._server, ALIVE_SECONDS, f"the code at {self.endpoint}")
            if self._channel is None:
                self._check_alive()
                if time.monotonic() > end:
                    raise self._too_slow(f"connect within {self._connect_timeout:g} s")
        return self._channel

    def _check_alive(self) -> None:
        if not self._alive():
            raise OracleCrashed(f"the code at {self.endpoint} ended by itself; see its output")

    def _exchange(self, channel: Channel, positions: Array, cell: Array) -> tuple[float, Array, Array, str]:
        end = time.monotonic() + self._frame_timeout
        while (status := self._status(channel, end)) != wire.READY:
            if status != wire.NEEDINIT:
                raise ProtocolError(f"expected NEEDINIT or READY but got {status!r}")
            self._write(channel, wire.pack_init(self._parameters), end)
        self._write(channel, wire.pack_posdata(positions[None], cell[None], batched=False), end)
        while (status := self._status(channel, end)) != wire.HAVEDATA:
            if status != wire.READY:  # some codes answer READY until they have read the positions
                raise ProtocolError(f"expected HAVEDATA but got {status!r}")
            time.sleep(0.001)
        self._write(channel, wire.GETFORCE, end)
        return self._result(channel, len(positions), end)

    def _status(self, channel: Channel, end: float) -> bytes:
        self._write(channel, wire.STATUS, end)
        return self._read(channel, wire.HEADER_SIZE, end)

    def _write(self, channel: Channel, data: bytes, end: float) -> None:
        self._check_time(end)  # also for a code that answers every STATUS at once, for ever
        try:
            channel.write(data, max(0.01, end - time.monotonic()))
        except TimeoutError:
            raise self._too_slow(f"finish within {self._frame_timeout:g} s") from None
        except IpiGone:
            self._check_time(end)
            raise

    def _check_time(self, end: float) -> None:
        if time.monotonic() >= end:
            raise self._too_slow(f"finish within {self._frame_timeout:g} s")

    def _too_slow(self, what: str) -> OracleTimeout:
        return OracleTimeout(f"the code at {self.endpoint} did not {what}; see its output, or allow it more time")

    def _read(self, channel: Channel, size: int, end: float) -> bytes:
        while True:
            try:
                return channel.read(size, min(end, time.monotonic() + ALIVE_SECONDS))
            except TimeoutError:
                self._check_time(end)
                self._check_alive()

    def _result(self, channel: Channel, n_atoms: int, end: float) -> tuple[float, Array, Array, str]:
        word = self._read(channel, wire.HEADER_SIZE, end)
        if word != wire.FORCEREADY:
            raise ProtocolError(f"expected FORCEREADY but got {word!r}")
        energy = self._read(channel, 8, end)
        count = wire.unpack_int(self._read(channel, 4, end))
        if count != n_atoms:  # before room is made for that many
            raise OracleInconsistent(f"the code at {self.endpoint} returned forces of {count} atoms, but {n_atoms} were sent")
        forces, virial = self._read(channel, 24 * count, end), self._read(channel, 72, end)
        size = wire.unpack_count(self._read(channel, 4, end), "bytes of extras")
        extras = self._read(channel, size, end).decode(errors="replace")
        result = wire.decode_forces(energy, forces, virial)
        if not all(np.isfinite(part).all() for part in result):
            raise OracleInconsistent(f"the code at {self.endpoint} returned an energy, force or virial that is not finite")
        return *result, extras
