"""The engine in an asyncio program: streams, leaving early, failures, and the end of it all."""

from __future__ import annotations

import asyncio
import copy
import itertools
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from penstock.executor.executor import Progress
from penstock.executor.simulated import SimulatedExecutor, answer
from penstock.executor.step import ModelInfo, ModelSpec, StepPlan, StepResult
from penstock.local import LLM, AsyncLLM, CompletionOutput, EngineClosed, ExecutorError, RequestOutput, SamplingParams
from penstock.local.offline import async_llm, engine
from penstock.local.offline.stream import RequestStream
from penstock.service.text.encode import Tokenizer
from support.tiny_llama import TinyLlama, build_tiny_llama

SMALL: dict[str, Any] = {"device": "cpu", "threads": 1, "max_sequences": 6, "progress": False}
SLOTS = 2
VOCABULARY = 320
LONG = SamplingParams()
"""As long as there is room."""
SHORT = SamplingParams(max_tokens=5)
WAIT_S = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyLlama(eos_token_id=None, max_position_embeddings=1024)
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=21, shape=shape, tokenizer=True)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    give_up = time.monotonic() + 10  # those that encode end by themselves
    while (left := set(threading.enumerate()) - before) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not left


class Paced(SimulatedExecutor):
    """The simulated executor at a pace, or with a fault; it loads as soon as it may."""

    def __init__(self, step_s: float = 0.0, fault: Exception | None = None, good_steps: int = 0) -> None:
        super().__init__()
        self._pace_us = int(step_s * 1e6)
        self._fault, self._good_steps = fault, good_steps
        self.may_load = threading.Event()
        self.may_load.set()
        self.plans: list[StepPlan] = []
        self.shut = False

    def start(self, spec: ModelSpec, progress: Progress) -> ModelInfo:
        assert self.may_load.wait(WAIT_S)
        info = super().start(msgspec.structs.replace(spec, step_us=self._pace_us), progress)
        return msgspec.structs.replace(info, max_repeat=1)

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        super().submit(plan)

    def results(self) -> Sequence[StepResult]:
        found = super().results()
        self._good_steps -= len(found)
        if self._fault is not None and self._good_steps < 0:
            raise self._fault
        return found

    def shutdown(self) -> None:
        self.shut = True
        super().shutdown()


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Paced], AsyncLLM]:
    def make(executor: Paced) -> AsyncLLM:
        monkeypatch.setattr(engine, "create_executor", lambda name: executor)
        tmp_path.joinpath("config.json").write_text(f'{{"vocab_size": {VOCABULARY}}}')
        return AsyncLLM(tmp_path, executor="simulated", max_sequences=SLOTS, progress=False)

    return make


Make = Callable[[Paced], AsyncLLM]


async def collect(
    llm: AsyncLLM, prompt: str | Sequence[int], params: SamplingParams = SHORT, name: str | None = None
) -> list[RequestOutput]:
    """All outputs of a request."""
    return [output async for output in llm.generate(prompt, params, name)]


async def last(llm: AsyncLLM, prompt: str | Sequence[int], params: SamplingParams = SHORT) -> list[CompletionOutput]:
    return (await collect(llm, prompt, params))[-1].outputs


async def begun(llm: AsyncLLM, name: str) -> asyncio.Task[list[RequestOutput]]:
    """A long request that has its first output."""
    first = asyncio.Event()

    async def read() -> list[RequestOutput]:
        outputs = []
        async for output in llm.generate([1, 2], LONG, name):
            outputs.append(output)
            first.set()
        return outputs

    task = asyncio.create_task(read())
    async with asyncio.timeout(WAIT_S):
        await first.wait()
    return task


# ---- what comes out ----


