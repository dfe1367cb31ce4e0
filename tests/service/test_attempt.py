"""One attempt's buffer, and the text made of it."""

import asyncio
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.rpc.errors import RpcError
from penstock.service.attempts import Attempt
from penstock.service.delivery import Delivery
from penstock.service.errors import scheduler_lost
from penstock.service.text.encode import Tokenizer
from penstock.service.text.stop import StopStrings
from penstock.service.text.stream import OutputText
from penstock.v1 import FinishReason, SampleFinished, Submit
from service.fake_scheduler import EOS, tokenizer_files

TOKENIZER = Tokenizer(tokenizer_files())


def attempt() -> Attempt:
    return Attempt(Submit(attempt_id=b"a"))


def state(one: Attempt) -> tuple[bool, bool]:
    """Whether it is complete, and whether it has ended for its consumer."""
    return one.complete, one.end is not None


def ids(*values: int) -> "array[int]":
    return array("I", values)


def test_everything_that_is_there_is_taken_at_once() -> None:
    async def scenario() -> None:
        one = attempt()
        assert one.extend(0, ids(1, 2))
        assert one.extend(2, ids(3))
        assert await one.take() == ids(1, 2, 3)
        asyncio.get_running_loop().call_soon(one.extend, 3, ids(4))
        assert await one.take() == ids(4)
        one.finish(SampleFinished(tokens=4))
        assert await one.take() == ids()
        assert one.end is not None

    asyncio.run(scenario())


def test_what_has_waited_for_long_comes_in_chunks_that_hold_nobody_up() -> None:
    async def scenario() -> None:
        one = attempt()
        assert one.extend(0, array("I", range(10_000)))
        one.finish(SampleFinished(tokens=10_000))
        chunks = [await one.take() for _ in range(3)]
        assert [len(chunk) for chunk in chunks] == [4096, 4096, 1808]
        assert sum(chunks, array("I")) == array("I", range(10_000))
        assert one.end is not None
        assert await one.take() == ids()

    asyncio.run(scenario())


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=20))
def test_runs_in_any_order_give_the_sequence_or_a_gap(runs: list[tuple[int, int]]) -> None:
    async def scenario() -> None:
        one, known = attempt(), 0
        for offset, count in runs:
            taken = one.extend(offset, array("I", range(offset, offset + count)))
            assert taken == (offset <= known)
            if taken:
                known = max(known, offset + count)
            assert one.received == known
        one.finish(SampleFinished(tokens=known))
        assert (await one.take()).tolist() == list(range(known))

    asyncio.run(scenario())


def test_an_end_holds_after_its_last_token() -> None:
    async def scenario() -> None:
        one = attempt()
        one.finish(SampleFinished(tokens=2))
        assert state(one) == (False, False)
        one.extend(0, ids(1))
        assert await one.take() == ids(1)
        assert state(one) == (False, False)
        one.extend(1, ids(2))
        assert state(one) == (True, False)
        assert await one.take() == ids(2)
        assert state(one) == (True, True)

    asyncio.run(scenario())


def test_a_failure_comes_after_what_is_there() -> None:
    async def scenario() -> None:
        one = attempt()
        one.extend(0, ids(1))
        one.fail(scheduler_lost())
        assert await one.take() == ids(1)
        with pytest.raises(RpcError):
            await one.take()
        assert await one.ended(1.0) is None

    asyncio.run(scenario())


def test_what_is_complete_does_not_fail() -> None:
    async def scenario() -> None:
        one = attempt()
        one.finish(SampleFinished(tokens=0))
        one.fail(scheduler_lost())
        assert await one.take() == ids()

    asyncio.run(scenario())


def test_a_waiter_that_is_cancelled_leaves_the_attempt_usable() -> None:
    async def scenario() -> None:
        one = attempt()
        waiting = asyncio.ensure_future(one.take())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        one.extend(0, ids(1))
        assert await one.take() == ids(1)
        assert await attempt().ended(0.01) is None

    asyncio.run(scenario())


async def deliver(
    output: list[int], cuts: list[int], *, stops: tuple[str, ...] = (), end_ids: frozenset[int] = frozenset({EOS})
) -> tuple[str, list[int], Delivery]:
    """The output of `output` that arrives in chunks of `cuts` ids each, over and over."""
    one = attempt()
    text = OutputText(TOKENIZER.detokenizer(), StopStrings(stops) if stops else None)
    delivery = Delivery(one, text, end_ids)
    reason = FinishReason.STOP if output and output[-1] in end_ids else FinishReason.LENGTH
    end = SampleFinished(tokens=len(output), reason=reason)

    async def feed() -> None:
        start = 0
        while start < len(output):
            for cut in cuts:
                one.extend(start, array("I", output[start : start + cut]))
                start = min(start + cut, len(output))
                await asyncio.sleep(0)
        one.finish(end)

    feeding = asyncio.create_task(feed())
    texts: list[str] = []
    token_ids: list[int] = []
    async for piece in delivery:
        texts.append(piece.text)
        token_ids.extend(piece.token_ids)
    await feeding
    return "".join(texts), token_ids, delivery


@given(
    st.text(alphabet="abé€", max_size=30),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.booleans(),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3),
)
def test_the_chunks_make_no_difference(text: str, cuts: list[int], ended: bool, stops: list[str]) -> None:
    output = [*text.encode(), *([EOS] if ended else [])]
    whole = asyncio.run(deliver(output, [max(len(output), 1)], stops=tuple(stops)))
    pieces = asyncio.run(deliver(output, cuts, stops=tuple(stops)))
    assert pieces[:2] == whole[:2]
    assert pieces[2].finish_reason == whole[2].finish_reason
    assert pieces[2].stop == whole[2].stop
    assert pieces[2].completion_tokens == len(pieces[1])
    found = [stop for stop in stops if stop in text]
    if not found:
        assert pieces[:2] == (text, output)
    else:
        assert pieces[2].finish_reason == FinishReason.STOP_SEQUENCE
        assert pieces[2].stop in found
        assert not any(stop in pieces[0] for stop in stops)
        assert text.startswith(pieces[0])


def test_a_cancel_that_nobody_asked_for_is_a_loss() -> None:
    async def scenario() -> None:
        one = attempt()
        one.extend(0, ids(97))
        one.finish(SampleFinished(tokens=1, reason=FinishReason.CANCELLED))
        with pytest.raises(RpcError):
            await anext(aiter(Delivery(one, OutputText(TOKENIZER.detokenizer()), frozenset())))

    asyncio.run(scenario())
