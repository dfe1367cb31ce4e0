"""Find the best cut of a step of few rows by measuring whole steps: coordinate descent from the default.

A kernel alone tells little: in a step each one begins while the one before it still runs. So a candidate differs from
the best so far in one thing, and what is timed is a captured step of all layers, again and again, its state growing as
it does when it serves. A candidate may win only if its logits are as near to a float32 reference as the default's are:
a wrong kernel can be a fast one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from penstock.executor.layers.attention import LayerCache
from penstock.executor.layers.few_rows import StepWeights
from penstock.executor.worker.device.few_rows import FewRowsStep
from penstock.kernels.ahead import can_compile_ahead, compiled_ahead
from penstock.kernels.batch.state import LIVE, ArenaLayout, BatchState
from penstock.kernels.gemv.attention import FewRows, few_rows_attention_reference
from penstock.kernels.gemv.neighbours import alternatives, attention_alternatives
from penstock.kernels.gemv.product import gemv_reference
from penstock.kernels.gemv.shapes import CONTEXTS, PRODUCTS, StepShape, default_shape, starts
from penstock.kernels.gemv.tuned import Entry

TOKENS: Final = (256, 2048, 16_384)
"""For each of the classes of contexts the length at which it is measured: the middle of 128 prompt and 256 output
tokens, and twice and eight times as many for the others' typical work."""
BLOCK_TOKENS: Final = 64
STEPS: Final = 32
"""Replays of one measurement."""
ERROR_FACTOR: Final = 1.2
"""A candidate's error may be so much larger than the default's: both are roundings in another order."""
WORTH: Final = 0.999
"""Of the best time so far that a candidate must stay below: measurements differ by about as much."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A cut and what it was measured to be."""

    shape: StepShape
    ms: float
    error: float


