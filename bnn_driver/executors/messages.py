"""What driver, workers and children say to each other: JSON, on a pipe after 8 bytes of length (big endian)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import struct
import time
from typing import Any

import numpy as np

from bnn_driver import errors
from bnn_driver.errors import BnnError, OracleCrashed
from bnn_driver.records import Frames

_LENGTH = struct.Struct("!Q")


def send(descriptor: int, message: dict[str, Any], deadline: float | None = None) -> None:
    """Write one message.  deadline: by time.monotonic().  Raises: TimeoutError; BrokenPipeError if nobody reads."""
    body = json.dumps(message).encode()
    data = memoryview(_LENGTH.pack(len(body)) + body)
    while data:
        _wait(descriptor, select.POLLOUT, deadline)
        with contextlib.suppress(BlockingIOError):
            data = data[os.write(descriptor, data) :]


def receive(descriptor: int, deadline: float | None = None) -> dict[str, Any]:
    """Read one message.  Raises: TimeoutError; EOFError if the other side is gone."""
    (length,) = _LENGTH.unpack(_read(descriptor, _LENGTH.size, deadline))
    message: dict[str, Any] = json.loads(_read(descriptor, length, deadline))
    return message


def _read(descriptor: int, length: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < length:
        _wait(descriptor, select.POLLIN, deadline)
        part = os.read(descriptor, min(length - len(data), 1 << 20))
        if not part:
            raise EOFError(f"the other side is gone after {len(data)} of {length} bytes")
        data += part
    return bytes(data)


def _wait(descriptor: int, event: int, deadline: float | None) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1e3
    if not poll.poll(left):
        raise TimeoutError


def frame_to_facts(frame: Frames) -> dict[str, Any]:
    """JSON-able, exact."""
    return {
        "numbers": frame.numbers.tolist(),
        "positions": frame.positions.tolist(),
        "cell": None if frame.cell is None else frame.cell.tolist(),
        "charge": frame.charge,
        "multiplicity": frame.multiplicity,
    }


def frame_from_facts(facts: dict[str, Any]) -> Frames:
    """Inverse of `frame_to_facts`."""
    cell = None if facts["cell"] is None else np.array(facts["cell"], dtype=float)
    positions = np.array(facts["positions"], dtype=float)
    return Frames(np.array(facts["numbers"], dtype=int), positions, cell, facts["charge"], facts["multiplicity"])


def error_to_facts(error: Exception) -> dict[str, str]:
    """Class and message of an error that has to cross a process."""
    return {"error": type(error).__name__, "message": str(error)}


def error_from_facts(facts: dict[str, Any]) -> BnnError | None:
    """The error of an answer; None if the answer has none, and OracleCrashed for classes that are not ours."""
    if "error" not in facts:
        return None
    kind = getattr(errors, facts["error"], None)
    if isinstance(kind, type) and issubclass(kind, BnnError):
        return kind(facts["message"])
    return OracleCrashed(f"the oracle raised {facts['error']}: {facts['message']}")
