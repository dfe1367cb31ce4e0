import asyncio
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import pytest

from penstock.service.text.encode import Tokenizer
from penstock.service.text.errors import Busy, PromptTooLong, TemplateError
from penstock.service.text.pool import EncodePool

CHAT = [{"role": "user", "content": "Hello"}]


class Gated:
    """Stands for a tokenizer whose encoding takes as long as the test wants."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.texts: list[str] = []
        self.threads: list[str] = []

    def check_length(self, text: str, max_tokens: int) -> None:
        pass

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return str(messages[0]["content"])

    def encode(self, text: str, *, add_special_tokens: bool) -> "array[int]":
        self.threads.append(threading.current_thread().name)
        if len(text) > 512:
            assert self.gate.wait(30)
        self.texts.append(text[:1])
        return array("I", [len(text)])


@pytest.fixture
def gated() -> Iterator[Gated]:
    tokenizer = Gated()
    yield tokenizer
    tokenizer.gate.set()


def fake(gated: Gated) -> Tokenizer:
    return cast(Tokenizer, gated)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # threads cannot set an asyncio.Event
            await asyncio.sleep(0.001)


def test_same_ids_inline_and_in_either_lane(llama3_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        pool = EncodePool()
        for text in ("short", "middling " * 200, "long " * 40_000):
            ids = await pool.encode(llama3_tokenizer, text, max_tokens=1_000_000)
            assert ids == llama3_tokenizer.encode(text)
        bare = await pool.encode(llama3_tokenizer, "short", max_tokens=9, add_special_tokens=False)
        assert bare == llama3_tokenizer.encode("short", add_special_tokens=False)
        chat = await pool.encode_chat(llama3_tokenizer, CHAT, max_tokens=100, add_generation_prompt=False)
        assert chat == llama3_tokenizer.encode_chat(CHAT, add_generation_prompt=False)
        pool.close()

    asyncio.run(main())


def test_errors_of_the_work_arrive(llama3_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        pool = EncodePool()
        with pytest.raises(PromptTooLong):
            await pool.encode(llama3_tokenizer, "x" * 100_000, max_tokens=10)
        with pytest.raises(PromptTooLong):
            await pool.encode_chat(llama3_tokenizer, [{"role": "u", "content": "x" * 9999}], max_tokens=10)
        with pytest.raises(TemplateError):
            await pool.encode_chat(llama3_tokenizer, [], max_tokens=10)
        pool.close()

    asyncio.run(main())


def test_short_texts_take_no_thread_and_long_ones_their_own(gated: Gated) -> None:
    async def main() -> None:
        pool = EncodePool(threads=1, long_chars=1000)
        gated.gate.set()
        await pool.encode(fake(gated), "i" * 512, max_tokens=1)
        await pool.encode(fake(gated), "o" * 513, max_tokens=1)
        await pool.encode(fake(gated), "l" * 1001, max_tokens=1)
        await pool.encode_chat(fake(gated), [{"content": "c"}], max_tokens=1)
        pool.close()

    asyncio.run(main())
    assert gated.threads == ["MainThread", "encode_0", "encode-long_0", "encode_0"]


def test_a_long_prompt_delays_no_other(gated: Gated) -> None:
    async def main() -> None:
        pool = EncodePool(threads=1, long_chars=1000)
        long = [asyncio.create_task(pool.encode(fake(gated), "l" * 2000, max_tokens=1)) for _ in range(3)]
        await until(lambda: gated.threads)
        assert await pool.encode_chat(fake(gated), [{"content": "chat"}], max_tokens=1) == array("I", [4])
        gated.gate.set()
        assert await asyncio.gather(*long) == [array("I", [2000])] * 3
        pool.close()

    asyncio.run(main())


def test_full_queue_is_busy_and_recovers(gated: Gated) -> None:
    async def main() -> None:
        pool = EncodePool(threads=1, queue_limit=3)
        waiting = [asyncio.create_task(pool.encode(fake(gated), "w" * 600, max_tokens=1)) for _ in range(3)]
        await until(lambda: gated.threads)
        with pytest.raises(Busy):
            await pool.encode(fake(gated), "x" * 600, max_tokens=1)
        gated.gate.set()
        await asyncio.gather(*waiting)
        assert await pool.encode(fake(gated), "x" * 600, max_tokens=1) == array("I", [600])
        pool.close()

    asyncio.run(main())


def test_a_prompt_given_up_in_the_queue_is_never_encoded(gated: Gated) -> None:
    async def main() -> None:
        pool = EncodePool(threads=1, queue_limit=3)
        loop = asyncio.get_running_loop()
        running = asyncio.create_task(pool.encode(fake(gated), "r" * 600, max_tokens=1))
        await until(lambda: gated.threads)
        cancelled = asyncio.create_task(pool.encode(fake(gated), "c" * 600, max_tokens=1))
        with pytest.raises(TimeoutError):
            await pool.encode(fake(gated), "d" * 600, max_tokens=1, deadline=loop.time() + 0.02)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        last = [asyncio.create_task(pool.encode(fake(gated), "l" * 600, max_tokens=1)) for _ in range(2)]
        await asyncio.sleep(0)
        gated.gate.set()
        await asyncio.gather(running, *last)  # no Busy: the places of those who left are free
        pool.close()

    asyncio.run(main())
    assert gated.texts == ["r", "l", "l"]


def test_a_running_prompt_keeps_its_place_after_its_caller_left(gated: Gated) -> None:
    async def main() -> None:
        pool = EncodePool(threads=1, queue_limit=1)
        running = asyncio.create_task(pool.encode(fake(gated), "r" * 600, max_tokens=1))
        await until(lambda: gated.threads)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        with pytest.raises(Busy):
            await pool.encode(fake(gated), "x" * 600, max_tokens=1)
        gated.gate.set()
        await until(lambda: gated.texts)
        await asyncio.sleep(0.01)
        await pool.encode(fake(gated), "x" * 600, max_tokens=1)
        pool.close()

    asyncio.run(main())


def test_waits_without_a_deadline_end_too(gated: Gated) -> None:
    async def main() -> None:
        pool = EncodePool(max_wait_seconds=0.02)
        with pytest.raises(TimeoutError):
            await pool.encode(fake(gated), "x" * 600, max_tokens=1)
        gated.gate.set()
        pool.close()

    asyncio.run(main())


def test_close_answers_those_who_wait(gated: Gated) -> None:
    async def main() -> None:
        pool = EncodePool(threads=1)
        running = asyncio.create_task(pool.encode(fake(gated), "r" * 600, max_tokens=1))
        await until(lambda: gated.threads)
        waiting = asyncio.create_task(pool.encode(fake(gated), "w" * 600, max_tokens=1))
        await asyncio.sleep(0)
        pool.close()
        with pytest.raises(Busy, match="shut down"):
            await waiting
        with pytest.raises(Busy, match="shut down"):
            await pool.encode(fake(gated), "x" * 600, max_tokens=1)
        gated.gate.set()
        assert await running == array("I", [600])

    asyncio.run(main())


def test_the_event_loop_turns_while_a_huge_prompt_is_encoded(llama3_tokenizer: Tokenizer) -> None:
    """The library must release the interpreter lock: the loop turns many times during one call into it."""
    text = "The quick brown fox jumps over the lazy dog. " * 40_000

    async def main() -> tuple[int, float]:
        pool = EncodePool()
        began = time.monotonic()
        encoding = asyncio.create_task(pool.encode(llama3_tokenizer, text, max_tokens=10_000_000))
        turns = 0
        while not encoding.done():
            await asyncio.sleep(0.002)
            turns += 1
        await encoding
        pool.close()
        return turns, time.monotonic() - began

    turns, seconds = asyncio.run(main())
    assert seconds > 0.1
    assert turns > 10
