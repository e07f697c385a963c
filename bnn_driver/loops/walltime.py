"""The end of the time that a start has: nothing is begun that cannot finish before it, and everything is saved in time.

The end is what --until says, or the scheduler's own.  `[run] margin` before it the run stops as it does on Ctrl-C, in whatever it
waits for: the frame in hand is not answered, so i-PI writes its RESTART of the step before, and the next start is asked for that
frame again.  A label, an audit or an update of the chains under way is begun again then; so the margin is for stopping alone, and
an asked label is begun only when, as the slowest label of this run says, it can finish.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import FrameType

from bnn_driver import units
from bnn_driver.errors import ConfigError, GuardStop, WallLimit
from bnn_driver.loops.scheduler import current_job

log = logging.getLogger(__name__)

HEADROOM = 1.25
"""A label may take this multiple of the slowest one so far."""
WAKE_SECONDS = 60.0
"""The clock is looked at this often: a timer does not count the time that a machine sleeps."""
EXAMPLES = '"23:30", "2026-03-01 06:00" or "2 h" (from now)'


class TimeIsUp(KeyboardInterrupt):
    """The end is near; stops what the main thread does, as Ctrl-C does.  The message is the reason."""


@dataclass(frozen=True)
class End:
    """When the time is over."""

    moment: float
    """s since 1970."""
    source: str
    """Who said so."""

    def __str__(self) -> str:
        return f"{datetime.fromtimestamp(self.moment):%Y-%m-%d %H:%M:%S} ({self.source})"


def reason_of(error: BaseException) -> str:
    """Of a stop, for the events."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "stopped on request"
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def stop_noted(note: Callable[..., object]) -> Iterator[None]:
    """An error, or a request to stop, goes to the events as the reason of the stop, and on."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        note("stop", reason=reason_of(error))
        raise


def find_end(until: str | None) -> End | None:
    """The end by the text of --until, else by the scheduler of the job; None without any.

    Raises: ConfigError for a text that is no time, or one that is past.
    """
    if until is not None:
        return End(parse_until(until, time.time()), f"--until {until}")
    job = current_job()
    if job is None:
        return None
    if job.end is None:
        log.warning("%s: %s; where it has a limit, give --until, or the run is cut off there", job, job.source)
        return None
    return End(job.end, f"{job}, from {job.source}")


def parse_until(text: str, now: float) -> float:
    """s since 1970 of a time of day (the next one), a date with time (local, or with its own offset), or a duration from now.

    Raises: ConfigError.
    """
    if clock := re.fullmatch(r"\s*(\d{1,2}):(\d{2})(?::(\d{2}))?\s*", text):
        hour, minute, second = (int(x or 0) for x in clock.groups())
        today = datetime.fromtimestamp(now)
        with contextlib.suppress(ValueError):
            then = today.replace(hour=hour, minute=minute, second=second, microsecond=0)
            return (then if then.timestamp() > now else then + timedelta(days=1)).timestamp()
    try:
        moment = datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        moment = now + _duration(text)
    if moment <= now:
        raise ConfigError(f"--until {text!r} is past already: now it is {datetime.fromtimestamp(now):%Y-%m-%d %H:%M}")
    return moment


def _duration(text: str) -> float:
    try:
        return units.parse_quantity(text, "wall time")
    except ConfigError:
        raise ConfigError(f"--until {text!r} is no time; write {EXAMPLES}") from None


class WallClock:
    """How much time a start has left."""

    def __init__(self, end: End | None, margin: float) -> None:
        """Args: margin: s kept before the end.   Raises: ConfigError when nothing is left but the margin."""
        self.end = end
        self.margin = margin
        self.progressed: Callable[[], bool] = lambda: False
        """Whether this start has brought the run forward: what stops at its limit without, would do so for ever."""
        self._begun = time.time()
        if end is not None and self.left() <= 0:
            raise ConfigError(
                f"the time ends at {end}, in {end.moment - self._begun:.0f} s, of which [run] margin keeps {margin:g} s for stopping: "
                "nothing was begun; ask for more time"
            )

    def left(self) -> float:
        """s until the run must stop; infinite without an end."""
        return float("inf") if self.end is None else self.end.moment - self.margin - time.time()

    def check_labels(self, count: int, slowest: float | None, workers: int, limit: float) -> None:
        """Whether labels can finish, started now.

        Args: slowest: s of the slowest label so far; None: not known, so it is tried.   limit: s after which a label is killed.
        Raises: TimeIsUp.
        """
        if not count or slowest is None or self.end is None:
            return
        needed = -(-count // workers) * min(limit, HEADROOM * slowest)
        if needed > self.left():
            raise TimeIsUp(
                f"{self._reason()}: {count} labels that take up to {needed:.3g} s cannot finish in the {max(self.left(), 0):.3g} s left"
            )

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Stop what runs in this context, in the main thread, when only the margin is left.

        Raises: WallLimit; GuardStop when the start had brought the run no further, as the next one of this length would neither.
        """
        before = signal.getsignal(signal.SIGALRM)
        if self.end is not None:
            log.info("the run will stop %g s before %s", self.margin, self.end)
            signal.signal(signal.SIGALRM, self._look)
            self._set_timer()
        try:
            yield
        except TimeIsUp as error:
            if not self.progressed():
                raise GuardStop(
                    f"{error}, and this start of {time.time() - self._begun:.0f} s did not suffice for a step, a label or an update of "
                    "the chains, so another one of this length would not either: ask for more time; the same command goes on"
                ) from None
            raise WallLimit(f"{error}; the same command goes on") from None
        finally:
            if self.end is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)

    def disarm(self) -> None:
        """Leave what follows in peace: the run is stopping already."""
        if self.end is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _set_timer(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, min(max(self.left(), 1e-3), WAKE_SECONDS))

    def _look(self, number: int, frame: FrameType | None) -> None:
        if self.left() > 0:
            self._set_timer()
            return
        raise TimeIsUp(self._reason())

    def _reason(self) -> str:
        return f"stopped before the wall limit, {self.end}"
