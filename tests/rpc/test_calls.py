"""Calls between real servers and clients: shapes, failures, cancels."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock import v1
from penstock.rpc import errors
from penstock.rpc.calls import MessageStream
from penstock.rpc.channel import open_channel, open_sync_channel
from penstock.rpc.codec import encoder
from penstock.rpc.errors import RpcError
from penstock.rpc.metadata import header
from penstock.rpc.server import Server
from penstock.rpc.stubs import AdapterStub, GenerationStub, SchedulerStub, SyncGenerationStub, SyncSchedulerStub
from penstock.v1 import ErrorReason
from rpc.serving import Serve, Unexpected

GENERATION = "penstock.v1.GenerationService"
SCHEDULER = "penstock.v1.SchedulerService"


class Generation:
    """Echoes; texts beginning with "!" fail in a way of their own."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.closed = asyncio.Event()

    async def generate(self, request: v1.GenerateRequest, context: Any) -> v1.GenerateResponse:
        match request.text:
            case "!invalid":
                raise errors.invalid([("text", "is bad"), ("sampling.top_p", "is worse")])
            case "!defect":
                raise ZeroDivisionError("secret prompt text")
            case "!unencodable":
                return v1.GenerateResponse(choices=[v1.Choice(index=-1)])
            case "!hang":
                await self._hang()
        return v1.GenerateResponse(choices=[v1.Choice(text=f"{request.text} {header(context, 'x-label')}")])

    async def stream(self, request: v1.StreamRequest, context: Any) -> AsyncIterator[v1.StreamResponse]:
        text = request.request.text if request.request else None
        for index, letter in enumerate(text or ""):
            if letter == "!":
                raise errors.unavailable(ErrorReason.SCHEDULER_LOST, "gone", 0.5)
            if letter == "?":
                raise KeyError("secret prompt text")
            if letter == "~":
                await self._hang()
            yield v1.StreamResponse(index=index, text=letter)

    async def _hang(self) -> None:
        self.started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.closed.set()


class Scheduler:
    """Answers each hello with its session as the epoch's length."""

    async def connect(
        self, requests: AsyncIterator[v1.ConnectRequest], context: Any
    ) -> AsyncIterator[v1.ConnectResponse]:
        async for request in requests:
            assert request.hello is not None
            yield v1.ConnectResponse(welcome=v1.Welcome(model=request.hello.service_id))


def ask(text: str) -> v1.StreamRequest:
    return v1.StreamRequest(request=v1.GenerateRequest(text=text))


async def failure_of(awaitable: Any) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await awaitable
    return caught.value


async def test_unary_and_streams_both_ways(serve: Serve, unexpected: Unexpected) -> None:
    async with serve({GENERATION: Generation(), SCHEDULER: Scheduler()}) as address, open_channel(address) as channel:
        stub = GenerationStub(channel)
        assert (await stub.generate(v1.GenerateRequest(text="hi"), timeout=5)).choices[0].text == "hi None"
        response = await stub.generate(v1.GenerateRequest(text="hi"), timeout=5, metadata=[("x-label", "a b")])
        assert response.choices[0].text == "hi a b"
        assert [(r.index, r.text) async for r in stub.stream(ask("abc"), timeout=5)] == [(0, "a"), (1, "b"), (2, "c")]
        call = SchedulerStub(channel).connect(timeout=5)
        for name in ("one", "two"):
            await call.write(v1.ConnectRequest(hello=v1.Hello(service_id=name)))
            answer = await call.read()
            assert answer is not None
            assert answer.welcome == v1.Welcome(model=name)
        await call.done_writing()
        assert await call.read() is None
        assert await call.read() is None
    assert unexpected == []


def test_threads_have_the_same_calls() -> None:
    """A sync client in this thread, the server's loop in another."""
    ready: list[str] = []
    unexpected: Unexpected = []
    listening, done = threading.Event(), threading.Event()

    async def server() -> None:
        running = Server("127.0.0.1:0", on_error=lambda method, error: unexpected.append((method, error)))
        running.add(GENERATION, Generation())
        running.add(SCHEDULER, Scheduler())
        ready.append(await running.start())
        listening.set()
        await asyncio.to_thread(done.wait, 30)
        await running.stop(0)

    thread = threading.Thread(target=asyncio.run, args=(server(),))
    thread.start()
    try:
        assert listening.wait(10)
        with open_sync_channel(ready[0]) as channel:
            sync_conversation(channel)
    finally:
        done.set()
        thread.join(20)
    assert [str(error) for _, error in unexpected] == ["'secret prompt text'"]


