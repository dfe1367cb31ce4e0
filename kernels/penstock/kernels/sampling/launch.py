"""The launches of the sampling tail. Imported where Triton is."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from penstock.kernels.ahead import launch
from penstock.kernels.batch.state import MAX_STOP_IDS, BatchState
from penstock.kernels.overlap import launch_options, overlaps
from penstock.kernels.sampling.filter_kernel import survey, threshold
from penstock.kernels.sampling.finish_kernel import finish
from penstock.kernels.sampling.reference import TILE
from penstock.kernels.sampling.tail import FAILED, INERT, MADE, PEAK, TailOutput
from penstock.kernels.sampling.weigh_kernel import weigh

PROGRAMS = 8448
"""At most so many programs, unless there are more rows: 64, of one warp each, for each multiprocessor of an H200.

That is twice as many as run at a time: the last ones are short, and all end together.
"""
SURVEY_TILE = 4096
BLOCK = 4096
"""Logits that the program of one row looks at together."""


def launch_tail(logits: Tensor, slots: Tensor, state: BatchState, out: TailOutput, *, filtered: bool) -> None:
    """:func:`penstock.kernels.sampling.tail.sample_step` by its kernels."""
    rows, vocab = logits.shape
    if filtered:
        _find_floors(logits, slots, state, out)
    chunks, tiles = chunks_of(rows, vocab, TILE)
    weights, stride = out.weights, out.weights.stride(0)
    launch(weigh, (chunks, rows))(
        logits, logits.stride(0), slots,
        state.live, state.outputs, state.min_tokens, state.stop_count, state.stop_ids, state.temperature,
        out.floors, weights, stride, vocab, tiles,
        FILTERED=filtered, STOP_IDS=MAX_STOP_IDS, TILE=TILE, OVERLAP=overlaps(rows),
        num_warps=1, **launch_options(rows),
    )  # fmt: skip
    launch(finish, (rows,))(
        logits, logits.stride(0), slots, weights, stride, out.floors,
        state.live, state.last_token, state.computed, state.outputs, state.min_tokens, state.max_tokens,
        state.stop_count, state.stop_ids, state.temperature, state.seeds, state.sample_index,
        out.tokens, out.status, vocab, triton.cdiv(vocab, TILE),
        FILTERED=filtered, TILES=max(4, triton.next_power_of_2(stride)), TILE=TILE, STOP_IDS=MAX_STOP_IDS,
        INERT=INERT, MADE=MADE, FAILED=FAILED, OVERLAP=overlaps(rows), num_warps=4, **launch_options(rows),
    )  # fmt: skip


def _find_floors(logits: Tensor, slots: Tensor, state: BatchState, out: TailOutput) -> None:
    rows, vocab = logits.shape
    chunks, tiles = chunks_of(rows, vocab, SURVEY_TILE)
    peak_stride = out.peaks.stride(0)
    launch(survey, (chunks, rows))(
        logits, logits.stride(0), slots,
        state.live, state.outputs, state.min_tokens, state.stop_count, state.stop_ids,
        state.temperature, state.top_k, state.top_p, state.min_p,
        out.peaks, peak_stride, vocab, tiles,
        STOP_IDS=MAX_STOP_IDS, TILE=SURVEY_TILE, PEAK=PEAK, num_warps=8,
    )  # fmt: skip
    candidates = out.candidates.view(logits.dtype)
    launch(threshold, (rows,))(
        logits, logits.stride(0), slots,
        state.live, state.outputs, state.min_tokens, state.stop_count, state.stop_ids,
        state.temperature, state.top_k, state.top_p, state.min_p,
        out.peaks, peak_stride, candidates, candidates.stride(0), out.cursors, out.floors, vocab,
        STOP_IDS=MAX_STOP_IDS, CANDIDATES=out.candidates.shape[1], PEAKS=triton.next_power_of_2(peak_stride),
        BLOCK=BLOCK, SHIFT=16 if logits.dtype == torch.bfloat16 else 0, num_warps=16,
    )  # fmt: skip


def chunks_of(rows: int, vocab: int, tile: int) -> tuple[int, int]:
    """Into how many chunks a row is split, and how many tiles each of them has."""
    whole = triton.cdiv(vocab, tile)
    tiles = triton.cdiv(whole, max(1, PROGRAMS // rows))
    return triton.cdiv(whole, tiles), tiles
