"""Every bad request is refused with its reason, and with every bad field."""

import asyncio
import math
from typing import Any

import grpc
import pytest

from penstock.rpc.channel import open_channel
from penstock.rpc.errors import RpcError, exhausted, from_call
from penstock.v1 import (
    Chat,
    ChatMessage,
    ContentPart,
    DetokenizeRequest,
    ErrorReason,
    GenerateRequest,
    GetModelRequest,
    Load,
    LoadAdapterRequest,
    Sampling,
    SchedulerState,
    StreamRequest,
    TokenIds,
    TokenizeRequest,
)
from service.fake_scheduler import MAX_MODEL_TOKENS, VOCAB_SIZE, FakeScheduler
from service.harness import Running, request, serving, stream


def turn(role: str = "user", *texts: str | None) -> ChatMessage:
    return ChatMessage(role=role, content=[ContentPart(text=text) for text in texts])


def ids(*values: int) -> GenerateRequest:
    return GenerateRequest(token_ids=TokenIds(ids=list(values)))


INVALID: list[tuple[GenerateRequest, list[str]]] = [
    (request(None), ["input"]),
    (request(""), ["text"]),
    (ids(), ["token_ids.ids"]),
    (ids(1, VOCAB_SIZE, 2, 2**32 - 1), ["token_ids.ids[1]", "token_ids.ids[3]"]),
    (ids(*[VOCAB_SIZE] * 9), [*(f"token_ids.ids[{n}]" for n in range(8)), "token_ids.ids"]),
    (GenerateRequest(chat=Chat()), ["chat.messages"]),
    (
        GenerateRequest(chat=Chat(messages=[turn("", "a"), turn("user"), turn("user", "a", None)])),
        ["chat.messages[0].role", "chat.messages[1].content", "chat.messages[2].content[1]"],
    ),
    (request(temperature=-0.1), ["sampling.temperature"]),
    (request(temperature=100.5), ["sampling.temperature"]),
    (request(temperature=math.nan), ["sampling.temperature"]),
    (request(temperature=math.inf), ["sampling.temperature"]),
    (request(top_p=0.0), ["sampling.top_p"]),
    (request(top_p=1.1), ["sampling.top_p"]),
    (request(top_p=math.nan), ["sampling.top_p"]),
    (request(top_k=0), ["sampling.top_k"]),
    (request(max_tokens=0), ["sampling.max_tokens"]),
    (request(max_tokens=3, min_tokens=4), ["sampling.min_tokens"]),
    (request(stop=["a"] * 17), ["sampling.stop"]),
    (request(stop=["a", "", "b" * 257]), ["sampling.stop[1]", "sampling.stop[2]"]),
    (request(stop_token_ids=[5, VOCAB_SIZE]), ["sampling.stop_token_ids[1]"]),
    (request(stop_token_ids=list(range(64))), ["sampling.stop_token_ids"]),
    (request(request_id="x" * 129), ["request_id"]),
    (request("x" * MAX_MODEL_TOKENS), ["text"]),
    (request("x" * (MAX_MODEL_TOKENS * 40)), ["text"]),
    (ids(*[7] * MAX_MODEL_TOKENS), ["token_ids"]),
    (ids(*[VOCAB_SIZE] * (MAX_MODEL_TOKENS + 1)), ["token_ids"]),  # too many to be looked at one by one
    (GenerateRequest(chat=Chat(messages=[turn("user", "x" * MAX_MODEL_TOKENS)])), ["chat"]),
    (request("x" * 90, max_tokens=MAX_MODEL_TOKENS - 89), ["sampling.max_tokens"]),
    (request("x" * 90, max_tokens=None, min_tokens=MAX_MODEL_TOKENS), ["sampling.min_tokens"]),
]


async def refused(running: Running, message: GenerateRequest) -> RpcError:
    """The error of both methods, which is the same."""
    with pytest.raises(RpcError) as unary:
        await running.generation.generate(message)
    with pytest.raises(RpcError) as streamed:
        await stream(running, message)
    assert unary.value.violations == streamed.value.violations
    assert (unary.value.code, unary.value.reason) == (streamed.value.code, streamed.value.reason)
    return unary.value


def test_bad_fields_are_named() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        async with serving(scheduler) as running:
            for message, fields in INVALID:
                error = await refused(running, message)
                assert error.code is grpc.StatusCode.INVALID_ARGUMENT, fields
                assert error.reason == ErrorReason.INVALID_REQUEST
                assert [field for field, _ in error.violations] == fields
        assert scheduler.submits == []

    asyncio.run(scenario())


def test_all_bad_fields_are_named_at_once() -> None:
    bad = {
        "temperature": math.nan,
        "top_p": 0.0,
        "top_k": 0,
        "max_tokens": 0,
        "stop": [""],
        "stop_token_ids": [VOCAB_SIZE],
    }

    async def scenario() -> None:
        async with serving(FakeScheduler()) as running:
            error = await refused(running, request("x" * (MAX_MODEL_TOKENS + 1), request_id="y" * 200, **bad))
            assert {field for field, _ in error.violations} == {
                "text",
                "request_id",
                "sampling.temperature",
                "sampling.top_p",
                "sampling.top_k",
                "sampling.max_tokens",
                "sampling.stop[0]",
                "sampling.stop_token_ids[0]",
            }

    asyncio.run(scenario())


