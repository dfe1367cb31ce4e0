"""One Connect call: when to say what, and when to give the other side up."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from penstock.rpc.errors import RpcError, cancelled
from penstock.scheduler.gate.outbox import Outbox
from penstock.v1 import ConnectResponse, Load

LOAD_SECONDS: Final = 0.1
CUT_SECONDS: Final = 0.25
"""For a message that is being written when the stream ends; then it is cut off."""


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """The manners of a stream; all in seconds."""

    silence: float = 1.0
    """A side from which nothing is heard for so long is given up."""
    stall: float = 10.0
    """So is one that takes nothing for so long."""
    flush: float = 0.002
    """Least time between two messages of tokens; first tokens and ends do not wait for it."""


class Stream:
    """Belongs to the task that calls ``next``; ``end`` may be called from anywhere on the event loop."""

    def __init__(
        self, outbox: Outbox, load: Callable[[], Load], settings: StreamSettings, task: "asyncio.Task[Any]"
    ) -> None:
        """``task`` writes what ``next`` returns; it is cancelled if it cannot be reached otherwise."""
        self._outbox = outbox
        self._load = load
        self._settings = settings
        self._task = task
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        self._failure: RpcError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._writing_since = 0.0
        self._flush_at = now
        self._flush_timer: asyncio.TimerHandle | None = None
        self._cut_timer: asyncio.TimerHandle | None = None
        self._load_at = now + LOAD_SECONDS
        self._heard = now
        self._room = asyncio.Event()
        self._checked = now
        self._check_timer = self._loop.call_later(settings.silence / 4, self._check)

    # ---- what is said ----

    async def next(self) -> ConnectResponse:
        """What to write next; the call also says that the last one was written. Raises what the stream ended with."""
        self._writing_since = 0.0
        while self._failure is None:
            now = self._loop.time()
            message = self._due(now)
            if message is not None:
                self._writing_since = now
                return message
            await self._wait()
        raise self._failure

    def _due(self, now: float) -> ConnectResponse | None:
        outbox = self._outbox
        answer = outbox.take_answer()
        if answer is not None:
            self._room.set()
            return answer
        if now >= self._load_at:
            self._load_at = now + LOAD_SECONDS
            return ConnectResponse(load=self._load())
        if outbox.has_output and (outbox.urgent or now >= self._flush_at):
            self._flush_at = now + self._settings.flush
            outputs = outbox.take_outputs()
            return None if outputs is None else ConnectResponse(outputs=outputs)
        return None

    async def _wait(self) -> None:
        """For something to say, and for the time to say it."""
        due = min(self._load_at, self._flush_at) if self._outbox.has_output else self._load_at
        self._waiter = self._loop.create_future()
        timer = self._loop.call_at(due, self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            timer.cancel()

    def notify(self) -> None:
        """The outbox has something: wake the writer now, or when its next flush is due."""
        if self._waiter is None or self._waiter.done():
            return
        outbox = self._outbox
        if outbox.urgent or not outbox.has_output or self._loop.time() >= self._flush_at:
            self._waiter.set_result(None)
        elif self._flush_timer is None:
            self._flush_timer = self._loop.call_at(self._flush_at, self._flush)

    def _flush(self) -> None:
        self._flush_timer = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def say_load(self) -> None:
        """Say how full the scheduler is now, not at the next heartbeat."""
        self._load_at = 0.0
        self._wake()

    # ---- what is heard ----

    async def heard(self) -> None:
        """A message arrived; waits while too many answers are not taken."""
        self._heard = self._loop.time()
        while self._outbox.crowded and self._failure is None:
            self._room.clear()
            await self._room.wait()

    def _check(self) -> None:
        """Give up a side that is silent, or that takes nothing. A pause of this process itself does not count."""
        now, settings = self._loop.time(), self._settings
        if now - self._checked > settings.silence / 2:
            self._heard = now
        self._checked = now
        if now - self._heard > settings.silence:
            self.end(cancelled(f"nothing was heard for {settings.silence:g} s"))
        elif self._writing_since and now - self._writing_since > settings.stall:
            self.end(cancelled(f"nothing was taken for {settings.stall:g} s"))
        else:
            self._check_timer = self._loop.call_later(settings.silence / 4, self._check)

    # ---- the end ----

    @property
    def ended(self) -> bool:
        """Whether nothing more will be said."""
        return self._failure is not None

    def end(self, error: RpcError) -> None:
        """End the call with that status; a writer that is stuck is cut off. The first call counts."""
        if self._failure is not None:
            return
        self._failure = error
        self._room.set()
        self._wake()
        if self._writing_since:
            self._cut_timer = self._loop.call_later(CUT_SECONDS, self._cut)

    def _cut(self) -> None:
        if self._writing_since:
            self._task.cancel()

    def close(self) -> None:
        """The call has ended: no timer is left."""
        self._writing_since = 0.0
        self.end(cancelled())
        for timer in (self._check_timer, self._flush_timer, self._cut_timer):
            if timer is not None:
                timer.cancel()
