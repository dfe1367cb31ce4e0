"""The link under faults: what clients see of them is nothing, or a typed error in time."""

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from penstock.rpc.errors import RpcError, unavailable
from penstock.rpc.handlers import Context
from penstock.service import outbox
from penstock.service.text.files import TokenizerFiles
from penstock.v1 import (
    ConnectRequest,
    ConnectResponse,
    ErrorReason,
    GenerateRequest,
    ListModelsRequest,
    Load,
    Sampling,
    SchedulerState,
    TokenIds,
)
from service.fake_scheduler import FakeScheduler, says
from service.fake_scheduler import ids_of as column
from service.harness import Running, ids_of, request, serving, stream, text_of, until

TEXT = "".join(chr(97 + n % 26) for n in range(150))


async def stream_all(running: Running, count: int) -> list[asyncio.Task[list[int]]]:
    """So many streams of TEXT, each past its first token."""

    async def one() -> list[int]:
        return ids_of(await stream(running, request(max_tokens=len(TEXT))))

    return [asyncio.create_task(one()) for _ in range(count)]


def test_streams_survive_cut_connections() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says(TEXT, end=False), period_s=0.004)
        async with serving(scheduler) as running:
            tasks = await stream_all(running, 16)
            await until(lambda: len(scheduler.sequences) == 16)
            for down_s in (0.0, 0.3):
                await asyncio.sleep(0.1)
                await scheduler.stop()
                await asyncio.sleep(down_s)
                hellos = len(scheduler.hellos)
                await scheduler.start()
                await until(lambda hellos=hellos: len(scheduler.hellos) > hellos)  # type: ignore[misc]
            for task in tasks:
                assert await task == list(TEXT.encode())
        assert len(scheduler.submits) == 16
        assert len(scheduler.hellos) >= 3
        resumed = [hello for hello in scheduler.hellos if hello.handles]
        assert resumed
        assert all(len(hello.handles) == len(hello.offsets) for hello in resumed)

    asyncio.run(scenario())


def test_submissions_that_were_not_accepted_are_repeated() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says(TEXT, end=False), muted=False)
        async with serving(scheduler, silence=0.3) as running:
            scheduler.muted = True  # hears the submission, never answers
            task = asyncio.create_task(stream(running, request(max_tokens=5)))
            await until(lambda: len(scheduler.submits) == 1)
            scheduler.forget()
            await scheduler.stop()
            scheduler.muted = False
            await scheduler.start()
            assert text_of(await task) == TEXT[:5]
        assert len(scheduler.submits) == 2
        assert scheduler.submits[0].attempt_id == scheduler.submits[1].attempt_id

    asyncio.run(scenario())


def test_cancels_are_said_when_the_link_is_back() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(held=True)
        async with serving(scheduler, silence=0.3) as running:
            accepted = asyncio.ensure_future(running.generation.generate(request()))
            await until(lambda: len(scheduler.submits) == 1)
            scheduler.muted = True  # the second one's Accepted never arrives
            unheard = asyncio.ensure_future(running.generation.generate(request()))
            await until(lambda: len(scheduler.submits) == 2)
            await scheduler.stop()
            await until(lambda: not running.service.fleet.usable)
            accepted.cancel()
            unheard.cancel()
            await until(lambda: running.service.fleet.in_flight == 0)
            scheduler.muted = False
            await scheduler.start()
            await until(lambda: len(scheduler.cancels) == 2)
            assert {one.attempt_id for one in scheduler.cancels} == {one.attempt_id for one in scheduler.submits}
            assert column(scheduler.hellos[-1].handles) == []
            await asyncio.gather(accepted, unheard, return_exceptions=True)

    asyncio.run(scenario())


