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
from penstock.executor.worker.device.loading import Loading, loading_beside
from penstock.executor.worker.device.memory import GRAPH_BYTES, Budget, count_device_blocks
from penstock.executor.worker.device.prefill import Prefill, choose_prefill
from penstock.executor.worker.device.prefill_graphs import PrefillGraphs
from penstock.executor.worker.device.program import Program
from penstock.executor.worker.device.runner import DeviceRunner
from penstock.executor.worker.device.sizes import graph_sizes
from penstock.executor.worker.device.warm_up import run_full_step, warm_up
from penstock.executor.worker.kv_cache import PageShape, allocate_pages, longest_sequence
from penstock.executor.worker.model_runner import LoadedModel, UnsetModel, allocate_model
from penstock.executor.worker.slots import Capacity
from penstock.kernels.ahead import can_compile_ahead, compiled_ahead
from penstock.kernels.attention.chunks import AttentionShape

TUNED_ROWS = 40
"""With fewer rows most products are kernels of our own."""
TUNE_SECONDS = 4.0
"""Spent at most on choosing algorithms for the matrix products of a full step, of decode steps, of captured prompts."""


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
    folder = Path(spec.path)
    with report.stage("parameters", device), group.together():
        unset = allocate_model(folder, spec.dtype, device=device, load_format=spec.load_format, group=group)
        drawn = None
        if device.type == "cuda" or spec.load_format == "dummy":
            drawn = unset.draw()  # until they are loaded: products are measured with numbers like those of a model

    def load() -> LoadedModel:
        if drawn is not None and spec.load_format == "dummy":
            return drawn
        return unset.fill(folder, functools.partial(progress, "weights"))

    with loading_beside(load, device) as loading:
        if device.type != "cuda":  # whatever is done meanwhile would take the processors that loading needs
            with group.together():
                loading.wait()
        prepared = _prepare(spec, unset, device, progress, report, loading)
        with report.stage("waiting", device), group.together():
            loaded = loading.wait()
    report.milliseconds["weights"] = round(1000 * loading.seconds)
    group.require_same("the model", loaded.digest)
    report.bytes["weights"] = loaded.weights.weight_bytes
    runner = DeviceRunner(
        prepared.program, prepared.graphs, prepared.prefills, prepared.capacity, spec.max_step_tokens, device
    )
    return Started(runner, loaded, prepared.capacity, prepared.attention, report)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All that does not ask what the weights are."""

    program: Program
    graphs: DecodeGraphs
    prefills: PrefillGraphs
    capacity: Capacity
    attention: tuple[str, ...]


def _prepare(
    spec: ModelSpec,
    unset: UnsetModel,
    device: torch.device,
    progress: Progress,
    report: StartReport,
    loading: Loading,
) -> _Prepared:
    """Room, kernels and graphs, while the weights are loaded into their places."""
    group, model = unset.group, unset.model
    if device.type == "cuda":
        with report.stage("products", device):
            model.tune([spec.max_step_tokens], TUNE_SECONDS, head=False)
            torch.cuda.empty_cache()
    with report.stage("attention", device), group.together():
        loading.check()
        prefill = _choose_prefill(spec, unset, device)
    longest = longest_sequence(spec, unset.config)
    shape = PageShape.of(unset.shard, spec.block_tokens, unset.dtype)
    with report.stage("profile", device), group.together():
        loading.check()
        blocks = _count_blocks(spec, unset, shape, longest, prefill, device, report)
    blocks = group.least(blocks)
    longest = min(longest, blocks * spec.block_tokens)
    capacity = Capacity(spec.max_sequences, longest, spec.block_tokens, blocks, unset.config.vocab_size)
    with report.stage("pages", device), group.together():
        pages = allocate_pages(shape, blocks + 1, device)
    report.bytes["pages"] = (blocks + 1) * shape.block_bytes
    few = computes_few_rows(device, unset.dtype)
    program = Program(model, pages, capacity, spec.max_step_tokens, device, prefill, few_rows=few, group=group)
    graphs, prefills = DecodeGraphs(program), PrefillGraphs(program)
    if device.type == "cuda":
        with torch.inference_mode():
            _launch_and_capture(spec, program, graphs, prefills, longest, progress, report, loading)
    return _Prepared(program, graphs, prefills, capacity, prefill.names)


def _launch_and_capture(
    spec: ModelSpec,
    program: Program,
    graphs: DecodeGraphs,
    prefills: PrefillGraphs,
    longest: int,
    progress: Progress,
    report: StartReport,
    loading: Loading,
) -> None:
    device = program.state.arena.device
    with report.stage("warm_up", device):
        warm_up(program, spec.max_step_tokens, longest)
    if not spec.cuda_graphs:
        return
    with report.stage("products", device):
        decodes = [rows for rows in graph_sizes(spec.max_sequences) if rows >= TUNED_ROWS]
        prompts = [rows for rows in _prefill_sizes(spec) if rows >= TUNED_ROWS and rows not in decodes]
        program.model.tune(decodes, TUNE_SECONDS)
        program.model.tune(prompts, TUNE_SECONDS, head=False)
    loading.check()
    with report.stage("graphs", device):
        recorder = Recorder(device)
        program.group.before_close(recorder.drop)
        report.bytes["graphs"] = _capture(recorder, graphs, prefills, spec, device, progress)


def computes_few_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether steps of few rows have kernels of their own: not in the reference mode, float32.

    There all steps are computed by the same kernels, so that nothing depends on the company that a sequence has.
    """
    return device.type == "cuda" and dtype == torch.bfloat16


