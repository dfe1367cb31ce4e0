"""From a specification to a runner on a device: weights, room for a step, pages, graphs."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from penstock.executor.executor import Progress
from penstock.executor.layers.attention import LayerCache
from penstock.executor.layers.parallel import ALONE, Group
from penstock.executor.step import ModelSpec
from penstock.executor.worker.device.capture import Recorder
from penstock.executor.worker.device.graphs import DecodeGraphs
from penstock.executor.worker.device.memory import GRAPH_BYTES, Budget, count_device_blocks
from penstock.executor.worker.device.prefill import Prefill, choose_prefill
from penstock.executor.worker.device.prefill_graphs import PrefillGraphs
from penstock.executor.worker.device.program import Program
from penstock.executor.worker.device.runner import DeviceRunner
from penstock.executor.worker.device.sizes import graph_sizes
from penstock.executor.worker.device.warm_up import run_full_step, warm_up
from penstock.executor.worker.kv_cache import PageShape, allocate_pages, longest_sequence
from penstock.executor.worker.model_runner import LoadedModel, load_model
from penstock.executor.worker.slots import Capacity
from penstock.kernels.attention.chunks import AttentionShape

TUNED_ROWS = 40
"""With fewer rows most products are kernels of our own."""
TUNE_SECONDS = 4.0
"""Spent at most on choosing algorithms for the matrix products of a full step, and again for those of decode steps."""


@dataclass(slots=True)
class StartReport:
    """What the start took: milliseconds of each stage, bytes of each holder of memory."""

    milliseconds: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Time what is inside, the device's work included."""
        started = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = round(1000 * (time.perf_counter() - started))
        self.milliseconds[name] = self.milliseconds.get(name, 0) + taken


@dataclass(frozen=True, slots=True)
class Started:
    """A runner that is ready, and what it runs."""

    runner: DeviceRunner
    loaded: LoadedModel
    capacity: Capacity
    attention: tuple[str, ...]
    """See :attr:`Prefill.names`."""
    report: StartReport


def start_on_device(spec: ModelSpec, device: torch.device, progress: Progress, group: Group = ALONE) -> Started:
    """Load the model, or this rank's share of it, on ``device`` and give it room.

    Raises CheckpointError, ExecutorError with one line, RuntimeError if memory is short.
    """
    report = StartReport()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        with report.stage("device", device):
            torch.zeros(1, device=device)
    with report.stage("weights", device), group.together():
        on_bytes = functools.partial(progress, "weights")
        loaded = load_model(
            Path(spec.path), spec.dtype, on_bytes, device=device, load_format=spec.load_format, group=group
        )
    group.require_same("the model", loaded.digest)
    report.bytes["weights"] = loaded.weights.weight_bytes
    if device.type == "cuda":
        with report.stage("products", device):
            loaded.model.tune([spec.max_step_tokens], TUNE_SECONDS, head=False)
            torch.cuda.empty_cache()
    with report.stage("attention", device), group.together():
        prefill = _choose_prefill(spec, loaded, device)
    longest = longest_sequence(spec, loaded.config)
    shape = PageShape.of(loaded.shard, spec.block_tokens, loaded.dtype)
    with report.stage("profile", device), group.together():
        blocks = _count_blocks(spec, loaded, shape, longest, prefill, device, report)
    blocks = group.least(blocks)
    longest = min(longest, blocks * spec.block_tokens)
    capacity = Capacity(spec.max_sequences, longest, spec.block_tokens, blocks, loaded.config.vocab_size)
    with report.stage("pages", device), group.together():
        pages = allocate_pages(shape, blocks + 1, device)
    report.bytes["pages"] = (blocks + 1) * shape.block_bytes
    few = computes_few_rows(device, loaded.dtype)
    program = Program(loaded.model, pages, capacity, spec.max_step_tokens, device, prefill, few_rows=few, group=group)
    graphs, prefills = DecodeGraphs(program), PrefillGraphs(program)
    with torch.inference_mode():
        if device.type == "cuda":
            with report.stage("warm_up", device):
                warm_up(program, spec.max_step_tokens, longest)
        if device.type == "cuda" and spec.cuda_graphs:
            with report.stage("products", device):
                loaded.model.tune(
                    [rows for rows in graph_sizes(spec.max_sequences) if rows >= TUNED_ROWS], TUNE_SECONDS
                )
            with report.stage("graphs", device):
                report.bytes["graphs"] = _capture(graphs, prefills, spec, device, progress)
    runner = DeviceRunner(program, graphs, prefills, capacity, spec.max_step_tokens, device)
    return Started(runner, loaded, capacity, prefill.names, report)


def computes_few_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether steps of one to four rows have kernels of their own: not in the reference mode, float32.

    There all steps are computed by the same kernels, so that nothing depends on the company that a sequence has.
    """
    return device.type == "cuda" and dtype == torch.bfloat16


def _choose_prefill(spec: ModelSpec, loaded: LoadedModel, device: torch.device) -> Prefill:
    config = loaded.shard
    shape = AttentionShape(device, loaded.dtype, config.heads, config.kv_heads, config.head_dim, spec.block_tokens)
    return choose_prefill(spec.attention_backend, shape)


def _capture(
    graphs: DecodeGraphs, prefills: PrefillGraphs, spec: ModelSpec, device: torch.device, progress: Progress
) -> int:
    """Capture all graphs; the bytes that they took."""
    free, recorder, sizes, done = torch.cuda.mem_get_info(device)[0], Recorder(device), _graphs(spec), 0

    def on_size() -> None:
        nonlocal done
        done += 1
        progress("graphs", done, sizes)

    progress("graphs", 0, sizes)
    prefills.capture(recorder, on_size)
    graphs.capture(recorder, on_size)
    torch.cuda.synchronize(device)
    return free - torch.cuda.mem_get_info(device)[0]


def _graphs(spec: ModelSpec) -> int:
    """Sizes of steps that are captured."""
    prefills = PrefillGraphs.sizes(spec.max_sequences + spec.max_step_tokens, spec.max_sequences)
    return len(graph_sizes(spec.max_sequences)) + len(prefills)


def _count_blocks(
    spec: ModelSpec,
    loaded: LoadedModel,
    shape: PageShape,
    longest: int,
    prefill: Prefill,
    device: torch.device,
    report: StartReport,
) -> int:
    if device.type != "cuda":
        room = Budget(spec.kv_cache_bytes or 1 << 30, 0, 0, 0, 1.0)
        return count_device_blocks(spec, shape, longest, room)
    report.bytes["step"] = step = _profile(spec, loaded, shape, longest, prefill, device)
    free, total = torch.cuda.mem_get_info(device)
    graphs = GRAPH_BYTES * _graphs(spec) if spec.cuda_graphs else 0
    return count_device_blocks(
        spec, shape, longest, Budget(total, total - free, step, graphs, spec.gpu_memory_utilization)
    )


@torch.inference_mode()
def _profile(
    spec: ModelSpec, loaded: LoadedModel, shape: PageShape, longest: int, prefill: Prefill, device: torch.device
) -> int:
    """The most bytes that state and a full step take beside weights and pages: measured with a pool of one block."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    capacity = Capacity(spec.max_sequences, longest, spec.block_tokens, 1, loaded.config.vocab_size)
    pages: tuple[LayerCache, ...] = allocate_pages(shape, 2, device)
    program = Program(loaded.model, pages, capacity, spec.max_step_tokens, device, prefill, group=loaded.group)
    run_full_step(program, spec.max_step_tokens, longest)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del program, pages
    torch.cuda.empty_cache()
    return peak
