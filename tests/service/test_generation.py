"""Generating through the whole service: text, usage, seeds, stop texts, deadlines, cancels, slow readers."""

import asyncio
import json
import logging as stdlib_logging
import time
from datetime import timedelta

import grpc
import pytest
import structlog
from opentelemetry.trace import NoOpTracer

from penstock.rpc.calls import ResponseStream
from penstock.rpc.channel import open_channel
from penstock.rpc.errors import RpcError
from penstock.rpc.stubs import GenerationStub
from penstock.service.admission import Admission
from penstock.service.auth import OpenAccess
from penstock.service.front import Front
from penstock.service.generation import Generation
from penstock.service.intake import Intake
from penstock.service.text.pool import EncodePool
from penstock.telemetry import logging
from penstock.v1 import (
    CancelReason,
    Chat,
    ChatMessage,
    ContentPart,
    DetokenizeRequest,
    ErrorReason,
    FinishReason,
    GenerateRequest,
    ListAdaptersRequest,
    ListModelsRequest,
    Sampling,
    StreamRequest,
    StreamResponse,
    TokenIds,
    TokenizeRequest,
)
from service.fake_scheduler import EOS, FakeScheduler, says
from service.fake_scheduler import ids_of as column
from service.harness import ids_of, request, serving, stream, text_of, until


def test_stream_and_generate_say_the_same() -> None:
    async def scenario() -> None:
        async with serving(FakeScheduler(answer=says("héllo"), period_s=0.002)) as running:
            messages = await stream(running, request(seed=3, request_id="mine"))
            whole = await running.generation.generate(request(seed=3, request_id="mine"))
        choice = whole.choices[0]
        assert text_of(messages) == choice.text == "héllo"
        assert ids_of(messages) == choice.token_ids == [*"héllo".encode(), EOS]
        assert messages[-1].finish_reason == choice.finish_reason == FinishReason.STOP
        assert messages[-1].summary == whole.summary
        assert whole.summary is not None
        assert whole.summary.usage is not None
        assert whole.summary.timings is not None
        assert (whole.summary.usage.prompt_tokens, whole.summary.usage.completion_tokens) == (2, 7)
        assert (whole.summary.request_id, whole.summary.model, whole.summary.replica) == ("mine", "tiny", "replica-1")
        assert whole.summary.seed == 3
        timings = whole.summary.timings
        assert [timings.queue, timings.prefill, timings.decode] == [timedelta(milliseconds=n) for n in (1, 2, 3)]
        assert all(message.summary is None for message in messages[:-1])

    asyncio.run(scenario())


def test_what_is_submitted() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        sampling = Sampling(
            temperature=0.5, top_p=0.25, top_k=7, seed=2**63, max_tokens=9, min_tokens=2, stop_token_ids=[3, 3, 4]
        )
        async with serving(scheduler) as running:
            await stream(running, GenerateRequest(token_ids=TokenIds(ids=[1, 2, 3]), sampling=sampling), timeout=20)
            await stream(running, GenerateRequest(text="héllo"))
        first, second = scheduler.submits
        assert len(first.attempt_id) == 16
        assert first.attempt_id != second.attempt_id
        assert (column(first.prompt_ids), first.prompt_tokens) == ([1, 2, 3], 3)
        assert first.samples[0].seed == 2**63
        assert first.remaining_ms is not None
        assert 15_000 < first.remaining_ms < 21_000  # gRPC rounds deadlines up
        made = first.sampling
        assert made is not None
        assert (made.temperature, made.top_p, made.top_k) == (0.5, 0.25, 7)
        assert (made.max_tokens, made.min_tokens, column(made.stop_ids)) == (9, 2, [3, 4])
        assert made.repetition_penalty == 1.0
        assert column(second.prompt_ids) == list("héllo".encode())
        assert second.sampling is not None
        assert second.sampling.max_tokens == 4096 - 6
        assert (second.sampling.temperature, second.sampling.top_p, second.sampling.top_k) == (1.0, 1.0, 0)
        assert second.remaining_ms is None

    asyncio.run(scenario())


def test_a_seed_is_drawn_and_returned() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        async with serving(scheduler) as running:
            seeds = []
            for _ in range(3):
                response = await running.generation.generate(request())
                assert response.summary is not None
                seeds.append(response.summary.seed)
        assert seeds == [submit.samples[0].seed for submit in scheduler.submits]
        assert len(set(seeds)) == 3

    asyncio.run(scenario())


def test_a_chat_is_rendered_by_the_template() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        messages = [
            ChatMessage(role="system", content=[ContentPart(text="be "), ContentPart(text="brief")]),
            ChatMessage(role="user", content=[ContentPart(text="hi")]),
        ]
        async with serving(scheduler) as running:
            await running.generation.generate(GenerateRequest(chat=Chat(messages=messages)))
            tokens = await running.models.tokenize(TokenizeRequest(chat=Chat(messages=messages)))
        assert bytes(column(scheduler.submits[0].prompt_ids)) == b"[system]be brief[user]hi>"
        assert tokens.token_ids == column(scheduler.submits[0].prompt_ids)

    asyncio.run(scenario())


