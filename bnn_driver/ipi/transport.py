"""Bytes over Unix sockets, TCP and shared memory: exact reads, whole writes, an end that is always noticed.

The only import of socket and shared_memory.  A peer that is gone raises IpiGone, never an endless empty read.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Literal

import numpy as np

from bnn_driver.errors import ConfigError, EnvironmentProblem, IpiGone
from bnn_driver.records import Array

READ_AHEAD = 1 << 16  # bytes asked of the kernel at once: a POSDATA comes with the header that follows it
READ_AT_ONCE = 1 << 20  # at most: room is made for what comes, never for what a message announces
Listener = socket.socket
RETRY_SECONDS = 0.05  # between two attempts to connect


@dataclass(frozen=True)
class Endpoint:
    """Where one i-PI listens."""

    kind: Literal["unix", "inet"]
    address: str
    """Name of a Unix socket, or host."""
    port: int = 0
    """TCP port; unused for unix."""
    prefix: str = "/tmp/ipi_"
    """Put before the name of a Unix socket (i-PI's sockets_prefix)."""

    @property
    def path(self) -> str:
        """File of the Unix socket."""
        return self.prefix + self.address

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.kind == "unix" else f"inet:{self.address}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Endpoint of "unix:/path/of/socket", "unix:NAME" (i-PI's prefix is added) or "inet:HOST:PORT".

        Raises: ConfigError for any other text.
        """
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest:
            return cls("unix", rest, prefix="") if "/" in rest else cls("unix", rest)
        host, _, port = rest.rpartition(":")
        if kind == "inet" and host and port.isdigit():
            return cls("inet", host, int(port))
        raise ConfigError(f'expected an endpoint as "unix:NAME", "unix:/path" or "inet:HOST:PORT" but got {text!r}')


class Channel:
    """One connected socket, read and written exactly."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.name = name
        self._socket = sock
        self._ahead = b""
        if sock.family != getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def read(self, size: int, deadline: float | None = None) -> bytes:
        """Exactly `size` bytes; takes memory for what has come, not for `size`.

        Args: deadline: time.monotonic() after which TimeoutError is raised, also while bytes trickle in; what has come is kept
            for the next read.  None waits for ever.
        Raises: IpiGone when the peer is gone; TimeoutError.
        """
        if len(self._ahead) < size:
            parts, have = [self._ahead], len(self._ahead)
            try:
                while have < size:
                    parts.append(self._receive(min(max(size - have, READ_AHEAD), READ_AT_ONCE), deadline))
                    have += len(parts[-1])
            finally:
                self._ahead = b"".join(parts)
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    def _receive(self, size: int, deadline: float | None) -> bytes:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0 or not self._has_come(left):
                raise TimeoutError(f"{self.name} did not send all of a message in time")
        try:
            data = self._socket.recv(size)
        except OSError as error:
            raise IpiGone(f"the connection to {self.name} broke: {error}") from error
        if not data:
            raise IpiGone(f"{self.name} closed the connection")
        return data

    def readable(self, seconds: float) -> bool:
        """True when a byte, or the end of the connection, can be read within `seconds`."""
        return bool(self._ahead) or self._has_come(seconds)

    def _has_come(self, seconds: float) -> bool:
        try:
            poller = select.poll()
            poller.register(self._socket, select.POLLIN)
            return bool(poller.poll(1000 * seconds))
        except (OSError, ValueError) as error:
            raise IpiGone(f"the connection to {self.name} is closed") from error

    def write(self, data: bytes, seconds: float | None = None) -> None:
        """All of `data` in one call.  Raises: IpiGone when the peer is gone; TimeoutError when it does not take it within `seconds`."""
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(data)
        except TimeoutError:
            raise TimeoutError(f"{self.name} did not take all of a message in time") from None
        except OSError as error:
            raise IpiGone(f"the connection to {self.name} broke: {error}") from error

    def hang_up(self) -> None:
        """End the connection at once; the peer reads an end of file.  Safe at any time and from any thread.

        Bytes still unread are drained: closing over them would give the peer ECONNRESET, which i-PI does not survive.
        """
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            while self._socket.recv(READ_AHEAD, socket.MSG_DONTWAIT):
                pass

    def close(self) -> None:
        """Hang up and free the file descriptor."""
        self.hang_up()
        self._socket.close()


def _open(endpoint: Endpoint, seconds: float) -> socket.socket:
    if endpoint.kind == "inet":
        sock = socket.create_connection((endpoint.address, endpoint.port), timeout=max(seconds, 0.1))
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(seconds, 0.1))
            sock.connect(endpoint.path)
        except BaseException:
            sock.close()
            raise
    sock.settimeout(None)
    return sock


