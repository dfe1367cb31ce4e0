"""Single plans, made by hand, for an executor in this process."""

from __future__ import annotations

import select
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penstock.executor.executor import Executor
from penstock.executor.step import Admission, ModelInfo, ModelSpec, Sampling, StepPlan, StepResult, Stopping, pack_u32
from penstock.executor.uniproc import UniprocExecutor

GREEDY = Sampling(temperature=0.0)

Kind = dict[str, Any]
"""Settings of a ModelSpec that say where the batch lives."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Progress is not looked at here."""


def spec(folder: Path, /, depth: int = 1, **changes: Any) -> ModelSpec:
    settings: dict[str, Any] = {
        "max_sequences": 6,
        "block_tokens": 8,
        "num_blocks": 90,
        "plans_in_flight": depth,
        "threads": 1,
        "device": "cpu",
    }
    return ModelSpec(path=str(folder), **(settings | changes))


def replace_spec(model: ModelSpec, **changes: object) -> ModelSpec:
    return ModelSpec(**({name: getattr(model, name) for name in model.__struct_fields__} | changes))


@contextmanager
def started(model: ModelSpec) -> Iterator[tuple[UniprocExecutor, ModelInfo]]:
    executor = UniprocExecutor()
    try:
        yield executor, executor.start(model, no_progress)
    finally:
        executor.shutdown()


class ByHand:
    """Single plans and their results."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.number = 0

    def __call__(self, **changes: object) -> StepResult:
        self.number += 1
        self.executor.submit(StepPlan(1, self.number, **changes))  # type: ignore[arg-type]
        return wait(self.executor)[0]


def wait(executor: Executor) -> Sequence[StepResult]:
    readable, _, _ = select.select([executor.fileno()], [], [], 30)
    assert readable
    return executor.results()


def admission(slot: int, ids: Sequence[int], packed: bytes | None = None, **changes: object) -> Admission:
    fields: dict[str, object] = {
        "slot": slot,
        "ids": pack_u32(list(ids)) if packed is None else packed,
        "total_ids": len(ids),
        "prompt_ids": len(ids),
        "sampling": GREEDY,
        "stopping": Stopping(100),
        "seed": 1,
    }
    return Admission(**(fields | changes))  # type: ignore[arg-type]


def start_of(slot: int, count: int, blocks: Sequence[int], **changes: object) -> dict[str, object]:
    """What a plan needs beside the admission to compute all of a prompt."""
    return {
        "block_slots": pack_u32([slot] * len(blocks)),
        "block_ids": pack_u32(list(blocks)),
        "schedule_slots": pack_u32([slot]),
        "schedule_rows": pack_u32([count]),
        "rows": pack_u32([slot]),
    } | changes