def sync_conversation(channel: grpc.Channel) -> None:
    stub = SyncGenerationStub(channel)
    assert stub.generate(v1.GenerateRequest(text="hi"), timeout=5).choices[0].text == "hi None"
    assert [r.text for r in stub.stream(ask("abc"), timeout=5)] == ["a", "b", "c"]
    with pytest.raises(RpcError) as caught:
        stub.generate(v1.GenerateRequest(text="!invalid"), timeout=5)
    assert caught.value.violations == (("text", "is bad"), ("sampling.top_p", "is worse"))
    with pytest.raises(RpcError) as caught:
        list(stub.stream(ask("a?"), timeout=5))
    assert (caught.value.code, caught.value.message) == (grpc.StatusCode.INTERNAL, "internal error")
    stream = stub.stream(ask("a~"), timeout=20)
    assert next(stream).text == "a"
    stream.cancel()
    with pytest.raises(RpcError) as caught:
        next(stream)
    assert caught.value.code is grpc.StatusCode.CANCELLED
    hello = v1.ConnectRequest(hello=v1.Hello(service_id="s"))
    answers = list(SyncSchedulerStub(channel).connect([hello, hello], timeout=5))
    assert answers == [v1.ConnectResponse(welcome=v1.Welcome(model="s"))] * 2


async def test_rich_errors_arrive_whole(serve: Serve, unexpected: Unexpected) -> None:
    async with serve({GENERATION: Generation()}) as address, open_channel(address) as channel:
        stub = GenerationStub(channel)
        error = await failure_of(stub.generate(v1.GenerateRequest(text="!invalid"), timeout=5))
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, ErrorReason.INVALID_REQUEST)
        assert error.violations == (("text", "is bad"), ("sampling.top_p", "is worse"))
        assert error.from_peer
        stream = stub.stream(ask("ab!"), timeout=5)
        assert [(await anext(stream)).text for _ in range(2)] == ["a", "b"]
        error = await failure_of(anext(stream))
        assert (error.code, error.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, 0.5)
    assert unexpected == []


async def test_unexpected_exceptions_are_reported_and_never_told(serve: Serve, unexpected: Unexpected) -> None:
    async with serve({GENERATION: Generation()}) as address, open_channel(address) as channel:
        stub = GenerationStub(channel)
        for call in (
            stub.generate(v1.GenerateRequest(text="!defect"), timeout=5),
            stub.generate(v1.GenerateRequest(text="!unencodable"), timeout=5),
            anext(stub.stream(ask("?"), timeout=5)),
        ):
            error = await failure_of(call)
            assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, ErrorReason.INTERNAL)
            assert error.message == "internal error"
            assert error.from_peer
            assert "secret" not in repr(error.__cause__)
        assert (await stub.generate(v1.GenerateRequest(text="on"), timeout=5)).choices[0].text == "on None"
    # The three calls ran at once, in any order.
    methods = ["Generate", "Generate", "Stream"]
    assert sorted(method for method, _ in unexpected) == [f"{GENERATION}.{method}" for method in methods]


async def test_what_is_not_there_is_unimplemented(serve: Serve) -> None:
    async with serve({SCHEDULER: Scheduler()}) as address, open_channel(address) as channel:
        error = await failure_of(SchedulerStub(channel).get_status(v1.GetStatusRequest(), timeout=5))
        assert (error.code, error.reason) == (grpc.StatusCode.UNIMPLEMENTED, ErrorReason.UNSUPPORTED_METHOD)
        assert "SchedulerService.GetStatus" in error.message
        error = await failure_of(anext(SchedulerStub(channel).get_tokenizer(v1.GetTokenizerRequest(), timeout=5)))
        assert error.reason is ErrorReason.UNSUPPORTED_METHOD
        error = await failure_of(AdapterStub(channel).list_adapters(v1.ListAdaptersRequest(), timeout=5))
        assert (error.code, error.from_peer) == (grpc.StatusCode.UNIMPLEMENTED, False)