@pytest.mark.parametrize("period_s", [0.0, 0.001])
def test_stop_texts_are_found_across_tokens_and_cut(period_s: float) -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says("one STOP two" * 20), period_s=period_s)
        async with serving(scheduler) as running:
            messages = await stream(running, request(stop=["STOP", "nothing"], max_tokens=200))
            assert text_of(messages) == "one "
            assert bytes(ids_of(messages)) == b"one "
            last = messages[-1]
            assert (last.finish_reason, last.stop) == (FinishReason.STOP_SEQUENCE, "STOP")
            assert last.summary is not None
            assert last.summary.usage is not None
            assert last.summary.usage.completion_tokens == 4
            if period_s:
                await until(lambda: len(scheduler.cancels) == 1)
                assert scheduler.cancels[0].reason == CancelReason.STOP_SEQUENCE
                assert last.summary.timings is not None
                assert last.summary.timings.queue == timedelta(milliseconds=1)  # the scheduler's word was waited for

    asyncio.run(scenario())


def test_held_back_text_comes_out_at_the_end() -> None:
    async def scenario() -> None:
        async with serving(FakeScheduler(answer=says("one STO"), period_s=0.001)) as running:
            messages = await stream(running, request(stop=["STOP"]))
            assert text_of(messages) == "one STO"
            assert ids_of(messages) == [*b"one STO", EOS]
            assert messages[-1].finish_reason == FinishReason.STOP
            assert messages[-1].stop is None

    asyncio.run(scenario())


def test_a_silent_scheduler_does_not_keep_a_stop_text_waiting() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says("ab" * 40), period_s=0.005, tell_ends=False)
        async with serving(scheduler) as running:
            began = time.monotonic()
            messages = await stream(running, request(stop=["ba"], max_tokens=80))
            assert time.monotonic() - began < 2
            assert messages[-1].finish_reason == FinishReason.STOP_SEQUENCE

    asyncio.run(scenario())


def test_a_stop_token_ends_without_text() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=lambda submit: [*b"ab", ord("!")], period_s=0.001)
        async with serving(scheduler) as running:
            messages = await stream(running, request(stop_token_ids=[ord("!")]))
            assert text_of(messages) == "ab"
            assert ids_of(messages) == [*b"ab!"]

    asyncio.run(scenario())


def test_ignored_end_tokens_are_ordinary() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=lambda submit: [*b"a", EOS, *b"b", EOS, *b"c"])
        async with serving(scheduler) as running:
            response = await running.generation.generate(request(ignore_eos=True))
            assert response.choices[0].text == "abc"
            assert response.choices[0].finish_reason == FinishReason.LENGTH
            assert scheduler.submits[0].sampling is not None
            assert scheduler.submits[0].sampling.ignore_eos

    asyncio.run(scenario())


def test_half_a_character_waits_for_the_other_half() -> None:
    async def scenario() -> None:
        async with serving(FakeScheduler(answer=says("é€😀"), period_s=0.002)) as running:
            messages = await stream(running, request(max_tokens=20))
            assert text_of(messages) == "é€😀"
            assert not any("\ufffd" in message.text for message in messages)
            cut = await running.generation.generate(request(max_tokens=3))
            assert cut.choices[0].text == "é\ufffd"

    asyncio.run(scenario())


def test_cancelling_cancels_at_the_scheduler() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says("x" * 1000), period_s=0.005)
        async with serving(scheduler) as running:
            call = running.generation.stream(StreamRequest(request(max_tokens=1000)))
            assert await call.read() is not None
            call.cancel()
            await until(lambda: len(scheduler.cancels) == 1)
            assert scheduler.cancels[0].attempt_id == scheduler.submits[0].attempt_id
            assert scheduler.cancels[0].reason == CancelReason.CLIENT

    asyncio.run(scenario())


def test_cancelling_before_the_scheduler_answers() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(held=True)
        async with serving(scheduler) as running:
            task = asyncio.ensure_future(running.generation.generate(request()))
            await until(lambda: len(scheduler.submits) == 1)
            task.cancel()
            await until(lambda: len(scheduler.cancels) == 1)
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(scenario())


def test_cancels_at_random_moments_leave_nothing_behind() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says("x" * 50), period_s=0.001)
        async with serving(scheduler) as running:
            tasks_before = len(asyncio.all_tasks())
            calls = []
            for number in range(60):
                call = running.generation.stream(StreamRequest(request(max_tokens=50)))
                calls.append(call)
                asyncio.get_running_loop().call_later(number / 600, call.cancel)
            for call in calls:
                assert await _outcome(call) in (None, grpc.StatusCode.CANCELLED)
            await until(lambda: running.service.fleet.in_flight == 0)
            await until(lambda: len(asyncio.all_tasks()) <= tasks_before)
            await until(lambda: all(one.forgotten or one.cancelled for one in scheduler.sequences.values()))

    asyncio.run(scenario())


