"""A service whose answers can be computed by hand, on its own thread, and what it saw of its callers."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import pytest

from penstock import v1
from penstock.rpc import errors
from penstock.rpc.server import Server

SUMMARY = v1.Summary(
    request_id="label",
    model="fake",
    usage=v1.Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=2),
    timings=v1.Timings(queue=timedelta(seconds=1), prefill=timedelta(seconds=2), decode=timedelta(seconds=3)),
    seed=2**64 - 1,
    replica="one",
)


@dataclass
class FakeService:
    """GenerationService and ModelService; the prompt's text says what happens."""

    requests: list[v1.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    remaining_s: list[float] = field(default_factory=list)
    left_early: threading.Event = field(default_factory=threading.Event)
    unexpected: list[BaseException] = field(default_factory=list)

    def note(self, request: v1.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.requests.append(request)
        self.metadata.append({k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)})
        self.remaining_s.append(context.time_remaining() or -1.0)
        if request.text == "bad":
            raise errors.invalid([("sampling.top_p", "must be in (0, 1]"), ("sampling.top_k", "at least 1")])
        if request.text == "busy":
            raise errors.exhausted(v1.ErrorReason.QUEUE_FULL, "the queue is full", 2.5)

    async def generate(
        self, request: v1.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> v1.GenerateResponse:
        self.note(request, context)
        if request.text == "slow":
            with self.told_if_left():
                await asyncio.sleep(30)
        choice = v1.Choice(text="Hi!", token_ids=[5, 6], finish_reason=v1.FinishReason.STOP_SEQUENCE, stop=".")
        return v1.GenerateResponse(choices=[choice], summary=SUMMARY)

    async def stream(
        self, request: v1.StreamRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[v1.StreamResponse]:
        assert request.request is not None
        self.note(request.request, context)
        with self.told_if_left():
            yield v1.StreamResponse(text="H", token_ids=[5])
            if request.request.text == "slow":
                await asyncio.sleep(30)
        if request.request.text == "lost":
            raise errors.unavailable(v1.ErrorReason.SCHEDULER_LOST, "the scheduler was lost")
        yield v1.StreamResponse()
        yield v1.StreamResponse(text="i!", token_ids=[6])
        yield v1.StreamResponse(finish_reason=v1.FinishReason.STOP_SEQUENCE, stop=".")
        yield v1.StreamResponse(summary=SUMMARY)

    @contextmanager
    def told_if_left(self) -> Iterator[None]:
        """Whoever leaves may do so while the first chunk is being written, too: then the generator is closed there."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.left_early.set()
            raise

    async def list_models(self, request: v1.ListModelsRequest, context: object) -> v1.ListModelsResponse:
        replicas = [v1.Replica(name="a", ready=False), v1.Replica(name="b", ready=True)]
        model = v1.Model(name="fake", vocab_size=8, max_model_tokens=64, eos_token_ids=[1], replicas=replicas)
        return v1.ListModelsResponse(models=[model, v1.Model(name="other")])

    async def tokenize(self, request: v1.TokenizeRequest, context: object) -> v1.TokenizeResponse:
        text = request.text if request.chat is None else request.chat.messages[0].content[0].text
        return v1.TokenizeResponse(token_ids=[ord(letter) for letter in text or ""])

    async def detokenize(self, request: v1.DetokenizeRequest, context: object) -> v1.DetokenizeResponse:
        return v1.DetokenizeResponse(text="".join(map(chr, request.token_ids)))


class _Running:
    """The fake on a thread of its own, so that sync clients can wait for it."""

    def __init__(self, service: FakeService) -> None:
        self.address = ""
        self._service = service
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    async def _serve(self) -> None:
        server = Server("127.0.0.1:0", on_error=lambda _, error: self._service.unexpected.append(error))
        server.add("penstock.v1.GenerationService", self._service)
        server.add("penstock.v1.ModelService", self._service)
        self.address = await server.start()
        self._ready.set()
        await self._stop.wait()
        await server.stop(1)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def service() -> FakeService:
    """What the running fake answers with and notes in."""
    return FakeService()


@pytest.fixture
def address(service: FakeService) -> Iterator[str]:
    """Where the fake listens."""
    running = _Running(service)
    running.start()
    yield running.address
    running.stop()
    assert service.unexpected == []
