"""Whether an i-PI could listen at an address, or already does."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from bnn_driver.errors import ConfigError, EnvironmentProblem
from bnn_driver.ipi.transport import Endpoint, has_listener, listen

State = Literal["free", "stale", "listening", "elsewhere"]
LONGEST = 107
"""Bytes of the name of a Unix socket."""


def check_one_each(endpoints: Mapping[str, Sequence[Endpoint]]) -> None:
    """Args: endpoints: of every walker.   Raises: ConfigError when two of them listen at one address."""
    owners: dict[str, str] = {}
    for name, own in endpoints.items():
        for address in map(str, own):
            if owners.setdefault(address, name) != name:
                raise ConfigError(
                    f"walkers {owners[address]!r} and {name!r} both listen on {address}; give each an <address> of its own"
                )


def state_of(endpoint: Endpoint) -> State:
    """What is at an address: nothing, a socket file that a killed i-PI left, a program that listens, or another machine.

    A free one is bound for a moment, which shows that it can be.
    Raises: ConfigError for an address that can never work; EnvironmentProblem when it cannot be bound.
    """
    if endpoint.kind == "unix":
        path = Path(endpoint.path)
        if len(str(path).encode()) > LONGEST:
            raise ConfigError(f"the Unix socket {path} is longer than {LONGEST} bytes: shorten <address> or sockets_prefix")
        if has_listener(endpoint.path):
            return "listening"
        if path.is_socket():
            return "stale"
        if path.exists():
            raise EnvironmentProblem(f"{path} is no socket, so i-PI cannot listen there: remove it, or change <address>")
    try:
        server, _ = listen(endpoint)
    except EnvironmentProblem as error:
        number = getattr(error.__cause__, "errno", None)
        if number == errno.EADDRINUSE:
            return "listening"
        if number == errno.EADDRNOTAVAIL:
            return "elsewhere"
        raise
    server.close()
    if endpoint.kind == "unix":
        Path(endpoint.path).unlink(missing_ok=True)
    return "free"
