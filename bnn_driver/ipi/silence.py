"""How long i-PI may say nothing: no wait of the driver is without a limit."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from bnn_driver.errors import IpiGone
from bnn_driver.ipi.transport import Channel

CHECK_SECONDS = 1.0
"""How often a waiting connection looks how long it has been, and whether a signal came just before the wait began."""


class Hung(IpiGone):
    """i-PI lives and says nothing: no reason to connect again."""


class Silence:
    """The time without a word on any connection while it was not this side that i-PI waited for, or amid a message."""

    def __init__(self, limit: float = float("inf")) -> None:
        """Args: limit: s."""
        self._limit = limit
        self._since = time.monotonic()
        self._computing = False

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """While i-PI waits for us it has nothing to say."""
        self._computing = True
        try:
            yield
        finally:
            self._since = time.monotonic()
            self._computing = False

    def await_word(self, channel: Channel) -> None:
        """Return when something can be read.  Raises: Hung when that takes too long; IpiGone."""
        while not channel.readable(min(self._limit, CHECK_SECONDS)):
            if not self._computing and time.monotonic() - self._since >= self._limit:
                raise Hung(
                    f"{channel.name} has said nothing for {self._limit:g} s: it hangs, or another force provider of its input takes "
                    "longer than that; see its log, and raise [ipi] silence_timeout if all is well"
                )
        self._since = time.monotonic()

    def read(self, channel: Channel, size: int) -> bytes:
        """Exactly `size` bytes of a message that has begun.  Raises: Hung when they do not all come in time; IpiGone."""
        deadline = None if math.isinf(self._limit) else time.monotonic() + self._limit
        try:
            return channel.read(size, deadline)
        except TimeoutError:
            raise self._stuck(channel, "sent a part of a message and no more") from None

    def write(self, channel: Channel, data: bytes) -> None:
        """All of `data`.  Raises: Hung when the other side does not take it in time; IpiGone."""
        try:
            channel.write(data, None if math.isinf(self._limit) else self._limit)
        except TimeoutError:
            raise self._stuck(channel, "taken only a part of a reply") from None

    def _stuck(self, channel: Channel, what: str) -> Hung:
        return Hung(
            f"{channel.name} has {what} for {self._limit:g} s ([ipi] silence_timeout): it hangs or was stopped; see its log"
        )