async def _outcome(call: ResponseStream[StreamResponse]) -> grpc.StatusCode | None:
    try:
        async for _ in call:
            pass
    except RpcError as error:
        return error.code
    return None


def test_deadlines_end_running_requests() -> None:
    """Whoever's clock is first, the caller's or the service's: of these deadlines gRPC lengthens several, up to 3%."""

    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says("x" * 1000), period_s=0.01)
        async with serving(scheduler) as running:
            calls = [
                running.generation.stream(StreamRequest(request(max_tokens=1000)), timeout=1 + number / 37)
                for number in range(20, 0, -1)
            ]
            for call in calls:
                assert await _outcome(call) is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: len(scheduler.cancels) == len(calls))
            assert {cancel.reason for cancel in scheduler.cancels} == {CancelReason.DEADLINE}

    asyncio.run(scenario())


class Late:
    """The context of a call that has so much time left."""

    def __init__(self, remaining_s: float) -> None:
        self._remaining_s = remaining_s

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return []

    def time_remaining(self) -> float:
        return self._remaining_s


@pytest.mark.parametrize("remaining_s", [-1.0, 0.0, 1e-9])
def test_a_passed_deadline_costs_no_work(remaining_s: float) -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        async with serving(scheduler) as running:
            front = Front(OpenAccess(), Admission(1), NoOpTracer())
            generation = Generation(front, Intake(running.service.fleet, EncodePool()))
            with pytest.raises(RpcError) as caught:
                await generation.generate(request(), Late(remaining_s))
            assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert caught.value.reason == ErrorReason.DEADLINE
        assert scheduler.submits == []

    asyncio.run(scenario())


def test_a_slow_reader_gets_larger_chunks_and_slows_nobody() -> None:
    async def scenario() -> None:
        text = "".join(chr(97 + n % 26) for n in range(1500))
        scheduler = FakeScheduler(answer=says(text, end=False), period_s=0.0005)
        narrow = (("grpc.http2.lookahead_bytes", 16), ("grpc.http2.bdp_probe", 0))
        async with serving(scheduler) as running:
            channel = open_channel(running.address, options=narrow)
            slow = GenerationStub(channel).stream(StreamRequest(request(max_tokens=1500)))
            first = await slow.read()
            assert first is not None
            assert len(await stream(running, request(max_tokens=20))) == 21  # beside it, one token a message
            await until(lambda: scheduler.sequences[100].forgotten, timeout_s=30)
            messages = [first, *[message async for message in slow]]
            assert text_of(messages) == text
            assert ids_of(messages) == list(text.encode())
            assert len(messages) < 750
            await channel.close()

    asyncio.run(scenario())


def test_models_are_described() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        async with serving(scheduler) as running:
            models = (await running.models.list_models(ListModelsRequest())).models
            assert len(models) == 1
            model = models[0]
            assert (model.name, model.vocab_size, model.max_model_tokens) == ("tiny", 300, 4096)
            assert (model.eos_token_ids, model.chat) == ([EOS], True)
            assert [(one.name, one.ready) for one in model.replicas] == [("replica-1", True)]
            tokens = await running.models.tokenize(TokenizeRequest(text="hé"))
            assert tokens.token_ids == list("hé".encode())
            assert tokens.max_model_tokens == 4096
            text = await running.models.detokenize(DetokenizeRequest(token_ids=[*b"hi", EOS]))
            assert text.text == "hi"
            shown = await running.models.detokenize(DetokenizeRequest(token_ids=[EOS], skip_special_tokens=False))
            assert shown.text == "<end>"
            assert (await running.adapters.list_adapters(ListAdaptersRequest())).adapters == []

    asyncio.run(scenario())


def test_logs_and_errors_carry_no_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with serving(FakeScheduler(answer=says("private answer"))) as running:
            await stream(running, request("private question", max_tokens=20, request_id="mine"))
            with pytest.raises(RpcError) as caught:
                await stream(running, request("private question", stop=["private" * 50]))
            assert "private" not in str(caught.value)

    handlers = stdlib_logging.getLogger().handlers
    logging.configure("service", "debug")
    try:
        asyncio.run(scenario())
    finally:
        structlog.reset_defaults()
        stdlib_logging.getLogger().handlers = handlers
    said = capsys.readouterr().err
    assert "private" not in said
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    calls = [line for line in lines if line["event"] == "call"]
    assert [(call["code"], call["method"]) for call in calls] == [
        ("OK", "penstock.v1.GenerationService/Stream"),
        ("INVALID_ARGUMENT", "penstock.v1.GenerationService/Stream"),
    ]
    assert (calls[0]["request_id"], calls[0]["completion_tokens"], calls[0]["tenant"]) == ("mine", 15, "default")
