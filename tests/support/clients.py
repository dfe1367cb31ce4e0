"""Short ways to talk to a service in tests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from penstock.rpc.channel import open_channel
from penstock.rpc.stubs import GenerationStub, ModelStub, SchedulerStub
from penstock.v1 import (
    FinishReason,
    GenerateRequest,
    GetStatusRequest,
    GetStatusResponse,
    Sampling,
    StreamRequest,
    TokenIds,
)


class Caller:
    """Stubs on one channel."""

    def __init__(self, channel: Any) -> None:
        self.generation = GenerationStub(channel)
        self.models = ModelStub(channel)
        self.scheduler = SchedulerStub(channel)


@contextlib.asynccontextmanager
async def caller(address: str) -> AsyncIterator[Caller]:
    """Stubs of a server; the channel is closed at the end."""
    channel = open_channel(address)
    try:
        yield Caller(channel)
    finally:
        await channel.close()


def request(prompt: Sequence[int] | str, **sampling: Any) -> GenerateRequest:
    """A request for a prompt, greedy unless told otherwise."""
    options = Sampling(**{"temperature": 0.0, **sampling})
    if isinstance(prompt, str):
        return GenerateRequest(text=prompt, sampling=options)
    return GenerateRequest(token_ids=TokenIds(ids=list(prompt)), sampling=options)


async def collect(stubs: Caller, generate: GenerateRequest, timeout_s: float = 90.0) -> tuple[list[int], FinishReason]:
    """All token ids of a stream, and why it ended."""
    ids: list[int] = []
    reason = FinishReason.UNSPECIFIED
    async for response in stubs.generation.stream(StreamRequest(request=generate), timeout=timeout_s):
        ids += response.token_ids
        reason = response.finish_reason or reason
    return ids, reason


async def status(address: str) -> GetStatusResponse:
    """How a scheduler is doing."""
    async with caller(address) as stubs:
        return await stubs.scheduler.get_status(GetStatusRequest(), timeout=5)


async def status_at_rest(address: str) -> GetStatusResponse:
    """The same, once nothing waits or runs: what it counts is up to 0.1 s old."""
    async with asyncio.timeout(60):
        while True:
            seen = await status(address)
            if seen.load is not None and (seen.load.waiting, seen.load.running, seen.attempts) == (0, 0, 0):
                return seen
            await asyncio.sleep(0.05)


async def until(condition: Any, timeout_s: float = 10.0, what: str = "") -> None:
    """Until an async condition is true; AssertionError after that time."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.05)