def test_the_edges_of_the_ranges_are_good() -> None:
    good: list[dict[str, Any]] = [
        {"temperature": 0.0, "top_p": 1.0, "top_k": 1, "min_tokens": 8},
        {"temperature": 100.0, "top_p": 1e-6, "top_k": 2**32 - 1, "seed": 2**64 - 1},
        {"stop": ["a" * 256] * 16, "stop_token_ids": list(range(63))},
        {"max_tokens": MAX_MODEL_TOKENS - 2, "stop_token_ids": [256, 256]},
    ]

    async def scenario() -> None:
        async with serving(FakeScheduler()) as running:
            for sampling in good:
                await stream(running, request("hi", request_id="x" * 128, **sampling))

    asyncio.run(scenario())


def test_unknown_names() -> None:
    async def scenario() -> None:
        async with serving(FakeScheduler()) as running:
            error = await refused(running, request(model="other"))
            assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, ErrorReason.MODEL_NOT_FOUND)
            error = await refused(running, request(adapter="other"))
            assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, ErrorReason.ADAPTER_NOT_FOUND)
            with pytest.raises(RpcError) as caught:
                await running.models.get_model(GetModelRequest(name="other"))
            assert caught.value.reason == ErrorReason.MODEL_NOT_FOUND

    asyncio.run(scenario())


def test_an_empty_model_name_needs_a_single_model() -> None:
    async def scenario() -> None:
        async with serving(FakeScheduler(), FakeScheduler(model="second", replica="replica-2")) as running:
            async with asyncio.timeout(5):
                while len(running.service.fleet.catalogue.models()) < 2:
                    await asyncio.sleep(0.01)
            error = await refused(running, request())
            assert [field for field, _ in error.violations] == ["model"]
            response = await running.generation.generate(request(model="second"))
            assert response.summary is not None
            assert response.summary.replica == "replica-2"

    asyncio.run(scenario())


def test_malformed_bytes_hurt_nobody() -> None:
    async def scenario() -> None:
        async with serving(FakeScheduler()) as running:
            channel = open_channel(running.address)
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
            call = channel.unary_unary("/penstock.v1.GenerationService/Generate")
            for garbage in (b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xfe"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(garbage)
                error = from_call(caught.value)
                assert (error.code, error.reason) == (
                    grpc.StatusCode.INVALID_ARGUMENT,
                    ErrorReason.MALFORMED_MESSAGE,
                )
            await channel.close()
            assert await stream(running, request())

    asyncio.run(scenario())


def test_the_scheduler_s_refusal_reaches_the_caller() -> None:
    async def scenario() -> None:
        refusal = exhausted(ErrorReason.QUEUE_FULL, "full", 0.75)
        async with serving(FakeScheduler(reject=refusal)) as running:
            error = await refused(running, request())
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (error.reason, error.retry_after_s) == (ErrorReason.QUEUE_FULL, 0.75)

    asyncio.run(scenario())


def test_full_schedulers_are_not_asked() -> None:
    async def scenario() -> None:
        full = Load(state=SchedulerState.SERVING, waiting=4, max_running=8)
        scheduler = FakeScheduler(max_waiting=4, load=full)
        async with serving(scheduler) as running:
            error = await refused(running, request())
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, ErrorReason.QUEUE_FULL)
            assert error.retry_after_s
        assert scheduler.submits == []

    asyncio.run(scenario())


def test_the_service_itself_is_bounded() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(held=True)
        async with serving(scheduler, max_requests=1) as running:
            first = running.generation.stream(StreamRequest(request()))
            reading = asyncio.create_task(first.read())
            async with asyncio.timeout(5):
                while not scheduler.submits:
                    await asyncio.sleep(0.01)
            error = await refused(running, request())
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, ErrorReason.SERVICE_BUSY)
            assert error.retry_after_s
            scheduler.held = False
            assert await reading is not None
            first.cancel()

    asyncio.run(scenario())


def test_no_scheduler_is_unavailable_with_a_delay() -> None:
    async def scenario() -> None:
        async with serving(usable=False, schedulers=("127.0.0.1:1",)) as running:
            error = await refused(running, request())
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, ErrorReason.NO_SCHEDULER)
            assert error.retry_after_s
            error = await refused(running, request(model="perhaps"))
            assert error.reason == ErrorReason.NO_SCHEDULER

    asyncio.run(scenario())


def test_tokenizing_says_what_is_bad_too() -> None:
    async def scenario() -> None:
        async with serving(FakeScheduler()) as running:
            for bad, field in (
                (TokenizeRequest(), "input"),
                (TokenizeRequest(text=""), "text"),
                (TokenizeRequest(chat=Chat()), "chat.messages"),
            ):
                with pytest.raises(RpcError) as caught:
                    await running.models.tokenize(bad)
                assert caught.value.violations[0][0] == field
            with pytest.raises(RpcError) as caught:
                await running.models.detokenize(DetokenizeRequest(token_ids=[VOCAB_SIZE]))
            assert caught.value.violations[0][0] == "token_ids[0]"

    asyncio.run(scenario())


def test_adapters_cannot_be_loaded() -> None:
    async def scenario() -> None:
        async with serving(FakeScheduler()) as running:
            with pytest.raises(RpcError) as caught:
                await running.adapters.load_adapter(LoadAdapterRequest(name="a"))
            assert (caught.value.code, caught.value.reason) == (
                grpc.StatusCode.UNIMPLEMENTED,
                ErrorReason.UNSUPPORTED_METHOD,
            )

    asyncio.run(scenario())


def test_many_bad_fields_fit_into_the_trailers() -> None:
    async def scenario() -> None:
        async with serving(FakeScheduler()) as running:
            chat = Chat(messages=[turn("") for _ in range(500)])
            error = await refused(running, GenerateRequest(chat=chat, sampling=Sampling(top_p=0.0)))
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT
            assert len(error.violations) > 20

    asyncio.run(scenario())
