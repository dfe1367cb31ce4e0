"""A worker: one device's model, pages and slots."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.executor.executor import ExecutorError, Progress
from penstock.executor.models.errors import CheckpointError, one_line
from penstock.executor.step import ModelInfo, ModelSpec
from penstock.executor.worker.kv_cache import PageShape, allocate_pages, count_blocks
from penstock.executor.worker.model_runner import LoadedModel, ModelRunner, load_model
from penstock.executor.worker.slots import Capacity

IN_FLIGHT = (1, 2)
"""plans_in_flight on offer: one after the other, or one queued behind the one that runs."""


@dataclass(frozen=True, slots=True)
class Worker:
    """Ready to run plans."""

    info: ModelInfo
    runner: ModelRunner

    @classmethod
    def start(cls, spec: ModelSpec, progress: Progress) -> Worker:
        """Load the model and give it room. Raises ExecutorError with one line."""
        try:
            return cls._start(spec, progress)
        except CheckpointError as error:
            raise ExecutorError(str(error)) from error
        except RuntimeError as error:  # what torch raises when memory is short
            raise ExecutorError(f"{spec.path}: cannot be loaded: {one_line(error)}") from error

    @classmethod
    def _start(cls, spec: ModelSpec, progress: Progress) -> Worker:
        _check(spec)
        torch.set_num_threads(_threads(spec))
        loaded = load_model(Path(spec.path), spec.dtype, functools.partial(progress, "weights"))
        shape = PageShape.of(loaded.config, spec.block_tokens, loaded.dtype)
        try:
            longest = _max_model_tokens(spec, loaded.config.max_positions)
            blocks = count_blocks(spec, shape, longest)
        except ValueError as error:
            raise ExecutorError(f"{spec.path}: {error}") from error
        # A sequence longer than the pool could never end.
        longest = min(longest, blocks * spec.block_tokens)
        capacity = Capacity(spec.max_sequences, longest, spec.block_tokens, blocks, loaded.config.vocab_size)
        runner = ModelRunner(loaded, allocate_pages(shape, blocks), capacity)
        return cls(_describe(spec, loaded, capacity), runner)


def _check(spec: ModelSpec) -> None:
    if spec.plans_in_flight not in IN_FLIGHT:
        raise ExecutorError(f"plans_in_flight {spec.plans_in_flight} is not offered, only 1 and 2")
    for name in ("max_sequences", "max_step_tokens", "block_tokens", "threads"):
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise ExecutorError(f"{name} is {value}, must be at least 1")


def _threads(spec: ModelSpec) -> int:
    """Half of the processors unless told: threads that wait for a processor spin, and other roles need some too."""
    return spec.threads or max(1, len(os.sched_getaffinity(0)) // 2)


def _max_model_tokens(spec: ModelSpec, positions: int) -> int:
    if spec.max_model_tokens is None:
        return positions
    if not 1 <= spec.max_model_tokens <= positions:
        raise ValueError(f"max_model_tokens {spec.max_model_tokens} is not within the model's {positions}")
    return spec.max_model_tokens


def _describe(spec: ModelSpec, loaded: LoadedModel, capacity: Capacity) -> ModelInfo:
    return ModelInfo(
        model_digest=loaded.digest,
        vocab_size=capacity.vocab_size,
        eos_ids=loaded.config.eos_ids,
        max_model_tokens=capacity.max_model_tokens,
        max_sequences=capacity.max_sequences,
        max_step_tokens=spec.max_step_tokens,
        block_tokens=capacity.block_tokens,
        num_blocks=capacity.num_blocks,
        plans_in_flight=spec.plans_in_flight,
        tokens_ahead=spec.plans_in_flight - 1,
        dtype=str(loaded.dtype).removeprefix("torch."),
        parameters=loaded.weights.parameters,
        weight_bytes=loaded.weights.weight_bytes,
    )
