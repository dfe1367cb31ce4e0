"""No step of a running worker launches a kernel that the start did not compile, or a product it has not had.

Nothing is computed here: what is launched is written down, as what Triton tells kernels apart by, and the shapes of
products, by which the matrix library chooses a kernel and loads it.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.executor.layers.matmul import Products
from penstock.executor.models.config import ModelConfig, RopeConfig
from penstock.executor.models.registry import build_model
from penstock.executor.worker.device.attention import ChunkRows
from penstock.executor.worker.device.prefill import AUTO, FLASH_ONLY, Kernel, Prefill, Rule
from penstock.executor.worker.device.program import MixedStep, Program
from penstock.executor.worker.device.sizes import graph_size, graph_sizes, step_size
from penstock.executor.worker.device.warm_up import run_full_step, warm_up
from penstock.executor.worker.kv_cache import PageShape, allocate_pages
from penstock.executor.worker.slots import Capacity
from penstock.kernels import dispatch, overlap
from penstock.kernels.attention.chunks import AttendChunks, Chunks
from penstock.kernels.attention.decode_shapes import Spread
from penstock.kernels.attention.flash import LONE_ROWS, MOST_SEQUENCES

SMALL = {"hidden_size": 1024, "intermediate_size": 3072, "heads": 16, "kv_heads": 8, "architecture": "Qwen3ForCausalLM"}
LARGE = {"hidden_size": 4096, "intermediate_size": 8192, "heads": 32, "kv_heads": 8}
ODD = {"hidden_size": 2560, "intermediate_size": 6912, "heads": 20, "kv_heads": 4, "head_dim": 80}
BIASED = {"hidden_size": 896, "intermediate_size": 4864, "heads": 14, "kv_heads": 2, "head_dim": 64, "qkv_bias": True}
FEW_HEADS = {"hidden_size": 1536, "intermediate_size": 4096, "heads": 12, "kv_heads": 2}


@dataclass(slots=True)
class Launches:
    """What was launched."""

    kernels: set[str] = field(default_factory=set)
    ahead: set[str] = field(default_factory=set)
    """Compiled without being launched."""
    products: set[str] = field(default_factory=set)

    def add(self, kernel: Any, *args: object, grid: object, warmup: bool, **options: object) -> None:
        """In the place of :meth:`triton.JITFunction.run`."""
        _, specialization, chosen = binder(kernel)(*args, debug=False, **options)
        known = self.ahead if warmup else self.kernels
        known.add(f"{kernel.__name__} {specialization} {chosen}")

    def add_product(self, how: str, x: Tensor, weight: Tensor) -> None:
        """Of no rows nothing is launched."""
        if x.shape[0]:
            self.products.add(f"{how} {tuple(x.shape)} {tuple(weight.shape)}")


@functools.cache
def binder(kernel: Any) -> Any:
    """What Triton makes of the arguments of a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """On what the start and the steps believe to be a Hopper GPU."""
    if dispatch.INTERPRETED:
        pytest.skip("an interpreted kernel is not compiled")
    jit = pytest.importorskip("triton.runtime.jit")
    found = Launches()
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    monkeypatch.setattr(overlap, "can_overlap", lambda: True)
    monkeypatch.setattr("penstock.executor.worker.device.warm_up.can_compile_ahead", lambda: True)
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, **options: found.add(self, *args, **options))

    def product(
        _: Products, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        found.add_product("written", x, weight)
        return x.new_empty(x.shape[0], weight.shape[0]) if out is None else out

    def add_to(_: Products, residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        found.add_product("added", x, weight)
        return residual

    monkeypatch.setattr(Products, "__call__", product)
    monkeypatch.setattr(Products, "add_to", add_to)
    return found


def program_of(slots: int, step_tokens: int, prefill: Prefill | None = None, **shape: Any) -> Program:
    """Of three layers; its parameters are whatever the memory held."""
    fixed: dict[str, Any] = {
        "architecture": "LlamaForCausalLM", "vocab_size": 640, "layers": 3, "head_dim": 128, "max_positions": 4096,
        "window": None, "norm_eps": 1e-5, "rope": RopeConfig(), "tied_head": True, "qkv_bias": False,
        "output_bias": False, "mlp_bias": False, "eos_ids": (), "dtype": "bfloat16",
    }  # fmt: skip
    config = ModelConfig(**fixed | shape)
    device = torch.device("cpu")
    model = build_model(config, torch.bfloat16, device)
    model.absorb_norms()
    capacity = Capacity(slots, 4096, 64, 1, config.vocab_size)
    pages = allocate_pages(PageShape.of(config, 64, torch.bfloat16), 2, device)
    return Program(model, pages, capacity, step_tokens, device, prefill, few_rows=True)


def mixed(program: Program, decodes: int, lengths: list[int], completing: int, spread: Spread, filtered: bool) -> None:
    """A step that computes known ids."""

    def column(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32)

    rows, samples = step_size(decodes + sum(lengths), program.max_rows) - decodes, decodes + completing
    chosen = column(graph_size(samples, program.layout.slots) if samples else 0)
    chunks = ChunkRows(column(len(lengths)), column(len(lengths) + 1), column(len(lengths)), max(lengths))
    step = MixedStep(column(rows), column(rows), column(rows), chunks, chosen, column(samples))
    program.mixed(decodes, step, spread=spread)
    if samples:
        program.choose_mixed(step, filtered=filtered)


def run_decodes(program: Program) -> None:
    """Steps of all sizes, as if there were no graphs."""
    program.apply(torch.zeros(6, dtype=torch.int32))
    for rows in graph_sizes(program.layout.slots):
        for spread in Spread:
            program.decode(rows, spread=spread)
        for filtered in (False, True):
            program.choose(rows, filtered=filtered)
    if program.few_rows is not None:
        for rows, context in program.few_rows.shapes:
            program.few_rows.run(rows, context)


def run_mixed(program: Program, step_tokens: int) -> None:
    """Steps of many numbers of rows, and of random ones."""
    slots, source = program.layout.slots, random.Random(3)
    for rows in [*range(1, 161), 200, 255, 256, 300, 511, 512, 513, 700, step_tokens]:
        if rows <= step_tokens:
            mixed(program, 0, [rows], source.choice([0, 1]), Spread.EVEN, filtered=False)
    for _ in range(600):
        decodes = min(source.choice([0, 1, 3, 9, 20, 36, 50, 100, 200]), slots - 1)
        chunks = source.randint(1, min(slots - decodes, 12))
        longest = source.choice([3, 17, 40, (step_tokens - decodes) // chunks])
        lengths = [source.randint(1, longest) for _ in range(chunks)]
        completing = source.randint(0, chunks)
        mixed(program, decodes, lengths, completing, source.choice(list(Spread)), source.random() < 0.5)


@pytest.mark.parametrize(
    ("shape", "slots", "step_tokens", "longest"),
    [
        pytest.param(SMALL, 256, 1024, 4096, id="small"),
        pytest.param(SMALL, 37, 1024, 4096, id="small, few slots"),
        pytest.param(LARGE, 256, 1024, 4096, id="large"),
        pytest.param(LARGE, 100, 512, 4096, id="large, small steps"),
        pytest.param(ODD, 256, 1024, 200, id="odd, short sequences"),
        pytest.param(LARGE, 4, 1024, 4096, id="large, few slots"),
        pytest.param(FEW_HEADS, 64, 1024, 4096, id="few heads"),
        pytest.param(BIASED, 64, 1024, 4096, id="biases"),
    ],
)
@torch.inference_mode()
def test_nothing_is_compiled_or_loaded_after_the_start(
    launches: Launches, shape: dict[str, Any], slots: int, step_tokens: int, longest: int
) -> None:
    program = program_of(slots, step_tokens, **shape)
    warm_up(program, step_tokens, longest)
    compiled, loaded = set(launches.kernels), set(launches.products)
    assert len(compiled) > 20
    assert len(compiled - launches.ahead) < 4
    assert any(kernel.startswith("gemv_kernel") for kernel in compiled) == (shape is not ODD)
    run_mixed(program, step_tokens)
    assert sorted(launches.products - loaded) == []
    run_decodes(program)
    assert sorted(launches.kernels - compiled) == []


@dataclass(frozen=True)
class Foreign:
    """Stands for a backend of another library: notes of whom it was asked."""

    name: str
    lone_only: bool
    met_rows: tuple[int, ...]
    asked: list[tuple[int, int]] = field(default_factory=list, compare=False)
    """Sequences, rows of the longest."""

    def bind(self, chunks: Chunks) -> AttendChunks:
        def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
            self.asked.append((chunks.slots.numel(), chunks.longest))

        return attend


@pytest.mark.parametrize("rules", [pytest.param(AUTO, id="auto"), pytest.param(FLASH_ONLY, id="flash_attn")])
@torch.inference_mode()
def test_kernels_that_few_steps_choose_are_met(launches: Launches, rules: tuple[Rule, ...]) -> None:
    """Our own for more sequences than flash-attn takes, flash-attn's for one whole prompt."""
    pages, lone = Foreign("pages", False, (16,)), Foreign("lone", True, (LONE_ROWS,))
    prefill = Prefill(rules, {Kernel.FLASH: pages, Kernel.FLASH_LONE: lone}, 16)
    program = program_of(MOST_SEQUENCES + 40, 8192, prefill, **SMALL)
    warm_up(program, 8192, 4096)
    compiled = set(launches.kernels)
    assert (1, 16) in pages.asked
    assert (1, LONE_ROWS) in lone.asked
    asked = len(pages.asked)
    for longest in (3, 24):
        mixed(program, 0, [longest] * (MOST_SEQUENCES + 1), 0, Spread.EVEN, filtered=False)
    assert len(pages.asked) == asked
    assert sorted(launches.kernels - compiled) == []


def most_bytes(program: Program, step_tokens: int) -> int:
    """The most memory that a full step holds at a time, beside what it found."""
    with torch.inference_mode():
        run_full_step(program, step_tokens, 4096)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
            run_full_step(program, step_tokens, 4096)
    memory = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes: list[int] = [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def test_three_layers_take_as_much_memory_as_all() -> None:
    """And two do not: what the start measures is what pages may not have."""
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 8192, "heads": 4, "kv_heads": 2, "head_dim": 64}
    program = program_of(8, 512, **wide, layers=6)
    whole = most_bytes(program, 512)
    assert most_bytes(program.shallow(3), 512) == whole
    assert most_bytes(program.shallow(2), 512) < whole
