"""The driver as i-PI's client: any number of connections around one function Request -> Reply.

One connection is served in the calling thread.  With more, each has a thread that always reads (i-PI drops a client that does
not read for 0.6 s), and what is asked at the same time is gathered into one call of the function, in the calling thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from bnn_driver.errors import ConfigError, IpiGone, ProtocolError
from bnn_driver.ipi.connection import Answer, Asked, Connection
from bnn_driver.ipi.replies import Reply, ReplyCheck, Request
from bnn_driver.ipi.silence import Hung, Silence
from bnn_driver.ipi.transport import Endpoint, connect
from bnn_driver.records import Array

__all__ = ["Client", "Reply", "Request"]

log = logging.getLogger(__name__)

GRACE_SECONDS = 1.0  # how long a lost i-PI may take to listen again
EXIT_SECONDS = 0.1  # between EXIT and looking whether i-PI still listens: it closes its socket right after
WAKE_SECONDS = 0.2  # how often a waiting thread looks whether the client is closing, or a signal came
JOIN_SECONDS = 5.0

Row = tuple[Array, Array, Array, str]  # energy (), forces (A, 3), virial (3, 3) and extras of one structure


class Client:
    """Serves i-PI until it says EXIT."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        handler: Callable[[Request], Reply],
        *,
        shared_memory: bool,
        connect_timeout: float,
        reconnects: int,
        gather_seconds: float,
        silence_timeout: float = float("inf"),
    ) -> None:
        """Nothing is connected yet.

        Args: endpoints: one connection each; naming one twice gives i-PI two clients.   handler: called with distinct
            structures only.   shared_memory: i-PI's mode='shm'.   connect_timeout: s to wait for i-PI to listen.
            reconnects: how often in a row a lost connection is made again before IpiGone.
            gather_seconds: how long a request waits for those of the other connections.
            silence_timeout: s without a word on any connection, while nothing is computed, after which i-PI is taken for hung.
        Raises: ConfigError without an endpoint.
        """
        if not endpoints:
            raise ConfigError("the client got no endpoint: name at least one socket of i-PI")
        self._handler = handler
        self._gather_seconds = gather_seconds
        self._connect_timeout = connect_timeout
        self._silence = Silence(silence_timeout)
        self._links = [_Link(endpoint, shared_memory, reconnects, self._is_closing, self._silence) for endpoint in endpoints]
        self._check = ReplyCheck()
        self._closed_by_caller = False
        self._closing = False
        self._serving = False

    def _is_closing(self) -> bool:
        return self._closing or self._closed_by_caller

    def serve(self) -> str:
        """Answer i-PI until all connections have ended: "exit" after EXIT, "closed" after `close`.

        Raises: IpiGone when i-PI never came or is gone without EXIT; what the handler raises; GuardStop and BnnError for a
            reply that must not be sent.  The connections are closed first, so that i-PI can end and write its RESTART.
        """
        self._serving, self._closing = True, False
        try:
            if len(self._links) == 1:
                self._serve_one(self._links[0])
            else:
                self._serve_many()
        except IpiGone:
            if not self._closed_by_caller:
                raise
        finally:
            self._serving = False
            self._hang_up()
        return "closed" if self._closed_by_caller else "exit"

    def close(self) -> None:
        """Hang up at once and serve no more; safe in a signal handler, in another thread, and more than once."""
        self._closed_by_caller = True
        self._hang_up()

    def _hang_up(self) -> None:
        self._closing = True
        for link in self._links:
            link.hang_up()
            if not self._serving:
                link.close()

    def _serve_one(self, link: _Link) -> None:
        link.open(self._connect_timeout)
        while (asked := link.receive()) is not None:
            answer = self._compute([asked])[0]
            link.undelivered = {}  # i-PI has asked again, or has gone on
            link.answer(asked, answer)

    def _serve_many(self) -> None:
        inbox: queue.SimpleQueue[_Ticket | _Ended] = queue.SimpleQueue()
        readers = [threading.Thread(target=_read, args=(link, inbox, self._connect_timeout), daemon=True) for link in self._links]
        for reader in readers:
            reader.start()
        try:
            live = len(readers)
            while live:
                tickets, ended = self._gather(inbox, live)
                live -= ended
                if tickets:
                    for ticket, answer in zip(tickets, self._compute([t.asked for t in tickets]), strict=True):
                        ticket.answer.set_result(answer)
        finally:
            self._hang_up()
            for reader in readers:
                reader.join(JOIN_SECONDS)

    def _gather(self, inbox: queue.SimpleQueue[_Ticket | _Ended], live: int) -> tuple[list[_Ticket], int]:
        """What is asked within the window, at most one per live connection, and how many connections ended meanwhile."""
        tickets: list[_Ticket] = []
        ended = 0
        item = self._next(inbox)
        end = time.monotonic() + self._gather_seconds
        while True:
            if isinstance(item, _Ticket):
                tickets.append(item)
            elif item.error is not None:
                raise item.error
            else:
                ended += 1
            if len(tickets) + ended == live:
                return tickets, ended
            try:
                item = inbox.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return tickets, ended

    def _next(self, inbox: queue.SimpleQueue[_Ticket | _Ended]) -> _Ticket | _Ended:
        """The next item; a signal that comes just before the wait begins would otherwise be handled at the end of the wait."""
        while True:
            with contextlib.suppress(queue.Empty):
                return inbox.get(timeout=WAKE_SECONDS)

    def _compute(self, asked: Sequence[Asked]) -> list[Answer]:
        """One answer for each, from one call of the handler per set of equal atom count and parameters."""
        answers: dict[int, Answer] = {}
        groups: dict[tuple[int, str], list[int]] = {}
        for i, item in enumerate(asked):
            groups.setdefault((item.positions.shape[1], item.parameters), []).append(i)
        for members in groups.values():
            together = _join([asked[i] for i in members])
            answer = self._answer(together)
            start = 0
            for i in members:
                stop = start + len(asked[i].positions)
                answers[i] = _rows(answer, slice(start, stop)) if len(members) > 1 else answer
                start = stop
        return [answers[i] for i in range(len(asked))]

    def _answer(self, asked: Asked) -> Answer:
        """The handler's answer, asked for every distinct structure once and not for those computed but never delivered."""
        if len(asked.positions) == 1 and not any(link.undelivered for link in self._links):
            reply = self._ask(asked.positions, asked.cell, asked.parameters, 1, 0)
            return Answer(reply.energy, reply.forces, reply.virial, reply.extras)
        keys = _keys(asked)
        known: dict[bytes, Row] = {}
        for link in self._links:
            known.update({key: link.undelivered.pop(key) for key in dict.fromkeys(keys) if key in link.undelivered})
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in known}
        new = sorted(first.values())
        if new:
            rows = sum(key not in known for key in keys)
            reply = self._ask(asked.positions[new], asked.cell[new], asked.parameters, rows, _repeated_at_the_end(keys))
            if not known and len(new) == len(keys):
                return Answer(reply.energy, reply.forces, reply.virial, reply.extras)
            known.update({keys[i]: row for i, row in zip(new, _split(reply), strict=True)})
        energy, forces, virial, extras = zip(*(known[key] for key in keys), strict=True)
        return Answer(np.array(energy), np.array(forces), np.array(virial), extras)

    def _ask(self, positions: Array, cell: Array, parameters: str, rows: int, padding: int) -> Reply:
        request = Request(positions, cell, parameters, rows, padding)
        with self._silence.ours():
            return self._check(request, self._handler(request))


