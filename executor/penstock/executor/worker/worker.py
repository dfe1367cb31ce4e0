"""A worker: one device's model, pages and slots."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from penstock.executor.executor import ExecutorError, Progress
from penstock.executor.launcher import read_launch
from penstock.executor.layers.parallel import ALONE, Group
from penstock.executor.models.errors import CheckpointError, one_line
from penstock.executor.step import ModelInfo, ModelSpec
from penstock.executor.worker.device.prefill import check_backend
from penstock.executor.worker.kv_cache import PageShape, allocate_pages, count_blocks, longest_sequence
from penstock.executor.worker.model_runner import LoadedModel, ModelRunner, load_model
from penstock.executor.worker.runner import Runner
from penstock.executor.worker.slots import Capacity

IN_FLIGHT = (1, 2)
"""plans_in_flight on offer: one after the other, or one queued behind the one that runs."""


@dataclass(frozen=True, slots=True)
class Worker:
    """Ready to run plans."""

    info: ModelInfo
    runner: Runner

    @classmethod
    def start(cls, spec: ModelSpec, progress: Progress, group: Group = ALONE) -> Worker:
        """Load the model, or this rank's share of it, and give it room. Raises ExecutorError with one line.

        All ranks of ``group`` get the same room: the least that one of them has.
        """
        try:
            with group.together():
                _check(spec)
                device = choose_device(spec.device) if group.size == 1 else choose_rank_device(spec.device)
                check_backend(spec.attention_backend, device)
                torch.set_num_threads(_threads(spec))
            group.require_same("the kind of device", device.type)
            resident = device.type == "cuda" if spec.resident is None else spec.resident
            if resident:
                return cls._resident(spec, device, progress, group)
            return cls._on_host(spec, device, progress, group)
        except CheckpointError as error:
            raise ExecutorError(str(error)) from error
        except ValueError as error:
            raise ExecutorError(f"{spec.path}: {error}") from error
        except RuntimeError as error:  # what torch raises when memory is short
            raise ExecutorError(f"{spec.path}: cannot be loaded: {one_line(error)}") from error

    @classmethod
    def _on_host(cls, spec: ModelSpec, device: torch.device, progress: Progress, group: Group) -> Worker:
        if device.type != "cpu":
            raise ExecutorError(f"{device}: the batch can live on the host for a CPU only")
        on_bytes = functools.partial(progress, "weights")
        with group.together():
            loaded = load_model(
                Path(spec.path), spec.dtype, on_bytes, device=device, load_format=spec.load_format, group=group
            )
            shape = PageShape.of(loaded.shard, spec.block_tokens, loaded.dtype)
            longest = longest_sequence(spec, loaded.config)
            blocks = count_blocks(spec, shape, longest)
        group.require_same("the model", loaded.digest)
        blocks = group.least(blocks)
        # A sequence longer than the pool could never end.
        longest = min(longest, blocks * spec.block_tokens)
        capacity = Capacity(spec.max_sequences, longest, spec.block_tokens, blocks, loaded.config.vocab_size)
        with group.together():
            pages = allocate_pages(shape, blocks, device)
        return cls(_describe(spec, loaded, capacity), ModelRunner(loaded, pages, capacity))

    @classmethod
    def _resident(cls, spec: ModelSpec, device: torch.device, progress: Progress, group: Group) -> Worker:
        from penstock.executor.worker.device.runner import MAX_REPEAT
        from penstock.executor.worker.device.start import start_on_device

        if spec.block_tokens & (spec.block_tokens - 1):
            raise ExecutorError(f"block_tokens is {spec.block_tokens}, must be a power of two on a device")
        started = start_on_device(spec, device, progress, group)
        info = msgspec.structs.replace(
            _describe(spec, started.loaded, started.capacity),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            attention_backends=started.attention,
            max_repeat=MAX_REPEAT,
            startup_ms=started.report.milliseconds,
            memory_bytes=started.report.bytes,
        )
        return cls(info, started.runner)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto": a GPU if there is one. Raises ExecutorError for one that is not there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ExecutorError(f'device {name!r} is not known: "auto", "cpu", "cuda" or "cuda:N"') from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda" or not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise ExecutorError(f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices were found")
    return torch.device("cuda", device.index or 0)


def choose_rank_device(name: str) -> torch.device:
    """The device of that name for this rank: of several GPUs of a machine that of its LOCAL_RANK.

    Raises ExecutorError if it has none, and for the number of a GPU, which all ranks would share.
    """
    device = choose_device(name)
    if device.type != "cuda":
        return device
    if ":" in name:
        raise ExecutorError(f'device {name!r} is not offered with several ranks: with "cuda" each takes its own')
    return choose_device(f"cuda:{read_launch().local_rank}")


def _check(spec: ModelSpec) -> None:
    if spec.plans_in_flight not in IN_FLIGHT:
        raise ExecutorError(f"plans_in_flight {spec.plans_in_flight} is not offered, only 1 and 2")
    for name in ("max_sequences", "max_step_tokens", "block_tokens", "threads"):
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise ExecutorError(f"{name} is {value}, must be at least 1")


def _threads(spec: ModelSpec) -> int:
    """Half of the processors unless told: threads that wait for a processor spin, and other roles need some too."""
    return spec.threads or max(1, len(os.sched_getaffinity(0)) // (2 * spec.tensor_parallel))


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
