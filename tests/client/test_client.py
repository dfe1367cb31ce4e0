"""Both clients against a service whose answers are known: values, errors, deadlines, cancellation."""

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from penstock import client as face
from penstock import v1
from penstock.client import AsyncClient, Chunk, Client, Completion, FinishReason, RpcError, Timings, Usage

EXPECTED = Completion(
    text="Hi!",
    token_ids=(5, 6),
    finish_reason=FinishReason.STOP_SEQUENCE,
    stop=".",
    usage=Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=2),
    timings=Timings(queue_s=1.0, prefill_s=2.0, decode_s=3.0),
    seed=2**64 - 1,
    request_id="label",
    model="fake",
    replica="one",
)
CHUNKS = [
    Chunk(text="H", token_ids=(5,)),
    Chunk(text="i!", token_ids=(6,)),
    Chunk(finish_reason=FinishReason.STOP_SEQUENCE, stop="."),
]


def test_the_face_is_what_it_says() -> None:
    assert sorted(face.__all__) == face.__all__
    assert all(hasattr(face, name) for name in face.__all__)


async def test_async_generate(address: str) -> None:
    async with AsyncClient(address) as client:
        assert await client.generate("hello") == EXPECTED


def test_sync_generate(address: str) -> None:
    with Client(address) as client:
        assert client.generate("hello") == EXPECTED


async def test_async_stream(address: str) -> None:
    async with AsyncClient(address) as client, client.stream("hello") as stream:
        assert [chunk async for chunk in stream] == CHUNKS
        assert stream.completion == EXPECTED
        assert [chunk async for chunk in stream] == []


def test_sync_stream(address: str) -> None:
    with Client(address) as client, client.stream("hello") as stream:
        assert list(stream) == CHUNKS
        assert stream.completion == EXPECTED
        assert list(stream) == []


def test_every_option_arrives(address: str, service: Any) -> None:
    with Client(address) as client:
        client.generate(
            "x",
            model="m",
            max_tokens=4,
            min_tokens=0,
            temperature=0.0,
            top_p=0.5,
            top_k=3,
            seed=0,
            stop=["a", "b"],
            stop_token_ids=[1, 2],
            ignore_eos=True,
            request_id="r",
        )
    assert service.requests == [
        v1.GenerateRequest(
            text="x",
            model="m",
            request_id="r",
            sampling=v1.Sampling(
                max_tokens=4,
                min_tokens=0,
                temperature=0.0,
                top_p=0.5,
                top_k=3,
                seed=0,
                stop=["a", "b"],
                stop_token_ids=[1, 2],
                ignore_eos=True,
            ),
        )
    ]


def test_what_is_left_out_stays_unset(address: str, service: Any) -> None:
    with Client(address) as client:
        client.generate("x", stop="end")
    assert service.requests[0].sampling == v1.Sampling(stop=["end"])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", v1.GenerateRequest(text="")),
        ([3, 1], v1.GenerateRequest(token_ids=v1.TokenIds(ids=[3, 1]))),
        ([], v1.GenerateRequest(token_ids=v1.TokenIds())),
        (
            [{"role": "user", "content": "hi", "name": "Ann"}],
            v1.GenerateRequest(
                chat=v1.Chat(messages=[v1.ChatMessage(role="user", name="Ann", content=[v1.ContentPart(text="hi")])])
            ),
        ),
        (
            [v1.ChatMessage(role="user")],
            v1.GenerateRequest(chat=v1.Chat(messages=[v1.ChatMessage(role="user")])),
        ),
    ],
)
def test_prompts_of_each_form(address: str, service: Any, prompt: Any, expected: v1.GenerateRequest) -> None:
    with Client(address) as client:
        client.generate(prompt)
    expected.sampling = v1.Sampling()
    assert service.requests == [expected]


@pytest.mark.parametrize(
    "prompt",
    [b"bytes", [{"role": "user"}], [{"role": "u", "content": "x", "tool": "y"}], [1, {"role": "u"}], [1.5], ["a"]],
)
def test_prompts_of_no_known_form(prompt: Any) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError):
        client.generate(prompt)


def test_an_unknown_option_is_not_ignored() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError, match="unknown option 'max_token'"):
        client.generate("x", max_token=3)  # type: ignore[call-arg]


def test_a_value_that_no_field_can_hold_is_named() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(RpcError) as caught:
        client.generate("x", top_k=-1)
    assert caught.value.violations[0][0] == "sampling.top_k"


async def test_errors_are_typed(address: str) -> None:
    async with AsyncClient(address) as client:
        with pytest.raises(RpcError) as caught:
            await client.generate("bad")
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [name for name, _ in caught.value.violations] == ["sampling.top_p", "sampling.top_k"]
        with pytest.raises(RpcError) as busy:
            await anext(client.stream("busy"))
        assert busy.value.reason is v1.ErrorReason.QUEUE_FULL
        assert busy.value.retry_after_s == 2.5


