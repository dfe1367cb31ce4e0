"""Readers that leave early, and requests that are aborted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest

from penstock.executor.simulated import answer
from penstock.local import AsyncLLM
from support.async_engine import LONG, SLOTS, VOCABULARY, WAIT_S, Make, Paced, begun, break_off, collect, last


async def _aclose(llm: AsyncLLM, name: str) -> None:
    async with aclosing(llm.generate([1, 2], LONG, name)) as outputs:
        await anext(outputs)


async def _cancel(llm: AsyncLLM, name: str) -> None:
    task = await begun(llm, name)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _abort(llm: AsyncLLM, name: str) -> None:
    task = await begun(llm, name)
    await llm.abort(name)
    outputs = await task
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert outputs[-1].outputs[0].token_ids


@pytest.mark.parametrize("leave", [break_off, _aclose, _cancel, _abort])
async def test_to_leave_early_frees_the_slot(paced: Make, leave: Callable[[AsyncLLM, str], Awaitable[None]]) -> None:
    """A request that is not aborted would take its slot for as long as the test may wait."""
    async with paced(executor := Paced(step_s=0.05)) as llm, asyncio.timeout(WAIT_S):
        for _ in range(3):
            await asyncio.gather(*(leave(llm, f"left-{number}") for number in range(SLOTS)))
        (made,) = await last(llm, [4, 5])
        assert made.token_ids[0] == answer([4, 5], VOCABULARY)
        assert sum(len(plan.admissions) for plan in executor.plans) == 3 * SLOTS + 1
        assert llm.is_running


async def test_a_request_is_aborted_while_the_model_is_loaded(paced: Make) -> None:
    llm = paced(executor := Paced(step_s=0.005))
    executor.may_load.clear()
    async with asyncio.timeout(WAIT_S):
        task = asyncio.create_task(collect(llm, [1, 2], LONG, "early"))
        await asyncio.sleep(0)
        assert not llm.is_running
        await llm.abort("early")
        executor.may_load.set()
        outputs = await task
        assert [output.outputs[0].finish_reason for output in outputs] == ["abort"]
        await llm.abort("early")
        await llm.abort("nobody")
        assert (await last(llm, [4, 5]))[0].finish_reason == "length"
        await llm.close()


async def test_one_that_waits_for_a_slot_is_cancelled(paced: Make) -> None:
    async with paced(executor := Paced(step_s=0.005)) as llm, asyncio.timeout(WAIT_S):
        running = [await begun(llm, f"running-{number}") for number in range(SLOTS)]
        waiting = asyncio.create_task(collect(llm, [3, 3], LONG, "waiting"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        for number, task in enumerate(running):
            await llm.abort(f"running-{number}")
            await task
        await last(llm, [4, 5])
    assert sum(len(plan.admissions) for plan in executor.plans) == SLOTS + 1
