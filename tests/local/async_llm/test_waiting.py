"""Who waits for whom: readers, the loop, the engine."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from penstock.executor.simulated import answer
from penstock.local import AsyncLLM, CompletionOutput, ExecutorError, RequestOutput, SamplingParams
from penstock.local.offline import async_llm
from penstock.local.offline.stream import RequestStream
from penstock.service.text.encode import Tokenizer
from support.async_engine import LONG, SLOTS, SMALL, VOCABULARY, WAIT_S, Make, Paced, break_off, collect, last


async def test_a_slow_reader_has_everything_at_once_and_slows_nobody(paced: Make) -> None:
    params = SamplingParams(max_tokens=200)
    async with (
        paced(Paced(step_s=0.005)) as llm,
        asyncio.timeout(WAIT_S),
        aclosing(llm.generate([1, 2], params)) as slow,
    ):
        first = await anext(slow)
        fast = await collect(llm, [1, 2], params)
        assert len(fast) > 5
        rest = [output async for output in slow]
    assert not first.finished
    assert len(rest) <= 2
    assert rest[-1].outputs == fast[-1].outputs


async def test_a_long_text_is_encoded_where_it_holds_up_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Tokenizer.encode
    where: list[str] = []
    may_go_on = threading.Event()

    def slow(tokenizer: Tokenizer, text: str, **options: Any) -> Any:
        where.append(threading.current_thread().name)
        assert may_go_on.wait(WAIT_S)
        return encode(tokenizer, text, **options)

    async with AsyncLLM(folder, **SMALL) as llm:
        await last(llm, [1, 2])
        monkeypatch.setattr(Tokenizer, "encode", slow)
        held_up = asyncio.create_task(last(llm, "x" * 600))
        await asyncio.sleep(0)
        async with asyncio.timeout(WAIT_S / 2):
            await last(llm, [1, 2], SamplingParams(max_tokens=20))
        assert not held_up.done()
        may_go_on.set()
        assert len((await held_up)[0].token_ids) == 5
    assert len(where) == 1
    assert where[0].startswith("encode")


async def test_the_loop_is_woken_once_a_step(paced: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    wakes: list[object] = []
    async with paced(executor := Paced(step_s=0.002)) as llm:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def count(*arguments: Any, **settings: Any) -> asyncio.Handle:
            wakes.append(arguments[0])
            return wake(*arguments, **settings)

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        await asyncio.gather(*(collect(llm, [1, 2], SamplingParams(max_tokens=60, n=2)) for _ in range(SLOTS)))
        monkeypatch.undo()
    assert 0 < len(wakes) <= len(executor.plans)


async def test_a_loop_that_is_held_up_has_one_wake_to_see(paced: Make) -> None:
    async with paced(executor := Paced(step_s=0.001)) as llm, aclosing(llm.generate([1, 2], LONG)) as outputs:
        before = len((await anext(outputs)).outputs[0].token_ids)
        steps, give_up = len(executor.plans), time.monotonic() + WAIT_S
        while len(executor.plans) < steps + 50 and time.monotonic() < give_up:
            time.sleep(0.01)  # noqa: ASYNC251  # that is the subject
        ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
        assert len(ready) <= 2
        await anext(outputs)
        later = len((await anext(outputs)).outputs[0].token_ids)
    assert later > before + 10


async def test_requests_beyond_the_bound_wait_in_their_tasks(paced: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "MAX_WAITING", 3)
    most = 0
    async with paced(Paced(step_s=0.001)) as llm, asyncio.timeout(WAIT_S):
        await llm.start()
        many = asyncio.gather(*(last(llm, [number, 2]) for number in range(30)))
        while not many.done():
            assert llm._thread is not None
            most = max(most, len(llm._thread._streams))
            await asyncio.sleep(0)
        made = await many
    assert 3 <= most <= 3 + SLOTS
    assert [outputs[0].token_ids[0] for outputs in made] == [answer([number, 2], VOCABULARY) for number in range(30)]


async def test_an_idle_engine_takes_no_processor(folder: Path) -> None:
    async with AsyncLLM(folder, **SMALL) as llm:
        await last(llm, [1, 2])
        await break_off(llm, "left")
        await last(llm, [1, 2])
        await asyncio.sleep(0.1)
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.03


def test_a_stream_holds_no_more_than_the_output() -> None:
    stream = RequestStream("name", 1)
    growing = CompletionOutput(0)
    request = RequestOutput("key", None, [1], [growing])
    assert not stream.put(request)
    for number in range(1000):
        growing.token_ids.append(number)
        growing.text += "x"
        assert stream.put(request)
        assert not stream.put(request)
    stream.arrived.set()
    output = asyncio.run(stream.next(delta=False))
    assert output.request_id == "name"
    assert output.outputs == [CompletionOutput(0, list(range(1000)), "x" * 1000)]
    growing.token_ids.append(7)
    assert len(output.outputs[0].token_ids) == 1000


async def test_a_stream_without_news_waits_and_says_so() -> None:
    stream = RequestStream("name", 2)
    ended, other = CompletionOutput(0, [5], "x", "stop"), CompletionOutput(1)
    request = RequestOutput("key", None, [1], [ended, other])
    reading = asyncio.create_task(stream.next(delta=True))
    stream.arrived.set()
    await asyncio.sleep(0.01)
    assert not reading.done()
    assert stream.put(request)
    stream.arrived.set()
    assert (await reading).outputs == [ended, other]
    assert not stream.put(request)  # what has ended is not news again
    other.token_ids.append(6)
    assert stream.put(request)
    stream.arrived.set()
    assert (await stream.next(delta=True)).outputs == [CompletionOutput(0, finish_reason="stop"), other]


async def test_a_failure_does_not_take_back_an_output_that_is_complete() -> None:
    whole, part = RequestStream("whole", 1), RequestStream("part", 1)
    for stream, reason in ((whole, "length"), (part, None)):
        assert stream.put(RequestOutput("key", None, [1], [CompletionOutput(0, [5], finish_reason=reason)]))  # type: ignore[arg-type]
        stream.fail(ExecutorError("gone"))
        stream.arrived.set()
    assert (await whole.next(delta=False)).finished
    with pytest.raises(ExecutorError, match="gone"):
        await part.next(delta=False)