def test_silence_is_noticed_and_survived() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says(TEXT, end=False), period_s=0.004)
        async with serving(scheduler, silence=0.3) as running:
            tasks = await stream_all(running, 4)
            await until(lambda: len(scheduler.sequences) == 4)
            scheduler.muted = True
            began = time.monotonic()
            await until(lambda: not running.service.fleet.usable)
            assert time.monotonic() - began < 1.5
            scheduler.muted = False
            for task in tasks:
                assert await task == list(TEXT.encode())

    asyncio.run(scenario())


def test_a_missing_token_is_asked_for_again() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says(TEXT, end=False), period_s=0.002, gap=True)
        async with serving(scheduler) as running:
            assert ids_of(await stream(running, request(max_tokens=20))) == list(TEXT[:20].encode())
        assert len(scheduler.hellos) == 2
        assert column(scheduler.hellos[1].offsets) == [2]

    asyncio.run(scenario())


def test_a_scheduler_that_starts_anew_has_lost_its_attempts() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says(TEXT, end=False), period_s=0.005)
        async with serving(scheduler) as running:
            task = asyncio.create_task(stream(running, request(max_tokens=100)))
            await until(lambda: len(scheduler.sequences) == 1)
            await scheduler.stop()
            scheduler.forget()
            await scheduler.start()
            with pytest.raises(RpcError) as caught:
                await task
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
            assert caught.value.reason == ErrorReason.SCHEDULER_LOST
            assert caught.value.retry_after_s
            await until(lambda: running.service.fleet.usable)
            assert text_of(await stream(running, request(max_tokens=3))) == TEXT[:3]

    asyncio.run(scenario())


def test_a_submission_does_not_go_to_another_model() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says(TEXT, end=False))
        async with serving(scheduler, silence=0.3) as running:
            scheduler.muted = True  # hears the submission, never answers
            task = asyncio.create_task(stream(running, request(max_tokens=5)))
            await until(lambda: len(scheduler.submits) == 1)
            scheduler.forget()
            await scheduler.stop()
            scheduler.muted, scheduler.model = False, "another"
            await scheduler.start()
            with pytest.raises(RpcError) as caught:
                await task
            assert caught.value.reason == ErrorReason.SCHEDULER_LOST
        assert len(scheduler.submits) == 1

    asyncio.run(scenario())


def test_the_last_end_is_acknowledged_before_the_service_ends() -> None:
    """Else a scheduler would keep it until the session's grace is over."""

    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says(TEXT, end=False))
        async with serving(scheduler) as running:
            await stream(running, request(max_tokens=5))
        assert scheduler.acked_finished == list(scheduler.sequences)

    asyncio.run(scenario())


def test_a_scheduler_that_stays_away_fails_its_attempts_after_the_grace() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says(TEXT, end=False), period_s=0.01)
        async with serving(scheduler, session_grace=0.4) as running:
            task = asyncio.create_task(stream(running, request(max_tokens=100)))
            await until(lambda: len(scheduler.sequences) == 1)
            await scheduler.stop()
            began = time.monotonic()
            with pytest.raises(RpcError) as caught:
                await task
            assert 0.3 < time.monotonic() - began < 3
            assert caught.value.reason == ErrorReason.SCHEDULER_LOST
            began = time.monotonic()
            with pytest.raises(RpcError) as caught:
                await stream(running, request())
            assert caught.value.reason == ErrorReason.NO_SCHEDULER
            assert caught.value.retry_after_s
            assert time.monotonic() - began < 0.5, "nobody waits for what has been away for long"
            models = (await running.models.list_models(ListModelsRequest())).models
            assert [(one.name, one.ready) for one in models[0].replicas] == [("replica-1", False)]

    asyncio.run(scenario())


def test_long_prompts_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says(TEXT, end=False))
        prompt = [n % 256 for n in range(4000)]
        assert outbox.PART_BYTES == 64 * 1024
        monkeypatch.setattr(outbox, "PART_BYTES", 4096)
        async with serving(scheduler) as running:
            message = GenerateRequest(token_ids=TokenIds(ids=prompt), sampling=Sampling(max_tokens=2))
            await stream(running, message)
        submit = scheduler.submits[0]
        parts = scheduler.parts[submit.attempt_id]
        assert submit.prompt_tokens == 4000
        assert len(submit.prompt_ids) == 4096
        assert [part.index for part in parts] == [1, 2, 3]
        assert column(submit.prompt_ids + b"".join(part.prompt_ids for part in parts)) == prompt

    asyncio.run(scenario())