async def test_values_that_no_field_carries_are_refused_before_sending() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        with pytest.raises(RpcError) as caught:
            GenerationStub(channel).generate(v1.GenerateRequest(token_ids=v1.TokenIds(ids=[-1])))
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.violations == (("token_ids.ids", "the value is out of the field's range"),)


async def test_metadata_that_http2_cannot_carry_is_a_typed_error(serve: Serve) -> None:
    async with serve({GENERATION: Generation()}) as address, open_channel(address) as channel:
        call = GenerationStub(channel).generate(v1.GenerateRequest(text="a"), timeout=5, metadata=[("x-label", "\n")])
        assert (await failure_of(call)).code is grpc.StatusCode.INTERNAL


async def test_nobody_there_is_unavailable() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        error = await failure_of(GenerationStub(channel).generate(v1.GenerateRequest(text="a"), timeout=5))
        assert (error.code, error.from_peer) == (grpc.StatusCode.UNAVAILABLE, False)


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x0a\x05abc", b"\x0a\x03\xff\xfe\xfd"])
async def test_malformed_requests_are_invalid(serve: Serve, unexpected: Unexpected, raw: bytes) -> None:
    async with serve({GENERATION: Generation(), SCHEDULER: Scheduler()}) as address, open_channel(address) as channel:
        for call in raw_calls(channel, raw):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = errors.from_call(caught.value)
            assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, ErrorReason.MALFORMED_MESSAGE)
    assert unexpected == []


def raw_calls(channel: Any, raw: bytes) -> list[Any]:
    """The same bytes as a request of each shape."""

    async def requests() -> AsyncIterator[bytes]:
        yield raw

    return [
        channel.unary_unary(f"/{GENERATION}/Generate")(raw, timeout=5),
        channel.unary_stream(f"/{GENERATION}/Stream")(raw, timeout=5).read(),
        channel.stream_stream(f"/{SCHEDULER}/Connect")(requests(), timeout=5).read(),
    ]


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=st.lists(st.binary(max_size=300), min_size=20, max_size=40))
def test_garbage_ends_nothing(serve: Serve, unexpected: Unexpected, samples: list[bytes]) -> None:
    """A neighbour's stream lives on whatever is sent beside it."""
    intact = encoder(v1.GenerateRequest)(v1.GenerateRequest(text="hello", model="m"))
    samples += [intact[:end] for end in range(len(intact))]

    async def conversation() -> None:
        async with serve({GENERATION: Generation()}) as address, open_channel(address) as channel:
            neighbour = GenerationStub(channel).stream(ask("ab"), timeout=30)
            assert (await anext(neighbour)).text == "a"
            generate: Any = channel.unary_unary(f"/{GENERATION}/Generate")
            for raw in samples:
                call = generate(raw, timeout=5)
                assert await call.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)
            assert (await anext(neighbour)).text == "b"

    asyncio.run(conversation())
    assert unexpected == []


