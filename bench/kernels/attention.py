"""What paged attention reaches: ``python bench/kernels/attention.py [decode|prefill|tune] [--out FILE]``.

``decode``: bytes of keys and values read a second, with the cut of the table, and their share of what a copy moves.
``prefill``: multiplications a second, counting what a causal row sees, and their share of a large product's, by each
backend that is installed, over pages of several sizes; and what the host takes to launch them.
``tune``: the best cut of decode for each batch; none counts whose result is wrong. Ends after ``--seconds``.

Block tables are shuffled. Layers take turns, so that none is in the L2 cache. A configuration that fails is reported
and skipped. One JSON line a figure; times are medians of replays of CUDA graphs.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from triton.errors import TritonError

from penstock.kernels.attention.chunks import AttentionShape, ChunkBackend, Chunks, LoneKernel, PagedKernel
from penstock.kernels.attention.decode import paged_decode_attention_reference
from penstock.kernels.attention.decode_kernel import paged_decode_attention_triton
from penstock.kernels.attention.decode_shapes import CUTS, DecodeShape, Spread, decode_shape
from penstock.kernels.attention.flash import FlashPages, FlashUnavailable, flash_library
from penstock.kernels.attention.prefill import paged_prefill_attention_reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cudnn_attention import CUDNN_ROWS, cudnn_lone, cudnn_refusal
from gpu_timing import Report, copy_rate, graph_s, product_rate

HEADS = {"qwen3-0.6b": 16, "llama-8b": 32}
"""Query heads; both have eight key/value heads of 128."""
KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 8, 128, 64
ROWS = (1, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256)
LENGTHS = (850, 2048, 8192)
PREFILLS = {
    **{f"1 x {rows}": [(0, rows)] for rows in (128, 256, 512, 1024, 2048, 4096, 8192)},
    "8 x 1024": [(0, 1024)] * 8,
    "16 x 128": [(0, 128)] * 16,
    "7 to 4096": [(0, rows) for rows in (7, 100, 513, 1500, 64, 2048, 4096, 1000)],
    "1 x 256 over 1024": [(1024, 256)],
    "1 x 512 over 4096": [(4096, 512)],
    "4 x 512 over 4096": [(4096, 512)] * 4,
    "1 x 2048 over 8192": [(8192, 2048)],
}
"""(cached tokens, rows) of each sequence."""
PAGE_TOKENS = (64, 128, 256)
"""Of the pages that prompts are attended over; decodes have the first."""
HOST_REPEATS = 20
TUNED_ROWS = (1, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
TILES = ((32, 4, 2), (64, 3, 2), (64, 2, 2), (32, 6, 2), (32, 3, 2), (64, 4, 4), (64, 3, 4), (32, 3, 1))
"""Tokens, stages, warps."""
SPLITS = ((1, 64), (2, 128), (4, 128), (8, 128), (16, 128), (32, 64), (16, 256))
"""Most chunks, tokens of a chunk at least."""
ROTATED_BYTES = 512 * 2**20
"""Keys and values that take turns: ten times the L2 cache."""
MOST_LAYERS = 64
WIDTH = 160
"""Of block tables."""
BOUND = 0.02
"""Of the relative error of what is measured."""
FAILURES = (RuntimeError, TritonError, AssertionError)
"""What a configuration that does not work may raise, CUDA's errors and flash-attn's among them."""


class Pages:
    """Keys and values of random numbers, enough for the largest case."""

    def __init__(self, tokens: int) -> None:
        """For so many tokens of one layer, or the same of several."""
        rotated = ROTATED_BYTES // (4 * KV_HEADS * HEAD_DIM)
        shape = (max(tokens, 2 * rotated) // BLOCK_TOKENS + 1024, BLOCK_TOKENS, KV_HEADS, HEAD_DIM)
        self._keys, self._values = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def layers(self, blocks: int) -> list[tuple[Tensor, Tensor]]:
        """As many layers of so many blocks as must take turns."""
        bytes_ = blocks * 2 * self._keys[0].nbytes
        count = min(MOST_LAYERS, -(-ROTATED_BYTES // bytes_), self._keys.shape[0] // blocks)
        parts = [slice(layer * blocks, (layer + 1) * blocks) for layer in range(count)]
        return [(self._keys[part], self._values[part]) for part in parts]


def shuffled_tables(lengths: Sequence[int], block_tokens: int = BLOCK_TOKENS) -> tuple[Tensor, int]:
    """Block tables int32 [sequences, WIDTH] of sequences of these lengths, and how many blocks they take."""
    counts = [-(-length // block_tokens) for length in lengths]
    blocks = torch.randperm(sum(counts), device="cuda").int()
    tables = torch.zeros(len(lengths), WIDTH, dtype=torch.int32, device="cuda")
    for table, own in zip(tables, blocks.cpu().split(counts), strict=True):  # type: ignore[no-untyped-call]
        table[: len(own)] = own
    return tables, len(blocks)


def relative_error(out: Tensor, wanted: Tensor) -> float:
    """Infinite where something was not computed."""
    error = float((out.double() - wanted.double()).norm() / wanted.double().norm())
    return error if error == error else float("inf")


class WrongResult(RuntimeError):
    """What was to be measured computes something else."""


@dataclass(frozen=True)
class Decode:
    """One decode batch."""

    query: Tensor
    layers: list[tuple[Tensor, Tensor]]
    tables: Tensor
    contexts: Tensor
    spread: Spread
    layer_bytes: int
    """Keys and values that one layer reads."""

    @classmethod
    def of(cls, pages: Pages, lengths: Sequence[int], heads: int) -> Decode:
        tables, blocks = shuffled_tables(lengths)
        query = torch.randn(len(lengths), heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        contexts = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        spread = Spread.of(max(lengths), sum(lengths), len(lengths))
        return cls(query, pages.layers(blocks), tables, contexts, spread, sum(lengths) * 4 * KV_HEADS * HEAD_DIM)

    @property
    def shape(self) -> DecodeShape:
        """The cut that the table has."""
        return decode_shape(len(self.query), KV_HEADS, self.query.dtype, self.spread)

    def measure(self, shape: DecodeShape) -> float:
        """Bytes a second. Raises WrongResult."""
        rows = torch.arange(len(self.query), dtype=torch.int32, device="cuda")
        out = torch.full_like(self.query, float("nan"))

        def attend(layer: tuple[Tensor, Tensor]) -> Tensor:
            return paged_decode_attention_triton(
                self.query, *layer, self.tables, rows, self.contexts, HEAD_DIM**-0.5, out=out, shape=shape
            )

        attend(self.layers[0])
        some = rows[:: max(1, len(rows) // 4)]
        wanted = paged_decode_attention_reference(
            self.query[some], *self.layers[0], self.tables, some, self.contexts[some], HEAD_DIM**-0.5
        )
        if not (relative_error(out[some], wanted) < BOUND and out.isfinite().all()):
            raise WrongResult(f"{shape}: relative error {relative_error(out[some], wanted)}")
        return self.layer_bytes * len(self.layers) / graph_s(lambda: [attend(layer) for layer in self.layers])


def mixed_lengths(rows: int) -> list[int]:
    """From 200 to 1500 tokens, longest first."""
    source = random.Random(rows)
    return sorted((source.randint(200, 1500) for _ in range(rows)), reverse=True)


def attempt(report: Report, what: dict[str, object], measure: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Report one measurement, or why there is none; returns what was reported."""
    try:
        figures = measure()
    except FAILURES as failure:
        figures = {"failed": reason(failure)}
    report(**what, **figures)
    return figures


def reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure)[:200]}"


def decode(pages: Pages, copied: float, report: Report) -> None:
    """The table's cuts, at equal and at mixed lengths."""
    for (model, heads), rows in itertools.product(HEADS.items(), ROWS):
        equal = {str(length): [length] * rows for length in LENGTHS}
        for name, lengths in (equal | {"mixed": mixed_lengths(rows)}).items():
            what: dict[str, object] = {"decode": model, "rows": rows, "lengths": name}
            attempt(report, what, partial(decode_figures, pages, lengths, heads, copied))


def decode_figures(pages: Pages, lengths: Sequence[int], heads: int, copied: float) -> dict[str, object]:
    case = Decode.of(pages, lengths, heads)
    rate = case.measure(case.shape)
    return {"tb_s": round(rate / 1e12, 3), "share_of_copy": round(rate / copied, 3), "cut": str(case.shape)}


def candidates() -> Iterator[DecodeShape]:
    """Those of the table first."""
    known = [shape for cuts in CUTS.values() for _, shape in cuts]
    others = [DecodeShape(*tile, splits, chunk) for (splits, chunk), tile in itertools.product(SPLITS, TILES)]
    yield from dict.fromkeys(known + others)


def tune(pages: Pages, copied: float, report: Report, model: str, seconds: float) -> None:
    """Every candidate at every batch, one candidate after another: whenever time ends, all batches saw the same."""
    deadline = time.monotonic() + seconds
    cases = {
        (rows, name): Decode.of(pages, lengths, HEADS[model])
        for rows in TUNED_ROWS
        for name, lengths in (("850", [850] * rows), ("mixed", mixed_lengths(rows)))
    }
    found: dict[tuple[int, str], list[tuple[float, DecodeShape]]] = {key: [] for key in cases}
    for shape in candidates():
        if time.monotonic() > deadline:
            break
        for key, case in cases.items():
            try:
                found[key].append((case.measure(shape), shape))
            except FAILURES as failure:
                report(tune=model, rows=key[0], lengths=key[1], cut=str(shape), failed=reason(failure))
    for key, tried in found.items():
        tried.sort(key=lambda entry: entry[0], reverse=True)
        table = next((rate for rate, shape in tried if shape == cases[key].shape), None)
        report(
            tune=model, rows=key[0], lengths=key[1], candidates=len(tried),
            best=[(round(rate / copied, 3), str(shape)) for rate, shape in tried[:3]],
            table=None if table is None else round(table / copied, 3),
        )  # fmt: skip