class StepBench:
    """A model's steps of ``rows`` live rows around one context, over pages of their own with random keys and values."""

    def __init__(self, weights: StepWeights, rows: int, tokens: int) -> None:
        """Raises torch.OutOfMemoryError if the device has no room for the pages."""
        self.weights, self.rows, self.tokens = weights, rows, tokens
        sizes, like = weights.sizes, weights.embedding
        width = -(-(tokens + 8 * STEPS) // BLOCK_TOKENS)
        generator = torch.Generator(like.device).manual_seed(0)

        def pages() -> Tensor:
            shape = (rows * width + 1, BLOCK_TOKENS, sizes.kv_heads, sizes.head_dim)
            return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

        self.pages = [LayerCache(pages(), pages()) for _ in weights.layers]
        self.state = BatchState.allocate(ArenaLayout(rows, width, rows), like.device, scratch_block=rows * width)
        self.logits = torch.empty(rows, sizes.vocabulary, dtype=like.dtype, device=like.device)
        self.step = FewRowsStep(weights, self.pages, self.state, self.logits, rows)
        self._fill(width)
        self._start = self.state.arena.clone()

    def _fill(self, width: int) -> None:
        state, rows, device = self.state, self.rows, self.logits.device
        state.live[:rows] = LIVE
        state.computed[:rows] = self.tokens - 1
        state.max_tokens[:rows] = 2**30
        state.temperature[:rows] = 0.6
        state.seeds[:rows, 0] = torch.arange(rows, dtype=torch.int32, device=device)
        shuffled = torch.randperm(rows * width, generator=torch.Generator().manual_seed(1))
        state.block_tables[:rows] = shuffled.int().view(rows, width).to(device)
        state.row_slots[:rows] = torch.arange(rows, dtype=torch.int32, device=device)

    def restart(self) -> None:
        """Every row is where it was."""
        self.state.arena.copy_(self._start)

    def run(self, shape: StepShape) -> Tensor:
        """The logits of one step."""
        self.restart()
        self.logits.fill_(float("nan"))
        self.step.compute(self.rows, shape)
        return self.logits.float()

    def reference(self) -> Tensor:
        """The same in plain torch and float32, from what the pages hold: float32 [rows, vocabulary]."""
        self.restart()
        weights, state = self.weights, self.state
        sizes = weights.sizes
        stream = weights.embedding[state.last_token[: self.rows].long()].float()
        rows = FewRows(state.computed[: self.rows].clone(), state.row_slots[: self.rows].clone(), stream)
        for layer, cache in zip(weights.layers, self.pages, strict=True):
            qkv = stream.new_empty(self.rows, sizes.weight("qkv")[0])
            gemv_reference(stream, layer.qkv, qkv, norm=layer.attention_norm, bias=layer.qkv_bias)
            norms = layer.head_norms
            if norms is not None:
                norms = replace(norms, queries=norms.queries.float(), keys=norms.keys.float())
            attended = few_rows_attention_reference(
                qkv, rows, weights.cos_sin, norms, cache.keys.float(), cache.values.float(), state.block_tables,
                weights.scale,
            )  # fmt: skip
            gemv_reference(attended, layer.output, stream, add=True)
            inner = stream.new_empty(self.rows, sizes.inner)
            gemv_reference(stream, layer.gate_up, inner, norm=layer.feed_forward_norm, gated=True)
            gemv_reference(inner, layer.down, stream, add=True)
        logits = stream.new_empty(self.rows, sizes.vocabulary)
        gemv_reference(stream, weights.head, logits, norm=weights.norm)
        return logits

    def milliseconds(self, shape: StepShape, most: float = math.inf) -> float:
        """Of a captured step: the better of two means over STEPS replays; one that is far behind is not repeated."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.step.compute(self.rows, shape)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        best = math.inf
        for _ in range(2):
            self.restart()
            for _ in range(4):
                graph.replay()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            for _ in range(STEPS):
                graph.replay()
            end.record()
            end.synchronize()
            best = min(best, float(begin.elapsed_time(end)) / STEPS)
            if best > 1.02 * most:
                break
        return best


class Tuner:
    """Coordinate descent for one bench."""

    def __init__(self, bench: StepBench, limit_s: float, told: Callable[[str], None]) -> None:
        """``told`` is told a line for each improvement; nothing new is tried after ``limit_s`` seconds."""
        self._bench, self._told = bench, told
        self._deadline = time.monotonic() + limit_s
        self._reference = bench.reference()
        self._seen: set[StepShape] = set()
        self.most_error = math.inf
        """Of a candidate."""
        self.refused: list[tuple[StepShape, float]] = []
        """What was wrong, and its error."""
        self.tries = 0

    @torch.inference_mode()
    def measure(self, shape: StepShape, most_ms: float = math.inf) -> Tried | None:
        """None: it cannot be launched, or is wrong."""
        self._seen.add(shape)
        self.tries += 1
        try:
            error = self.error(self._bench.run(shape))
        except Exception as failure:  # noqa: BLE001  a cut that needs more than the device has fails in many ways
            self._told(f"cannot be launched: {type(failure).__name__}")
            return None
        if not error <= self.most_error:
            self.refused.append((shape, error))
            return None
        return Tried(shape, self._bench.milliseconds(shape, most_ms), error)

    def error(self, logits: Tensor) -> float:
        """Relative to the reference."""
        return float((logits - self._reference).norm() / self._reference.norm())

    def descend(self, start: Tried, *, attention_only: bool = False) -> Tried:
        """From ``start`` on, one thing at a time, until a whole round improves nothing."""
        best = start
        while True:
            before = best
            for part in ("attention", *(() if attention_only else PRODUCTS)):
                near = self._around(best.shape, part)
                self.compile(near)
                for shape in near:
                    if time.monotonic() > self._deadline:
                        return best
                    tried = self.measure(shape, best.ms)
                    if tried is not None and tried.ms < WORTH * best.ms:
                        best = tried
                        self._told(f"{best.ms:.4f} ms  {part} {getattr(best.shape, part)}")
            if best is before:
                return best

    def _around(self, shape: StepShape, part: str) -> list[StepShape]:
        sizes = self._bench.weights.sizes
        near = attention_alternatives(shape) if part == "attention" else alternatives(shape, sizes, part)
        return [one for one in near if one not in self._seen]

    def compile(self, shapes: Sequence[StepShape]) -> None:
        """Side by side: one after another it would take longer than to measure them."""
        if can_compile_ahead():
            part = self._bench.step.shallow()
            with compiled_ahead(self._bench.logits.device):
                for shape in shapes:
                    part.compute(self._bench.rows, shape)


def tokens_of(weights: StepWeights, context: int) -> int | None:
    """The length at which steps of this class of contexts are measured; None: the model's positions end before it."""
    shortest = CONTEXTS[context - 1] if context else 0
    tokens = min(TOKENS[context], weights.cos_sin.shape[0] - 2 * STEPS)
    return tokens if tokens > shortest else None


@torch.inference_mode()
def tune(
    weights: StepWeights, rows: int, context: int, *, near: StepShape | None, limit_s: float, measured: str,
    told: Callable[[str], None],
) -> Entry | None:  # fmt: skip
    """The best cut found within ``limit_s`` seconds.

    None: these kernels do not take the model, or it has no such contexts (:func:`tokens_of`).
    ``near``: the best cut of a shorter context, of which all but attention is kept; None: everything is looked for.
    ``measured``: see :class:`penstock.kernels.gemv.tuned.Entry`. Raises RuntimeError if the default is wrong or cannot
    be launched.
    """
    default = default_shape(weights.sizes, rows, context)
    tokens = tokens_of(weights, context)
    if default is None or tokens is None:
        return None
    tuner = Tuner(StepBench(weights, rows, tokens), limit_s, told)
    plain = tuner.measure(default)
    if plain is None or not math.isfinite(plain.error):
        raise RuntimeError(f"the default cut for {rows} rows of this model is wrong")
    tuner.most_error = ERROR_FACTOR * plain.error
    others = starts(weights.sizes, rows, context) if near is None else [replace(near, attention=default.attention)]
    found = [plain]
    tuner.compile(others)
    for shape in others:
        tried = tuner.measure(shape)
        found += [] if tried is None else [tried]
    best = tuner.descend(min(found, key=lambda tried: tried.ms), attention_only=near is not None)
    return Entry(
        weights.sizes, rows, context, best.shape, round(best.ms, 5), round(plain.ms, 5), tokens,
        round(best.error, 5), round(plain.error, 5), measured,
    )  # fmt: skip
