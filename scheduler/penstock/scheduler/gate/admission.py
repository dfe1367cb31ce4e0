"""Who may wait: a bounded number of attempts, a bounded number of prompt tokens, and nobody while draining."""

import math
import time
from collections.abc import Callable
from typing import Final

from penstock.rpc.errors import RpcError, exhausted, unavailable
from penstock.scheduler.records.events import Load
from penstock.v1 import ErrorReason

RATE_SECONDS: Final = 5.0
"""The rate at which the queue drains is a mean that forgets in this time."""
MIN_RETRY_S: Final = 0.1
MAX_RETRY_S: Final = 10.0
DEFAULT_RETRY_S: Final = 1.0
DRAINING_RETRY_S: Final = 1.0


class DrainRate:
    """How many attempts a second leave the queue: an exponentially weighted mean of events."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rate = 0.0
        self._at = clock()

    def note(self) -> None:
        """One left."""
        self._rate = self.per_second() + 1 / RATE_SECONDS
        self._at = self._clock()

    def per_second(self) -> float:
        """The mean now."""
        return self._rate * math.exp((self._at - self._clock()) / RATE_SECONDS)


class Admission:
    """Counts attempts from ``enter`` to ``leave``; those that have made a token do not wait any more.

    Two bounds hold at once. Never are there more than ``max_waiting`` attempts beyond the engine's sequences. And while
    the engine says that some wait, because blocks lack before sequences do, no more than ``max_waiting`` may.
    """

    def __init__(
        self, max_waiting: int, max_waiting_tokens: int, max_running: int, rate: DrainRate | None = None
    ) -> None:
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._max_running = max_running
        self._rate = rate or DrainRate()
        self._inside = 0
        self._waiting = 0
        self._waiting_tokens = 0
        self._reported_waiting = 0
        self._change_since_report = 0
        self._draining = False

    @property
    def inside(self) -> int:
        """Attempts that have entered and not left."""
        return self._inside

    def drain(self) -> None:
        """Nobody enters any more."""
        self._draining = True

    def refuse_if_draining(self) -> None:
        """Raise UNAVAILABLE (DRAINING) if so."""
        if self._draining:
            raise draining()

    def enter(self, prompt_tokens: int) -> None:
        """An attempt begins to wait. Raises UNAVAILABLE (DRAINING) and RESOURCE_EXHAUSTED (QUEUE_FULL)."""
        self.refuse_if_draining()
        too_many = self._inside >= self._max_waiting + self._max_running
        reported = self._reported_waiting + self._change_since_report
        overdue = self._reported_waiting > 0 and reported >= self._max_waiting
        too_long = self._waiting > 0 and self._waiting_tokens + prompt_tokens > self._max_waiting_tokens
        if too_many or overdue or too_long:
            raise self.queue_full()
        self._inside += 1
        self._waiting += 1
        self._waiting_tokens += prompt_tokens
        self._change_since_report += 1

    def started(self, prompt_tokens: int) -> None:
        """One that waited has made its first token."""
        self._rate.note()
        self._waiting -= 1
        self._waiting_tokens -= prompt_tokens

    def leave(self, prompt_tokens: int, started: bool) -> None:
        """One has ended, or was never begun."""
        self._inside -= 1
        self._change_since_report -= 1
        if not started:
            self._waiting -= 1
            self._waiting_tokens -= prompt_tokens

    def observe(self, load: Load) -> None:
        """What the engine says of its queue."""
        self._reported_waiting = load.waiting
        self._change_since_report = 0

    def queue_full(self) -> RpcError:
        """RESOURCE_EXHAUSTED: try again when, at the present rate, those who wait now have begun."""
        rate = self._rate.per_second()
        retry_s = self._waiting / rate if rate > 0.01 else DEFAULT_RETRY_S
        retry_s = min(max(retry_s, MIN_RETRY_S), MAX_RETRY_S)
        return exhausted(ErrorReason.QUEUE_FULL, "the waiting queue is full", retry_s)


def draining() -> RpcError:
    """UNAVAILABLE: no new attempts."""
    return unavailable(ErrorReason.DRAINING, "the scheduler is shutting down", DRAINING_RETRY_S)


def scheduler_lost() -> RpcError:
    """UNAVAILABLE: the engine is gone, and with it what it ran."""
    return unavailable(ErrorReason.SCHEDULER_LOST, "the scheduler's engine was lost")


def not_serving() -> RpcError:
    """UNAVAILABLE: the engine does not take attempts now."""
    return unavailable(ErrorReason.NO_SCHEDULER, "the scheduler's engine does not serve at the moment")
