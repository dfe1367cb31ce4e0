"""One attempt as the service sees it: ids come in from the link, the consumer takes all that is there at once.

So a slow reader gets larger chunks, though none that holds up the event loop or outgrows a message; what waits for it
is never more than the attempt's `max_tokens` ids of four bytes. One wake-up a chunk, no task, no lock.
"""

import asyncio
from array import array
from typing import Final

from penstock.rpc.errors import RpcError
from penstock.v1 import SampleFinished, Submit

MAX_TAKEN: Final = 4096
"""Ids of a chunk: about 5 ms of detokenizing and encoding, far from the 4 MiB that clients take in a message."""


class Attempt:
    """Owned by the handler that made it; the link that it was given to feeds it. One event loop only."""

    __slots__ = ("_failure", "_finish", "_ids", "_waiter", "acknowledged", "deadline", "handle", "received", "submit")

    def __init__(self, submit: Submit, deadline: float | None = None) -> None:
        self.submit = submit
        self.deadline = deadline
        """By the running loop's clock; None: none."""
        self.handle: int | None = None
        """Of its one sample; None until the scheduler has accepted it."""
        self.received = 0
        """Tokens that arrived, in order."""
        self.acknowledged = 0
        """Of them, those that the scheduler was told of."""
        self._ids = array("I")
        self._finish: SampleFinished | None = None
        self._failure: RpcError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def finished(self) -> bool:
        """Whether the scheduler said how it ended, perhaps before all ids arrived."""
        return self._finish is not None

    @property
    def complete(self) -> bool:
        """Whether it failed, or its end and all ids are here: nothing will follow."""
        return self._failure is not None or (self._finish is not None and self.received >= self._finish.tokens)

    @property
    def end(self) -> SampleFinished | None:
        """How it ended, once every id was taken; None before, and when it failed."""
        return self._finish if self.complete and not self._ids else None

    def extend(self, offset: int, ids: "array[int]") -> bool:
        """Take a run of ids whose first is number `offset`; ids that are here already are dropped.

        False if ids between what is here and the run are missing: nothing is taken then.
        """
        known = self.received - offset
        if known < 0:
            return False
        fresh = ids[known:] if known else ids
        if fresh:
            self._ids.extend(fresh)
            self.received += len(fresh)
            self._wake()
        return True

    def finish(self, finish: SampleFinished) -> None:
        """It ended; that holds once `finish.tokens` ids are here."""
        self._finish = finish
        self._wake()

    def fail(self, error: RpcError) -> None:
        """It failed, unless it is complete: ids that are here are still handed out, then `take` raises."""
        if not self.complete:
            self._failure = error
            self._wake()

    async def take(self) -> "array[int]":
        """All ids that are here, up to `MAX_TAKEN`; waits for one, or for the end: empty means ended.

        Raises what it failed with.
        """
        while not self._ids:
            if self._failure is not None:
                raise self._failure
            if self.complete:
                break
            await self._change()
        ids, self._ids = self._ids[:MAX_TAKEN], self._ids[MAX_TAKEN:]
        return ids

    async def ended(self, timeout_s: float) -> SampleFinished | None:
        """How it ended, whatever is still to be taken; None if it failed or does not end in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._finish is None and self._failure is None:
                    await self._change()
        except TimeoutError:
            return None
        return self._finish

    async def _change(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
