"""How many requests the service takes, and whether it takes any."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from penstock.service import errors


class Admission:
    """Counts the requests that are being served. One event loop only."""

    __slots__ = ("_changed", "_draining", "_max_requests", "_running")

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._running = 0
        self._draining = False
        self._changed = asyncio.Event()

    @property
    def running(self) -> int:
        """Requests that are being served."""
        return self._running

    @contextmanager
    def enter(self) -> Iterator[None]:
        """One request, from beginning to end. Raises UNAVAILABLE when draining, RESOURCE_EXHAUSTED when full."""
        if self._draining:
            raise errors.draining()
        if self._running >= self._max_requests:
            raise errors.service_busy()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._changed.set()

    def drain(self) -> None:
        """Take no more."""
        self._draining = True

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing is served; False if that takes longer."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._running:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True