def test_the_least_loaded_scheduler_is_chosen() -> None:
    async def scenario() -> None:
        busy = FakeScheduler(replica="busy", load=Load(state=SchedulerState.SERVING, running=6, max_running=8))
        idle = FakeScheduler(replica="idle", load=Load(state=SchedulerState.SERVING, running=1, max_running=8))
        async with serving(busy, idle) as running:
            await until(lambda: _usable(running) == 2)
            await stream(running, request())
            idle.load = Load(state=SchedulerState.DRAINING)
            await until(lambda: _usable(running) == 1)
            await stream(running, request())
        assert (len(idle.submits), len(busy.submits)) == (1, 1)

    asyncio.run(scenario())


def _usable(running: Running) -> int:
    return sum(one.usable for one in running.service.fleet.catalogue.replicas("tiny"))


def test_an_unresponsive_engine_takes_nothing_and_is_still_described() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        async with serving(scheduler) as running:
            scheduler.load = Load(state=SchedulerState.UNRESPONSIVE)
            await until(lambda: not running.service.fleet.usable)
            with pytest.raises(RpcError) as caught:
                await stream(running, request())
            assert caught.value.reason == ErrorReason.NO_SCHEDULER
            assert (await running.models.list_models(ListModelsRequest())).models[0].replicas[0].ready is False
            scheduler.load = Load(state=SchedulerState.SERVING)
            await until(lambda: running.service.fleet.usable)
            assert text_of(await stream(running, request())) == "hello"

    asyncio.run(scenario())


def test_a_tokenizer_that_is_not_what_its_digest_says_is_not_used() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        scheduler.tokenizer_answer = TokenizerFiles({"tokenizer.json": scheduler.tokenizer.contents["tokenizer.json"]})
        async with serving(scheduler, usable=False) as running:
            await asyncio.sleep(0.3)
            assert not running.service.fleet.usable
            with pytest.raises(RpcError) as caught:
                await stream(running, request())
            assert caught.value.reason == ErrorReason.NO_SCHEDULER
            scheduler.tokenizer_answer = None
            await until(lambda: running.service.fleet.usable)

    asyncio.run(scenario())


def test_draining_refuses_new_requests_and_finishes_running_ones() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says(TEXT, end=False), period_s=0.005)
        async with serving(scheduler, drain_grace=5.0) as running:
            task = asyncio.create_task(stream(running, request(max_tokens=60)))
            await until(lambda: len(scheduler.sequences) == 1)
            running.service._admission.drain()
            with pytest.raises(RpcError) as caught:
                await stream(running, request())
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
            assert caught.value.reason == ErrorReason.DRAINING
            assert caught.value.retry_after_s
            assert text_of(await task) == TEXT[:60]

    asyncio.run(scenario())


def test_what_the_scheduler_says_at_its_end_is_final() -> None:
    async def scenario() -> None:
        class Ending(FakeScheduler):
            ended = False

            async def connect(
                self, requests: AsyncIterator[ConnectRequest], context: Context
            ) -> AsyncIterator[ConnectResponse]:
                async for message in super().connect(requests, context):
                    yield message
                    if self.ended:
                        raise unavailable(ErrorReason.DRAINING, "the scheduler has ended")

        scheduler = Ending(held=True)
        async with serving(scheduler) as running:
            task = asyncio.ensure_future(stream(running, request()))
            await until(lambda: len(scheduler.submits) == 1)
            scheduler.ended = True
            with pytest.raises(RpcError) as caught:
                await task
            assert caught.value.reason == ErrorReason.SCHEDULER_LOST

    asyncio.run(scenario())