def connect(endpoint: Endpoint, timeout: float, cancelled: Callable[[], bool] = lambda: False) -> Channel:
    """Connection to the i-PI at `endpoint`, tried again until `timeout` (s) is over.

    Raises: IpiGone when nobody listens in time or `cancelled` became true; ConfigError for an address that can never work.
    """
    if endpoint.kind == "unix" and len(os.fsencode(endpoint.path)) > 107:
        raise ConfigError(
            f"the Unix socket {endpoint.path} is longer than the 107 bytes allowed: shorten <address> or sockets_prefix"
        )
    end = time.monotonic() + timeout
    while True:
        try:
            return Channel(_open(endpoint, end - time.monotonic()), f"i-PI at {endpoint}")
        except socket.gaierror as error:
            raise ConfigError(f"the host {endpoint.address!r} of {endpoint} is unknown ({error}): check <address>") from error
        except OSError as error:
            if cancelled() or time.monotonic() >= end:
                reason = error.strerror or error
                raise IpiGone(
                    f"no i-PI listens at {endpoint}; waited {timeout:g} s ({reason}); start i-PI or check <address>"
                ) from error
        time.sleep(min(RETRY_SECONDS, max(0.0, end - time.monotonic())))


def listen(endpoint: Endpoint) -> tuple[socket.socket, Endpoint]:
    """Listening socket, and its endpoint with the port that was given for port 0.

    Raises: EnvironmentProblem when the address is taken.
    """
    try:
        if endpoint.kind == "inet":
            server = socket.create_server((endpoint.address, endpoint.port), backlog=4)
            return server, replace(endpoint, port=server.getsockname()[1])
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            server.bind(endpoint.path)
            server.listen(4)
        except BaseException:
            server.close()
            raise
        return server, endpoint
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot listen at {endpoint}: {error}; use another address or remove what is left there"
        ) from error


def accept(server: socket.socket, seconds: float, name: str) -> Channel | None:
    """Channel to the next peer, called `name` in messages; None when none came within `seconds` (0: none waits)."""
    server.settimeout(seconds)
    try:
        sock, _ = server.accept()
    except (TimeoutError, BlockingIOError):
        return None
    sock.settimeout(None)
    return Channel(sock, name)


def has_listener(path: str) -> bool:
    """Whether a process listens on the Unix socket file `path`.

    Linux: read from /proc/net/unix, because connecting to a live i-PI and leaving again can end it (exit_on_disconnect).
    """
    table = Path("/proc/net/unix")
    if table.exists():
        rows = (line.split(None, 7) for line in table.read_text(errors="replace").splitlines()[1:])
        return any(len(row) == 8 and row[7] == path and int(row[3], 16) & 0x10000 for row in rows)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        return probe.connect_ex(path) == 0


def remove_stale_socket(path: str) -> bool:
    """Remove a Unix socket file that nobody listens on; True when one was removed.

    Raises: EnvironmentProblem when a live process listens there.
    """
    if not Path(path).is_socket():
        return False
    if has_listener(path):
        raise EnvironmentProblem(
            f"another process already listens on {path}: stop it, or choose another <address> in the i-PI input"
        )
    Path(path).unlink(missing_ok=True)
    return True


class SharedArrays:
    """The six float64 segments that i-PI owns, as arrays of B structures of A atoms (atomic units)."""

    def __init__(self, names: dict[str, str], batch: int, n_atoms: int) -> None:
        """Attach to the segments.  Args: names: wire.SEGMENTS -> name.  Raises: EnvironmentProblem when one is missing."""
        width = {"pos": 3 * n_atoms, "h": 9, "ih": 9, "pot": 1, "force": 3 * n_atoms, "vir": 9}
        self.n_atoms = n_atoms
        self._segments: list[shared_memory.SharedMemory] = []
        self.arrays: dict[str, Array] = {}
        try:
            for kind, name in names.items():
                segment = shared_memory.SharedMemory(name=name)
                self._segments.append(segment)
                # i-PI owns it: the tracker of this process would remove it when the process ends
                resource_tracker.unregister(segment._name, "shared_memory")  # type: ignore[attr-defined]
                self.arrays[kind] = np.ndarray((batch, width[kind]), np.float64, buffer=segment.buf)
        except (OSError, TypeError, ValueError) as error:
            self.close()
            raise EnvironmentProblem(
                f"cannot attach to i-PI's shared memory {names}: {error}; mode='shm' needs driver and i-PI on one node"
            ) from error

    def close(self) -> None:
        """Detach; i-PI removes the segments."""
        self.arrays.clear()
        for segment in self._segments:
            with contextlib.suppress(BufferError):
                segment.close()
        self._segments.clear()
