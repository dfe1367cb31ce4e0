"""What the small kernels between the products cost: ``python bench/kernels/fused.py [--sweep] [--out FILE]``.

Microseconds of one call, in a CUDA graph of calls whose operands take turns; the bytes that it reads and writes a
second; and their share of what a copy of 2 GiB reaches. Operands of up to a hundred rows stay in the L2 cache, as they
do behind the product that made them. A call on few rows is bound by the time that a kernel takes to begin and end:
the first figure is that of one which changes a single word.

``--sweep`` also tries other cuts of the kernels into programs. One JSON line a figure.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from penstock.kernels.activation import silu_mul
from penstock.kernels.batch.gather import StepRows, fill_rows, gather_rows
from penstock.kernels.batch.state import LIVE, ArenaLayout, BatchState
from penstock.kernels.batch.update import apply_words
from penstock.kernels.norm import add_rms_norm
from penstock.kernels.rope import rotate_and_store

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_timing import Report, copy_rate, graph_us

ROWS = (1, 8, 64, 128, 256, 8192)
BLOCK_TOKENS = 64
ROTATED_BYTES = 256 * 2**20
"""Operands that take turns: several times the L2 cache."""
MOST_TURNS = 64
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """What the kernels see of a model."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool


MODELS = {
    "qwen3-0.6b": Sizes(1024, 3072, 16, 8, 128, True),
    "llama-8b": Sizes(4096, 14336, 32, 8, 128, False),
}

SWEEPS: dict[str, tuple[str, list[Any]]] = {
    "add_rms_norm": ("penstock.kernels.norm_kernel.warps", [1, 2, 4, 8, 16]),
    "silu_mul": (
        "penstock.kernels.activation_kernel.program_shape",
        [(256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8)],
    ),
    "rotate_and_store": (
        "penstock.kernels.rope_kernel.program_shape",
        [(1, 1), (2, 1), (4, 1), (4, 2), (8, 2), (8, 4), (16, 2), (16, 4)],
    ),
}
"""The function that cuts each kernel, and what it may return."""


@dataclass(frozen=True)
class Work:
    """An operation on operands that take turns."""

    name: str
    bytes_moved: int
    """Of one call."""
    turns: list[Callable[[], object]]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device="cuda")