async def test_outputs_are_those_of_the_synchronous_engine(folder: Path) -> None:
    prompts: list[str | list[int]] = [[5 + number, 9, 30] for number in range(10)]
    prompts += ["hello there", "x" * 300, "long enough for another thread " * 20]
    params = [SamplingParams(seed=number, max_tokens=4 + number) for number in range(9)]
    params += [SamplingParams(temperature=0, max_tokens=30, n=2), SamplingParams(seed=3, n=3, max_tokens=9)]
    with LLM(folder, **SMALL) as llm:
        free = llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=30), progress=False)[0].outputs[0]
        params += [SamplingParams(temperature=0, max_tokens=40, stop=free.text[9:12])] * 2
        wanted = [output.outputs for output in llm.generate(prompts, params, progress=False)]
    async with AsyncLLM(folder, **SMALL) as llm_:
        made = await asyncio.gather(*(last(llm_, *one) for one in zip(prompts, params, strict=True)))
    assert made == wanted


async def test_fifty_streams_share_six_slots(folder: Path) -> None:
    prompts = [[number, 9, 30] for number in range(50)]
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM(folder, **SMALL) as llm:
        wanted = [output.outputs for output in llm.generate(prompts, params, progress=False)]
    async with AsyncLLM(folder, **SMALL) as llm_:
        assert await asyncio.gather(*(last(llm_, prompt, params) for prompt in prompts)) == wanted


async def test_outputs_grow_and_never_change_afterwards(folder: Path) -> None:
    async with AsyncLLM(folder, **SMALL) as llm:
        seen: list[tuple[RequestOutput, RequestOutput]] = []
        async for output in llm.generate("hello", SamplingParams(n=2, seed=1, max_tokens=40), "one"):
            seen.append((output, copy.deepcopy(output)))
        assert all(output == before for output, before in seen)
        for (earlier, _), (later, _) in itertools.pairwise(seen):
            for less, more in zip(earlier.outputs, later.outputs, strict=True):
                assert more.text.startswith(less.text)
                assert more.token_ids[: len(less.token_ids)] == less.token_ids
            assert earlier.outputs != later.outputs
        assert [output.finished for output, _ in seen] == [False] * (len(seen) - 1) + [True]
        final = seen[-1][0]
        assert llm.tokenizer is not None
        prompt_ids = llm.tokenizer.encode("hello").tolist()
        assert (final.request_id, final.prompt, final.prompt_token_ids) == ("one", "hello", prompt_ids)
        assert final.first_token_s is not None
        assert final.finished_s is not None


async def test_deltas_add_up(folder: Path) -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=30, stop=["e", "4"])
    async with AsyncLLM(folder, **SMALL) as llm:
        whole = await last(llm, [5, 6], params)
        assert len({len(one.token_ids) for one in whole}) > 1  # they end at different times
        deltas = [output async for output in llm.generate([5, 6], params, delta=True)]
    for index, one in enumerate(whole):
        parts = [delta.outputs[index] for delta in deltas]
        assert "".join(part.text for part in parts) == one.text
        assert [token for part in parts for token in part.token_ids] == one.token_ids
        ended = deltas[-1].outputs[index]
        assert (ended.finish_reason, ended.stop_reason) == (one.finish_reason, one.stop_reason)
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]


def test_the_example_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "offline.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "AsyncLLM" in block)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, "offline.md", "exec"), names)
    asyncio.run(names["main"]())
    finished = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" True")]
    assert sorted(line.split("' ")[0] for line in finished) == ["'class Stack:", "'def fibonacci(n):"]


# ---- leaving early ----


async def _break(llm: AsyncLLM, name: str) -> None:
    async for _ in llm.generate([1, 2], LONG, name):
        break


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


@pytest.mark.parametrize("leave", [_break, _aclose, _cancel, _abort])
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


# ---- who waits for whom ----


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
        await _break(llm, "left")
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


# ---- what goes wrong ----


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


# ---- the end ----


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
        await begun(llm, "left-to-the-end-of-the-loop")

    async def use_elsewhere() -> None:
        for call in (llm.start(), llm.abort("x"), collect(llm, [1, 2])):
            with pytest.raises(RuntimeError, match="belongs to the event loop that it was first used in"):
                await call
        with pytest.raises(RuntimeError, match="belongs to the event loop"):
            async with llm:
                raise AssertionError("it was entered")
        assert llm.is_running
        await llm.close()

    asyncio.run(use())
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
