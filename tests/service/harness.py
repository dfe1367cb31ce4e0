"""A whole service on a loopback port in front of fake schedulers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from penstock.rpc.channel import open_channel
from penstock.rpc.stubs import AdapterStub, GenerationStub, ModelStub
from penstock.service.app import Service
from penstock.service.config import ServiceConfig
from penstock.telemetry.tracing import Tracing, configure
from penstock.v1 import GenerateRequest, Sampling, StreamRequest, StreamResponse
from service.fake_scheduler import FakeScheduler


@dataclass(frozen=True)
class Running:
    service: Service
    address: str
    generation: GenerationStub
    models: ModelStub
    adapters: AdapterStub


@asynccontextmanager
async def serving(
    *schedulers: FakeScheduler,
    usable: bool = True,
    tracing: Tracing | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    """Started, and ready unless `usable` is False; drained at the end, with nothing left in flight."""
    addresses = tuple([await scheduler.start() for scheduler in schedulers])
    config = ServiceConfig(**{"grpc_address": "127.0.0.1:0", "schedulers": addresses, "drain_grace": 1.0, **settings})
    service = Service(config, tracing or configure("service", endpoint=None))
    address = await service.start()
    channel = open_channel(address, credentials=credentials)
    try:
        if usable:
            await until(lambda: service.fleet.usable)
        yield Running(service, address, GenerationStub(channel), ModelStub(channel), AdapterStub(channel))
        await until(lambda: service.fleet.in_flight == 0)
    finally:
        await channel.close()
        await service.drain()
        for scheduler in schedulers:
            await scheduler.stop()


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for `condition`."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def request(text: str | None = "hi", **fields: Any) -> GenerateRequest:
    """A request for eight tokens at most; sampling fields by name."""
    names = set(Sampling.__dataclass_fields__)
    sampling = {"max_tokens": 8, **{name: fields.pop(name) for name in list(fields) if name in names}}
    return GenerateRequest(text=text, sampling=Sampling(**sampling), **fields)


async def stream(running: Running, generate: GenerateRequest, **options: Any) -> list[StreamResponse]:
    """All messages of a stream."""
    return [message async for message in running.generation.stream(StreamRequest(generate), **options)]


def text_of(messages: list[StreamResponse]) -> str:
    return "".join(message.text for message in messages)


def ids_of(messages: list[StreamResponse]) -> list[int]:
    return [token for message in messages for token in message.token_ids]