def test_an_error_in_the_middle_comes_after_what_was_made(address: str) -> None:
    taken: list[Chunk] = []
    with Client(address) as client, client.stream("lost") as stream:
        with pytest.raises(RpcError) as caught:
            taken.extend(stream)
        assert stream.completion.text == "H"
    assert caught.value.reason is v1.ErrorReason.SCHEDULER_LOST
    assert taken == CHUNKS[:1]


def test_nobody_there() -> None:
    with Client("127.0.0.1:1", timeout_s=5) as client, pytest.raises(RpcError) as caught:
        client.models()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def test_the_deadline_of_a_call_wins_over_the_clients(address: str, service: Any) -> None:
    async with AsyncClient(address, timeout_s=50) as client:
        await client.generate("x")
        await client.generate("x", timeout_s=20)
    assert 45 < service.remaining_s[0] < 51
    assert 15 < service.remaining_s[1] < 21


def test_a_deadline_passes(address: str, service: Any) -> None:
    started = time.monotonic()
    with Client(address) as client, pytest.raises(RpcError) as caught:
        list(client.stream("slow", timeout_s=1))
    assert caught.value.reason is v1.ErrorReason.DEADLINE
    assert time.monotonic() - started < 5
    assert service.left_early.wait(5)


@pytest.mark.parametrize("timeout_s", [0, -1])
def test_a_client_without_time_is_refused(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        Client("127.0.0.1:1", timeout_s=timeout_s)


@pytest.mark.parametrize("leave", ["cancel", "aclose", "block", "task"])
async def test_leaving_an_async_stream_ends_it_at_the_service(address: str, service: Any, leave: str) -> None:
    async with AsyncClient(address) as client:
        stream = client.stream("slow")
        assert await anext(stream) == CHUNKS[0]
        match leave:
            case "cancel":
                stream.cancel()
            case "aclose":
                async with contextlib.aclosing(stream):
                    pass
            case "block":
                async with stream:
                    pass
            case _:
                waiting = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0.05)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
        assert await asyncio.to_thread(service.left_early.wait, 5)
        assert [chunk async for chunk in stream] == []
        assert stream.completion.text == "H"


async def test_cancelling_the_task_cancels_a_unary_call(address: str, service: Any) -> None:
    async with AsyncClient(address) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await client.generate("slow")
        assert await asyncio.to_thread(service.left_early.wait, 5)


@pytest.mark.parametrize("leave", ["cancel", "close", "block", "drop"])
def test_leaving_a_sync_stream_ends_it_at_the_service(address: str, service: Any, leave: str) -> None:
    with Client(address) as client:
        stream = client.stream("slow")
        assert next(stream) == CHUNKS[0]
        match leave:
            case "cancel":
                stream.cancel()
                assert list(stream) == []
            case "close":
                stream.close()
            case "block":
                with stream:
                    pass
            case _:
                del stream
        assert service.left_early.wait(5)


async def test_models_and_tokens_async(address: str) -> None:
    async with AsyncClient(address) as client:
        models = await client.models()
        assert [(model.name, model.ready, model.replicas) for model in models] == [
            ("fake", True, ("a", "b")),
            ("other", False, ()),
        ]
        assert await client.tokenize("ab") == [97, 98]
        assert await client.tokenize([{"role": "user", "content": "c"}]) == [99]
        assert await client.detokenize([97, 98]) == "ab"


def test_models_and_tokens_sync(address: str) -> None:
    with Client(address) as client:
        assert client.models()[0].eos_token_ids == (1,)
        assert client.tokenize("ab") == [97, 98]
        assert client.detokenize([97, 98]) == "ab"
        ids: Sequence[int] = [1]
        with pytest.raises(TypeError):
            client.tokenize(ids)  # type: ignore[arg-type]


def test_the_key_is_sent(address: str, service: Any) -> None:
    with Client(address, api_key="s3cret") as client:
        client.generate("x")
    assert service.metadata[0]["authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("timeout_s", [1e10, 1e300, math.inf])
def test_a_deadline_beyond_what_grpc_knows_is_a_distant_one(address: str, timeout_s: float) -> None:
    with Client(address, timeout_s=timeout_s) as client:
        assert client.generate("hello") == EXPECTED
        assert client.generate("hello", timeout_s=timeout_s) == EXPECTED


def test_a_deadline_that_is_no_number_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        Client(address, timeout_s=math.nan)
    with Client(address) as client, pytest.raises(ValueError, match="timeout_s"):
        client.generate("hello", timeout_s=math.nan)


@pytest.mark.parametrize("key", ["a\nb", "k\u00e9y", "\x00"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_quoted(address: str, key: str) -> None:
    with pytest.raises(ValueError, match="api_key has characters") as caught:
        Client(address, api_key=key)
    assert key not in str(caught.value)


def test_an_address_is_needed() -> None:
    with pytest.raises(ValueError, match="address is empty"):
        Client("")
