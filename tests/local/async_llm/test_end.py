"""The end of the engine, of its loop and of those who load it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.executor.executor import Progress
from penstock.executor.step import ModelInfo, ModelSpec, StepPlan
from penstock.local import AsyncLLM, EngineClosed, ExecutorError
from penstock.local.offline import async_llm
from support.async_engine import LONG, SHORT, SLOTS, WAIT_S, Make, Paced, begun, collect, last


@pytest.mark.parametrize("step_s", [0.005, 3600.0])
async def test_close_ends_what_runs(paced: Make, step_s: float) -> None:
    """With steps of an hour, the engine waits for one."""
    llm = paced(executor := Paced(step_s=step_s))
    tasks = [asyncio.create_task(collect(llm, [number, 2], LONG)) for number in range(SLOTS + 2)]
    async with asyncio.timeout(WAIT_S):
        while not executor.plans:
            await asyncio.sleep(0.01)
        was_running = llm.is_running
        closing = asyncio.create_task(llm.close())
        for task in tasks:
            with pytest.raises(EngineClosed, match="the engine was closed"):
                await task
        await closing
        await llm.close()
    assert executor.shut
    assert (was_running, llm.is_running) == (True, False)
    with pytest.raises(EngineClosed):
        await collect(llm, [1, 2])
    with pytest.raises(EngineClosed):
        await llm.start()


async def test_an_output_that_is_complete_is_not_lost_by_close(paced: Make) -> None:
    may_go_on = threading.Event()

    class Held(Paced):
        def submit(self, plan: StepPlan) -> None:
            assert len(self.plans) < 3 or may_go_on.wait(WAIT_S)
            super().submit(plan)

    async with paced(Held()) as llm, asyncio.timeout(WAIT_S):
        outputs = llm.generate([1, 2], SHORT)
        assert not (await anext(outputs)).finished
        may_go_on.set()
        assert llm._thread is not None
        while llm._thread._streams:  # the engine knows of one that is not finished
            await asyncio.sleep(0.01)
    assert [output.finished async for output in outputs] == [True]


async def test_one_that_was_never_used_is_closed(tmp_path: Path) -> None:
    llm = AsyncLLM(tmp_path)
    await llm.close()
    await llm.close()
    with pytest.raises(EngineClosed):
        await llm.start()


async def test_close_tells_what_does_not_end(paced: Make) -> None:
    class Stuck(Paced):
        def shutdown(self) -> None:
            super().shutdown()
            raise ExecutorError("the worker's threads did not end within 10 s")

    llm = paced(Stuck())
    await last(llm, [1, 2])
    with pytest.raises(ExecutorError, match="threads did not end within 10 s"):
        await llm.close()
    assert not llm.is_running


async def test_what_nobody_foresaw_while_loading_is_told(paced: Make) -> None:
    class Faulty(Paced):
        def start(self, spec: ModelSpec, progress: Progress) -> ModelInfo:
            raise OSError("no memory")

    llm = paced(Faulty())
    for _ in range(2):
        with pytest.raises(ExecutorError, match=r"the engine failed: OSError\('no memory'\)"):
            await llm.start()
    await llm.close()


async def test_close_and_cancellation_while_the_model_is_loaded(paced: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(llm: AsyncLLM) -> None:
        async with llm:
            raise AssertionError("it was entered")

    llm = paced(executor := Paced())
    executor.may_load.clear()
    entering, waiting = asyncio.create_task(use(llm)), asyncio.create_task(collect(llm, [1, 2]))
    await asyncio.sleep(0.05)
    assert not llm.is_running
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(EngineClosed):
            await waiting
    with monkeypatch.context() as patched:
        patched.setattr(async_llm, "CLOSE_S", 0.05)
        with pytest.raises(ExecutorError, match="the engine's thread did not end within 0 s"):
            await llm.close()
    executor.may_load.set()
    await llm.close()
    assert executor.shut


async def test_one_cancelled_caller_does_not_stop_the_start(paced: Make) -> None:
    async with asyncio.timeout(WAIT_S):
        llm = paced(Paced())
        one, other = (asyncio.create_task(collect(llm, [1, 2])) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        assert len(await other) > 0
        await llm.close()


def test_it_belongs_to_its_loop(paced: Make) -> None:
    llm = paced(Paced(step_s=0.001))

    async def use() -> None:
        await begun(llm, "left-to-the-end-of-its-loop")

    async def use_elsewhere() -> None:
        for call in (llm.start(), llm.abort("x"), collect(llm, [1, 2])):
            with pytest.raises(RuntimeError, match="belongs to the event loop that it was first used in"):
                await call
        with pytest.raises(RuntimeError, match="belongs to the event loop"):
            async with llm:
                raise AssertionError("it was entered")
        assert llm.is_running
        await llm.close()

    with asyncio.Runner() as runner:
        runner.run(use())
        asyncio.run(use_elsewhere())
    assert not llm.is_running


@pytest.mark.parametrize("steps", [0, 3])
def test_the_end_of_its_loop_ends_it(paced: Make, steps: int) -> None:
    """Also if the loop ends behind a few ``steps`` that it has not been told of yet."""
    llm = paced(executor := Paced(step_s=0.05))

    def wait_until(come: Callable[[], bool]) -> None:
        give_up = time.monotonic() + WAIT_S
        while not come() and time.monotonic() < give_up:
            time.sleep(0.01)
        assert come()

    outputs = llm.generate([1, 2], LONG)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(anext(outputs))
    told = len(executor.plans)
    wait_until(lambda: len(executor.plans) >= told + steps)
    loop.close()
    wait_until(lambda: executor.shut)