def prefill(pages: Pages, product: float, report: Report) -> None:
    """Chunks of prompts, by every backend that is there."""
    for (model, heads), (name, sequences) in itertools.product(HEADS.items(), PREFILLS.items()):
        found: list[tuple[float, str, int]] = []
        for block_tokens, backend in backends(heads, sequences, report):
            what: dict[str, object] = {
                "prefill": model,
                "sequences": name,
                "backend": backend.name,
                "page": block_tokens,
            }
            measure = partial(prefill_figures, pages, sequences, heads, block_tokens, backend, product)
            figures = attempt(report, what, measure)
            if "tflop_s" in figures:
                found.append((float(str(figures["tflop_s"])), backend.name, block_tokens))
        report(prefill=model, sequences=name, fastest=sorted(found, reverse=True))


def backends(heads: int, sequences: Sequence[tuple[int, int]], report: Report) -> Iterator[tuple[int, ChunkBackend]]:
    """Tokens of a page and who may attend these sequences over such pages; who may not is reported."""
    lone = len(sequences) == 1 and sequences[0][0] == 0
    for block_tokens in PAGE_TOKENS:
        yield block_tokens, PagedKernel()
        shape = AttentionShape(torch.device("cuda", 0), torch.bfloat16, heads, KV_HEADS, HEAD_DIM, block_tokens)
        try:
            library = flash_library(shape)
        except FlashUnavailable as refusal:
            report(flash_attn=None, page=block_tokens, reason=str(refusal))
        else:
            yield block_tokens, FlashPages(library)
            if lone and block_tokens == BLOCK_TOKENS:
                yield block_tokens, LoneKernel(f"{library.name}, no pages", library.alone, ())
        if lone and block_tokens == BLOCK_TOKENS and sequences[0][1] <= CUDNN_ROWS and cudnn_refusal(shape) is None:
            yield block_tokens, cudnn_lone()