class _Link:
    """One endpoint: its connection, and how it is made again."""

    def __init__(
        self, endpoint: Endpoint, shared_memory: bool, reconnects: int, closing: Callable[[], bool], silence: Silence
    ) -> None:
        self.endpoint = endpoint
        self.undelivered: dict[bytes, Row] = {}
        """Results that i-PI may not have got when the connection ended: it asks for the same structures again."""
        self._sent: tuple[Asked, Answer] | None = None
        self._shared_memory = shared_memory
        self._silence = silence
        self._reconnects = reconnects
        self.is_closing = closing
        self._connection: Connection | None = None
        self._lost = 0
        self._exit_said = False

    def open(self, seconds: float) -> None:
        """Connect within `seconds`.  Raises: IpiGone."""
        if self.is_closing():
            return
        self._connection = Connection(connect(self.endpoint, seconds, self.is_closing), self._shared_memory, self._silence)
        log.info("connected to i-PI at %s", self.endpoint)
        if self.is_closing():
            self.close()

    def receive(self) -> Asked | None:
        """The next structures; None when i-PI has ended, or this side is closing.  Raises: IpiGone."""
        while self._connection is not None and not self.is_closing():
            try:
                asked = self._connection.receive()
            except (ProtocolError, Hung):
                raise
            except IpiGone as error:
                # what was written last may have been lost on the way
                if self._sent is not None:
                    self.undelivered, self._sent = _rows_of(*self._sent), None
                # closed before it was taken up, after EXIT: i-PI was already on its way out
                self._again(None if self._exit_said and not self._connection.spoken else error)
            else:
                self._exit_said = asked is None
                if asked is not None:
                    return asked
                self._again(None)
        return None

    def answer(self, asked: Asked, answer: Answer) -> None:
        """Send the results; when i-PI is gone they are kept for when it asks again.  Raises: IpiGone."""
        if self._connection is None or self.is_closing():
            return
        try:
            delivered = self._connection.answer(answer)
            error = None
        except (ProtocolError, Hung):
            raise
        except IpiGone as gone:
            delivered, error = False, gone
        if delivered:
            self._lost, self._sent = 0, (asked, answer)
            return
        self._exit_said = error is None
        self.undelivered = _rows_of(asked, answer)
        self._again(error)

    def _again(self, error: IpiGone | None) -> None:
        """Connect again; after EXIT (no error) only when i-PI still listens, as it does when it only dropped this client."""
        self.close()
        if self.is_closing():
            return
        self._lost += 1
        if self._lost > self._reconnects:
            if error is None:
                return
            raise IpiGone(f"{error}; given up after {self._reconnects} reconnects in a row") from error
        if error is None:
            time.sleep(EXIT_SECONDS)
        try:
            self.open(0.0 if error is None else GRACE_SECONDS)
        except IpiGone as gone:
            if error is None or self.is_closing():
                return
            raise IpiGone(f"{error}, and listens no more: i-PI has crashed or was killed; see its log") from gone
        log.warning("i-PI at %s dropped the connection (%s); connected again", self.endpoint, error or "EXIT")

    def hang_up(self) -> None:
        """End the connection; the descriptor stays for the thread that reads it."""
        if (connection := self._connection) is not None:
            connection.hang_up()

    def close(self) -> None:
        """End the connection and free it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class _Ticket:
    """One pending request of one connection."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.answer: Future[Answer] = Future()

    def wait(self, closing: Callable[[], bool]) -> Answer | None:
        """The answer; None when there will be none."""
        while not closing():
            with contextlib.suppress(TimeoutError):
                return self.answer.result(WAKE_SECONDS)
        return None