def integers(top: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(top, shape, dtype=dtype, device="cuda")


def turns_of(bytes_moved: int) -> range:
    return range(min(MOST_TURNS, max(2, -(-ROTATED_BYTES // bytes_moved))))


def norm_work(sizes: Sizes, rows: int) -> Work:
    moved = 4 * rows * sizes.hidden * DTYPE.itemsize
    weight = random(sizes.hidden)

    def turn() -> Callable[[], object]:
        x, residual = random(rows, sizes.hidden), random(rows, sizes.hidden)
        return lambda: add_rms_norm(x, residual, weight, 1e-6)

    return Work("add_rms_norm", moved, [turn() for _ in turns_of(moved)])


def silu_work(sizes: Sizes, rows: int) -> Work:
    moved = 3 * rows * sizes.inner * DTYPE.itemsize

    def turn() -> Callable[[], object]:
        gate_up = random(rows, 2 * sizes.inner)
        return lambda: silu_mul(gate_up)

    return Work("silu_mul", moved, [turn() for _ in turns_of(moved)])


def rope_work(sizes: Sizes, rows: int) -> Work:
    """Rows go to places all over the cache, as decodes do."""
    heads, kv_heads, head_dim = sizes.heads, sizes.kv_heads, sizes.head_dim
    moved = rows * ((2 * heads + 4 * kv_heads) * head_dim * DTYPE.itemsize + head_dim * 4 + 12)
    cos_sin = torch.randn(4096, head_dim, device="cuda")
    q_weight, k_weight = (random(head_dim), random(head_dim)) if sizes.qk_norm else (None, None)
    blocks = 1024
    keys, values = (torch.zeros(blocks, BLOCK_TOKENS, kv_heads, head_dim, dtype=DTYPE, device="cuda") for _ in "kv")

    def turn() -> Callable[[], object]:
        qkv = random(rows, (heads + 2 * kv_heads) * head_dim)
        positions, places = integers(4096, rows), torch.randperm(blocks * BLOCK_TOKENS, device="cuda")[:rows]
        return lambda: rotate_and_store(
            qkv, positions, cos_sin, q_weight, k_weight, 1e-6, keys, values, places, heads, kv_heads
        )

    return Work("rotate_and_store", moved, [turn() for _ in turns_of(moved)])


def batch_work(rows: int) -> Iterator[Work]:
    """The state's own kernels: no model in them, and next to no bytes."""
    width, chunk_rows = 65, 8192
    state = BatchState.allocate(ArenaLayout(256, width, 256), torch.device("cuda"), scratch_block=0)
    state.live[:256] = LIVE
    state.row_slots.copy_(torch.randperm(256, device="cuda"))
    out = StepRows.allocate(chunk_rows, torch.device("cuda"))
    offsets = torch.randperm(state.layout.words, dtype=torch.int32, device="cuda")[:rows]
    words = torch.stack((offsets, torch.zeros_like(offsets)), dim=1)
    if rows <= 256:
        yield Work("gather_rows", 40 * rows, [lambda: gather_rows(state, rows, BLOCK_TOKENS, out)] * MOST_TURNS)
    ids, positions, slots = integers(9999, rows), integers(64 * width, rows), integers(256, rows)

    def fill() -> None:
        fill_rows(state, out, 0, ids, positions, slots, BLOCK_TOKENS)

    yield Work("fill_rows", 32 * rows, [fill] * MOST_TURNS)
    scratch = torch.zeros_like(state.arena)
    yield Work("apply_words", 12 * rows, [lambda: apply_words(scratch, words)] * MOST_TURNS)


def turns_us(turns: list[Callable[[], object]]) -> list[float]:
    """Microseconds of one of ``turns``."""

    def work() -> None:
        for turn in turns:
            turn()

    return graph_us(work, len(turns))


def empty_us() -> float:
    """Microseconds of a kernel that changes one word, one after another in a graph."""
    arena, words = torch.zeros(4, dtype=torch.int32, device="cuda"), torch.zeros(1, 2, dtype=torch.int32, device="cuda")
    return statistics.median(turns_us([lambda: apply_words(arena, words)] * MOST_TURNS))


def figures(work: Work, rate: float) -> dict[str, object]:
    samples = turns_us(work.turns)
    us = statistics.median(samples)
    moved = work.bytes_moved / (1e-6 * us)
    return {
        "kernel": work.name,
        "us": round(us, 2),
        "tb_s": round(moved / 1e12, 3),
        "share": round(moved / rate, 3),
        "samples": [round(sample, 2) for sample in samples],
    }


def sweep(work: Work, rate: float) -> Iterator[dict[str, object]]:
    """The operation with its kernel cut otherwise."""
    function, cuts = SWEEPS[work.name]
    for cut in cuts:
        with patch(function, return_value=cut):
            found = figures(work, rate)
        yield {"cut": cut, **found}


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="other cuts of the kernels, too")
    parser.add_argument("--out", type=Path, help="append the lines to this file, too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rate = copy_rate()
    report = Report("fused", arguments.out, copy_bytes_s=rate)
    report(kernel="one that changes a word", us=round(empty_us(), 2))
    for (model, sizes), rows in itertools.product(MODELS.items(), ROWS):
        for make in (norm_work, silu_work, rope_work):
            work = make(sizes, rows)
            report(model=model, rows=rows, **figures(work, rate))
            if arguments.sweep:
                for found in sweep(work, rate):
                    report(model=model, rows=rows, **found)
    for rows in ROWS:
        for work in batch_work(rows):
            report(rows=rows, **figures(work, rate))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("error: an NVIDIA GPU is needed")
    main()
