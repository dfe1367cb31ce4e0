"""What goes wrong, and whom it disturbs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock.local import AsyncLLM, ExecutorError, SamplingParams
from penstock.local.offline import engine
from support.async_engine import LONG, SHORT, SLOTS, SMALL, WAIT_S, Make, Paced, begun, collect, last


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SHORT, "a prompt of 0 tokens"),
        ([1] * 1100, SHORT, "a prompt of 1100 tokens; it must have at least 1 and fewer than 1024"),
        ([400], SHORT, "token id 400 is outside the vocabulary of 320"),
        (None, SHORT, "text or token ids"),
        ("x" * 100_000, SHORT, "the prompt has 100000 characters"),
        ("x " * 600, SHORT, "a prompt of 1200 tokens"),
    ],
)
async def test_a_prompt_that_does_not_fit_disturbs_nobody(
    folder: Path, prompt: Any, params: SamplingParams, message: str
) -> None:
    async with AsyncLLM(folder, **SMALL) as llm:
        wanted = await last(llm, [5, 6], SamplingParams(temperature=0, max_tokens=60))
        other = asyncio.create_task(last(llm, [5, 6], SamplingParams(temperature=0, max_tokens=60)))
        with pytest.raises(ValueError, match=message):
            await anext(llm.generate(prompt, params, "bad"))
        assert await other == wanted
        assert await collect(llm, [1, 2], SHORT, "bad")  # the id is free


async def test_what_only_the_engine_refuses_disturbs_nobody(paced: Make) -> None:
    async with paced(Paced(step_s=0.001)) as llm, asyncio.timeout(WAIT_S):
        other = asyncio.create_task(last(llm, [5, 6], SamplingParams(max_tokens=60)))
        with pytest.raises(ValueError, match="the model has no tokenizer: stop texts cannot be found"):
            await collect(llm, [1, 2], SamplingParams(stop="x"))
        with pytest.raises(ValueError, match="give the prompt as token ids"):
            await collect(llm, "text")
        with pytest.raises(TypeError, match="params must be SamplingParams, not 5"):
            await collect(llm, [1, 2], 5)  # type: ignore[arg-type]
        assert len((await other)[0].token_ids) == 60


async def test_an_id_is_taken_until_its_reader_has_left(paced: Make) -> None:
    async with paced(Paced(step_s=0.002)) as llm, asyncio.timeout(WAIT_S):
        task = await begun(llm, "generate-0")
        with pytest.raises(ValueError, match="request 'generate-0' is there already"):
            await collect(llm, [1, 2], SHORT, "generate-0")
        assert (await collect(llm, [1, 2]))[0].request_id != "generate-0"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        outputs = await collect(llm, [1, 2], SHORT, "generate-0")
        assert len(outputs[-1].outputs[0].token_ids) == 5


async def test_a_killed_worker_is_replaced_until_there_were_too_many(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0, max_tokens=300)
    monkeypatch.setattr(engine, "MOST_RESTARTS", 1)
    async with AsyncLLM(folder, executor="multiprocess", **SMALL) as llm:
        wanted = await last(llm, [5, 6], params)
        outputs = llm.generate([5, 6], params)
        await anext(outputs)
        _kill_worker()
        assert [output async for output in outputs][-1].outputs == wanted
        tasks = [await begun(llm, f"lost-{number}") for number in range(3)]
        _kill_worker()
        for task in tasks:
            with pytest.raises(ExecutorError, match=r"lost the worker 2 times: the worker was killed by SIGKILL"):
                await task
        assert not llm.is_running
        with pytest.raises(ExecutorError, match="lost the worker 2 times"):
            await collect(llm, [1, 2])


def _kill_worker() -> None:
    (worker,) = psutil.Process().children()
    worker.kill()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (ExecutorError("the device is gone"), "^the device is gone$"),
        (RuntimeError("nobody foresaw this"), r"^the engine failed: RuntimeError\('nobody foresaw this'\)$"),
    ],
)
async def test_an_error_of_the_executor_reaches_everybody(paced: Make, fault: Exception, message: str) -> None:
    executor = Paced(step_s=0.001, fault=fault, good_steps=50)
    async with paced(executor) as llm, asyncio.timeout(WAIT_S):
        tasks = [asyncio.create_task(collect(llm, [number, 2], LONG)) for number in range(SLOTS + 3)]
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        for error in errors:
            with pytest.raises(ExecutorError, match=message):
                raise error if isinstance(error, BaseException) else AssertionError(error)
        assert len({id(error) for error in errors}) == len(errors)  # else each would have the frames of all
        assert not llm.is_running
        with pytest.raises(ExecutorError, match=message):
            await collect(llm, [1, 2])
    assert executor.shut


async def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    llm = AsyncLLM(tmp_path, **SMALL)
    with pytest.raises(ExecutorError, match="not loaded"):
        _ = llm.tokenizer
    for _ in range(2):
        with pytest.raises(ExecutorError, match=r"config\.json: no such file"):
            await llm.start()
    with pytest.raises(ExecutorError, match=r"config\.json: no such file"):
        await collect(llm, [1, 2])
    await llm.close()
    with pytest.raises(ValueError, match="executor 'ray' is not known"):
        async with AsyncLLM(tmp_path, executor="ray"):
            pass
    with pytest.raises(TypeError, match="max_seqs"):
        AsyncLLM(tmp_path, max_seqs=4)