async def test_a_malformed_response_is_internal(serve: Serve) -> None:
    async def nonsense(data: bytes, context: Any) -> bytes:
        return b"\xff\xff\xff"

    server = grpc.aio.server()
    handler: Any = grpc.unary_unary_rpc_method_handler(nonsense)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(GENERATION, {"Generate": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            error = await failure_of(GenerationStub(channel).generate(v1.GenerateRequest(text="a"), timeout=5))
            assert (error.code, error.from_peer) == (grpc.StatusCode.INTERNAL, False)
    finally:
        await server.stop(0)


@pytest.mark.parametrize("how", ["cancel", "task", "deadline", "channel"])
@pytest.mark.parametrize("shape", ["unary", "stream"])
async def test_whoever_leaves_the_handler_is_cancelled(
    serve: Serve, unexpected: Unexpected, how: str, shape: str
) -> None:
    generation = Generation()
    async with serve({GENERATION: generation}) as address, open_channel(address) as channel:
        stub = GenerationStub(channel)
        timeout = 1.5 if how == "deadline" else 30
        call: Any = (
            stub.generate(v1.GenerateRequest(text="!hang"), timeout=timeout)
            if shape == "unary"
            else stub.stream(ask("~"), timeout=timeout)
        )
        waiting = asyncio.ensure_future(response_of(call))
        async with asyncio.timeout(5):
            await generation.started.wait()
        await leave(how, call, waiting, channel)
        async with asyncio.timeout(5):
            await generation.cancelled.wait()
            await generation.closed.wait()
    assert unexpected == []


async def response_of(call: Any) -> Any:
    return await call if hasattr(call, "__await__") else await anext(call)


async def leave(how: str, call: Any, waiting: "asyncio.Future[Any]", channel: grpc.aio.Channel) -> None:
    expected = grpc.StatusCode.CANCELLED
    match how:
        case "task":
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            return
        case "cancel":
            call.cancel()
        case "channel":
            await channel.close()
            with pytest.raises((RpcError, asyncio.CancelledError)):
                await waiting
            return
        case _:
            expected = grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await failure_of(waiting)).code is expected


async def test_a_cancelled_call_stays_cancelled(serve: Serve) -> None:
    async with serve({SCHEDULER: Scheduler()}) as address, open_channel(address) as channel:
        call = SchedulerStub(channel).connect(timeout=20)
        await call.write(v1.ConnectRequest(hello=v1.Hello(service_id="s")))
        assert await call.read() is not None
        call.cancel()
        call.cancel()
        assert (await failure_of(call.read())).code is grpc.StatusCode.CANCELLED
        hello = v1.ConnectRequest(hello=v1.Hello(service_id="s"))
        assert (await failure_of(call.write(hello))).code is grpc.StatusCode.CANCELLED


class Ending:
    """Ends its streams when told to, while the other side goes on writing."""

    def __init__(self) -> None:
        self.told = asyncio.Event()

    async def connect(
        self, requests: AsyncIterator[v1.ConnectRequest], context: Any
    ) -> AsyncIterator[v1.ConnectResponse]:
        yield v1.ConnectResponse(welcome=v1.Welcome())
        await self.told.wait()
        raise errors.unavailable(ErrorReason.DRAINING, "shutting down", 0.5)


async def test_whoever_writes_to_a_call_that_ends_learns_how_it_ended(serve: Serve) -> None:
    """A write that the end overtakes must not take the place of the status."""
    ending = Ending()

    async def written(call: MessageStream[v1.ConnectRequest, v1.ConnectResponse]) -> RpcError:
        while True:
            try:
                await call.write(v1.ConnectRequest(ack=v1.Ack()))
            except RpcError as error:
                return error
            await asyncio.sleep(0)

    async with serve({SCHEDULER: ending}) as address, open_channel(address) as channel:
        calls = [SchedulerStub(channel).connect(timeout=30) for _ in range(60)]
        for call in calls:
            assert await call.read()
        writers = [asyncio.create_task(written(call)) for call in calls]
        await asyncio.sleep(0.05)
        ending.told.set()
        ends = [await failure_of(call.read()) for call in calls]
        stopped = await asyncio.gather(*writers)
    assert {(end.code, end.reason, end.message) for end in ends} == {
        (grpc.StatusCode.UNAVAILABLE, ErrorReason.DRAINING, "shutting down")
    }
    assert {end.code for end in stopped} <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}


async def test_too_many_calls_at_once_are_refused_with_retry(serve: Serve) -> None:
    generation = Generation()
    async with (
        serve({GENERATION: generation}, max_concurrent_calls=1) as address,
        open_channel(address) as channel,
    ):
        stub = GenerationStub(channel)
        first = stub.stream(ask("a~"), timeout=20)
        await anext(first)
        error = await failure_of(stub.generate(v1.GenerateRequest(text="b"), timeout=5))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, ErrorReason.SERVICE_BUSY)
        assert error.retry_after_s is not None
        async with asyncio.timeout(5):
            await generation.started.wait()
            first.cancel()
            await generation.closed.wait()
        assert (await stub.generate(v1.GenerateRequest(text="b"), timeout=5)).choices


async def test_a_message_above_the_limit_is_refused(serve: Serve) -> None:
    async with (
        serve({GENERATION: Generation()}, max_message_bytes=1000) as address,
        open_channel(address) as channel,
    ):
        error = await failure_of(GenerationStub(channel).generate(v1.GenerateRequest(text="a" * 2000), timeout=5))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