@dataclass(frozen=True)
class Prompts:
    """Chunks of one step."""

    query: Tensor
    keys: Tensor
    values: Tensor
    chunks: Chunks
    rows: list[int]
    flop: int

    @classmethod
    def of(cls, pages: Pages, sequences: Sequence[tuple[int, int]], heads: int, block_tokens: int) -> Prompts:
        rows = [count for _, count in sequences]
        tables, blocks = shuffled_tables([cached + count for cached, count in sequences], block_tokens)
        keys, values = (
            part.view(-1, block_tokens, KV_HEADS, HEAD_DIM)
            for part in pages.layers(-(-blocks * block_tokens // BLOCK_TOKENS))[0]
        )
        contexts = torch.tensor([sum(sequence) for sequence in sequences], dtype=torch.int32, device="cuda")
        place = torch.arange(rows[0], device="cuda")
        chunks = Chunks(
            tables,
            torch.arange(len(rows), dtype=torch.int32, device="cuda"),
            torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32, device="cuda"),
            contexts,
            max(rows),
            tables[0].long()[place // block_tokens] * block_tokens + place % block_tokens,
            sum(cached for cached, _ in sequences),
        )
        query = torch.randn(sum(rows), heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        seen = sum(count * cached + count * (count + 1) // 2 for cached, count in sequences)
        return cls(query, keys, values, chunks, rows, 4 * HEAD_DIM * heads * seen)

    def error(self, out: Tensor) -> float:
        """Relative, of the last rows."""
        last, chunks = min(256, self.rows[-1]), self.chunks
        wanted = paged_prefill_attention_reference(
            self.query[-last:], self.keys, self.values, chunks.block_tables, chunks.slots[-1:],
            torch.tensor([0, last], device="cuda"), chunks.contexts[-1:], last, HEAD_DIM**-0.5,
        )  # fmt: skip
        return relative_error(out[-last:], wanted)


def prefill_figures(
    pages: Pages,
    sequences: Sequence[tuple[int, int]],
    heads: int,
    block_tokens: int,
    backend: ChunkBackend,
    product: float,
) -> dict[str, object]:
    """Of one layer, as the device computes it; ``bind_us``, ``host_us``: what the host takes for a step, for a layer.

    Raises WrongResult.
    """
    prompts = Prompts.of(pages, sequences, heads, block_tokens)
    out = torch.full_like(prompts.query, float("nan"))
    attend = backend.bind(prompts.chunks)

    def layer() -> None:
        attend(prompts.query, prompts.keys, prompts.values, HEAD_DIM**-0.5, out)

    layer()
    error = prompts.error(out)
    if not (error < BOUND and out.isfinite().all()):
        raise WrongResult(f"relative error {error}")
    bind_us, host_us = host_time_us(lambda: backend.bind(prompts.chunks)), host_time_us(layer)
    seconds = graph_s(layer)
    rate = prompts.flop / seconds
    return {
        "us": round(1e6 * seconds, 1), "tflop_s": round(rate / 1e12, 1), "share": round(rate / product, 3),
        "error": round(error, 5), "bind_us": round(bind_us, 1), "host_us": round(host_us, 1),
    }  # fmt: skip


def host_time_us(work: Callable[[], object]) -> float:
    """The median time that the host takes to launch it."""
    samples = []
    for _ in range(HOST_REPEATS):
        torch.cuda.synchronize()
        begun = time.perf_counter_ns()
        work()
        samples.append((time.perf_counter_ns() - begun) / 1000)
    torch.cuda.synchronize()
    return statistics.median(samples)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["decode", "prefill", "tune", "all"], default="all")
    parser.add_argument("--model", choices=list(HEADS), default="qwen3-0.6b", help="that the tuner takes")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the tuner (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append the lines to this file, too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    begun = time.monotonic()
    copied, product = copy_rate(), product_rate()
    report = Report("attention", arguments.out, copy_bytes_s=copied, product_flop_s=product)
    pages = Pages(max(ROWS) * max(LENGTHS))
    if arguments.what in ("decode", "all"):
        decode(pages, copied, report)
    if arguments.what in ("prefill", "all"):
        prefill(pages, product, report)
    if arguments.what in ("tune", "all"):
        tune(pages, copied, report, arguments.model, arguments.seconds)
    report(seconds=round(time.monotonic() - begun, 1))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("error: an NVIDIA GPU is needed")
    main()