def _choose_prefill(spec: ModelSpec, unset: UnsetModel, device: torch.device) -> Prefill:
    config = unset.shard
    shape = AttentionShape(device, unset.dtype, config.heads, config.kv_heads, config.head_dim, spec.block_tokens)
    return choose_prefill(spec.attention_backend, shape)


def _capture(
    recorder: Recorder,
    graphs: DecodeGraphs,
    prefills: PrefillGraphs,
    spec: ModelSpec,
    device: torch.device,
    progress: Progress,
) -> int:
    """Capture all graphs; the bytes that they took."""
    free, sizes, done = torch.cuda.mem_get_info(device)[0], _graphs(spec), 0

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
    return len(graph_sizes(spec.max_sequences)) + len(_prefill_sizes(spec))


def _prefill_sizes(spec: ModelSpec) -> list[int]:
    return PrefillGraphs.sizes(spec.max_sequences + spec.max_step_tokens, spec.max_sequences)


def _count_blocks(
    spec: ModelSpec,
    unset: UnsetModel,
    shape: PageShape,
    longest: int,
    prefill: Prefill,
    device: torch.device,
    report: StartReport,
) -> int:
    if device.type != "cuda":
        room = Budget(spec.kv_cache_bytes or 1 << 30, 0, 0, 0, 1.0)
        return count_device_blocks(spec, shape, longest, room)
    report.bytes["step"] = step = _profile(spec, unset, shape, longest, prefill, device)
    free, total = torch.cuda.mem_get_info(device)
    graphs = GRAPH_BYTES * _graphs(spec) if spec.cuda_graphs else 0
    return count_device_blocks(
        spec, shape, longest, Budget(total, total - free, step, graphs, spec.gpu_memory_utilization)
    )


@torch.inference_mode()
def _profile(
    spec: ModelSpec, unset: UnsetModel, shape: PageShape, longest: int, prefill: Prefill, device: torch.device
) -> int:
    """The most bytes that state and a full step take beside weights and pages: measured with a pool of one block.

    Three layers take as much as all, which use the same memory one after another.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    capacity = Capacity(spec.max_sequences, longest, spec.block_tokens, 1, unset.config.vocab_size)
    pages: tuple[LayerCache, ...] = allocate_pages(shape, 2, device)
    program = Program(unset.model, pages, capacity, spec.max_step_tokens, device, prefill, group=unset.group).shallow(3)
    if can_compile_ahead():
        with compiled_ahead(device):
            run_full_step(program, spec.max_step_tokens, longest)
    run_full_step(program, spec.max_step_tokens, longest)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del program, pages
    torch.cuda.empty_cache()
    return peak