class _Ended:
    """A connection has ended, after EXIT or with an error."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _read(link: _Link, inbox: queue.SimpleQueue[_Ticket | _Ended], connect_timeout: float) -> None:
    """Thread of one connection: ask, wait for the answer, send it."""
    error: BaseException | None = None
    try:
        link.open(connect_timeout)
        while (asked := link.receive()) is not None:
            ticket = _Ticket(asked)
            inbox.put(ticket)
            answer = ticket.wait(link.is_closing)
            if answer is None:
                break
            link.answer(asked, answer)
    except BaseException as caught:  # handed to the serving thread, which raises it
        error = caught
    with contextlib.suppress(OSError):
        link.close()
    inbox.put(_Ended(error))


def _join(asked: Sequence[Asked]) -> Asked:
    if len(asked) == 1:
        return asked[0]
    positions = np.concatenate([item.positions for item in asked])
    return Asked(positions, np.concatenate([item.cell for item in asked]), asked[0].parameters)


def _rows(answer: Answer, rows: slice) -> Answer:
    return Answer(answer.energy[rows], answer.forces[rows], answer.virial[rows], answer.extras[rows])


def _keys(asked: Asked) -> list[bytes]:
    """Bytes that are equal for equal structures."""
    return [x.tobytes() + h.tobytes() for x, h in zip(asked.positions, asked.cell, strict=True)]


def _repeated_at_the_end(keys: Sequence[bytes]) -> int:
    """How often the last structure is repeated directly before its last row, as i-PI pads a short batch."""
    repeated = 0
    while repeated < len(keys) - 1 and keys[-2 - repeated] == keys[-1]:
        repeated += 1
    return repeated


def _rows_of(asked: Asked, answer: Answer) -> dict[bytes, Row]:
    return dict(zip(_keys(asked), _split(answer), strict=True))


def _split(answer: Answer | Reply) -> list[Row]:
    return list(zip(answer.energy, answer.forces, answer.virial, answer.extras, strict=True))
