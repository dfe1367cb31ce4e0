"""What tests of :class:`AsyncLLM` share: an engine at a pace of their own, and how they read it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from penstock.executor.executor import Progress
from penstock.executor.simulated import SimulatedExecutor
from penstock.executor.step import ModelInfo, ModelSpec, StepPlan, StepResult
from penstock.local import AsyncLLM, CompletionOutput, RequestOutput, SamplingParams

SMALL: dict[str, Any] = {"device": "cpu", "threads": 1, "max_sequences": 6, "progress": False}
SLOTS = 2
VOCABULARY = 320
LONG = SamplingParams()
"""As long as there is room."""
SHORT = SamplingParams(max_tokens=5)
WAIT_S = 60
"""For what must come, however slow the machine."""


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


async def break_off(llm: AsyncLLM, name: str) -> None:
    """A long request that is left as soon as it has an output."""
    async for _ in llm.generate([1, 2], LONG, name):
        break
