"""All schedulers of this service: what they serve, which one gets an attempt, whether any does."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import grpc

from penstock.rpc.errors import RpcError
from penstock.service.catalogue import Catalogue, ModelFacts
from penstock.service.link import Link
from penstock.service.router import Router

PATIENCE_SECONDS: Final = 1.0
"""For a link that has just broken: its next stream is due within a quarter of that."""

SETTLE_POLL_SECONDS: Final = 0.02


class Fleet:
    """A fixed list of links. Their `run` tasks belong to whoever made them."""

    __slots__ = ("_changed", "_links", "_router", "catalogue")

    def __init__(self, links: Sequence[Link], router: Router, catalogue: Catalogue) -> None:
        self._links = links
        self._router = router
        self.catalogue = catalogue
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """A link has changed: who waits for one looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def usable(self) -> bool:
        """Whether any scheduler takes attempts."""
        return any(link.usable for link in self._links)

    @property
    def reconnecting(self) -> bool:
        """Whether any stream is being replaced."""
        return any(link.reconnecting for link in self._links)

    @property
    def in_flight(self) -> int:
        """Attempts that wait for a scheduler."""
        return sum(link.in_flight for link in self._links)

    def interrupt(self, error: RpcError) -> None:
        """Fail every attempt."""
        for link in self._links:
            link.interrupt(error)

    async def reached(self, timeout_s: float) -> None:
        """Wait until a scheduler takes attempts, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.usable:
                    await self._changed.wait()

    async def settle(self, timeout_s: float) -> None:
        """Wait until the schedulers were told of every end, at most so long: they keep what nobody acknowledged."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not all(link.settled for link in self._links):  # noqa: ASYNC110  # only at the end
                    await asyncio.sleep(SETTLE_POLL_SECONDS)

    async def choose(self, model: ModelFacts, prompt_tokens: int) -> Link:
        """See `Router.choose`; if all that is missing is a stream that is being replaced, wait a moment for it."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while True:
                    try:
                        return self._router.choose(model, prompt_tokens, self._links)
                    except RpcError as error:
                        if error.code is not grpc.StatusCode.UNAVAILABLE or not self._reconnects(model):
                            raise
                    await self._changed.wait()
        except TimeoutError:
            return self._router.choose(model, prompt_tokens, self._links)

    def _reconnects(self, model: ModelFacts) -> bool:
        return any(link.reconnecting and link.facts and link.facts.same_model(model) for link in self._links)
