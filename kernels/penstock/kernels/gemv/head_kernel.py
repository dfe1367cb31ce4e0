# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated"
# ruff: noqa: RUF005, B007, SIM108  Triton adds tuples, knows no unpacking, and wants what is constant in an if
"""The kernels of :mod:`penstock.kernels.gemv.head`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch
from penstock.kernels.batch.state import MAX_STOP_IDS, BatchState
from penstock.kernels.gemv.head import KEPT, FewTokens
from penstock.kernels.gemv.product import Norm
from penstock.kernels.gemv.product_kernel import products_of, squares_of
from penstock.kernels.gemv.shapes import GemvShape, vector
from penstock.kernels.overlap import launch_options, overlaps
from penstock.kernels.overlap_kernel import release_next, wait_for_previous
from penstock.kernels.sampling.finish_kernel import advance, entry_of_tile, lowest_of_best
from penstock.kernels.sampling.forbid_kernel import forbid, forbidden_stops
from penstock.kernels.sampling.noise_kernel import LN2, gumbel, log2
from penstock.kernels.sampling.reference import LOG2_E, STEEPEST, TILE, TILE_LEVEL
from penstock.kernels.sampling.tail import FAILED, INERT, MADE

_LOG2_E = tl.constexpr(LOG2_E)
_STEEPEST = tl.constexpr(STEEPEST)
_TILE_LEVEL = tl.constexpr(TILE_LEVEL)


@triton.jit
def steepness_of(warmth):
    """The factor of logits in powers of two; a greedy row is weighed as if at temperature 1."""
    return tl.minimum(1.0 / tl.where(warmth > 0, warmth, 1.0), _STEEPEST) * _LOG2_E


@triton.jit(
    do_not_specialize_on_alignment=["row_slots", "outputs", "min_tokens", "stop_count", "stop_ids", "temperature"]
)
def head_kernel(
    stream, head, norm_weight, eps, row_slots, outputs, min_tokens, stop_count, stop_ids, temperature,
    logits, peaks, masses, vocabulary,
    ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUT_TILE: tl.constexpr, INPUT_TILE: tl.constexpr,
    VECTOR: tl.constexpr, AHEAD: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr, STOP_IDS: tl.constexpr,
    RAGGED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The logits of OUTPUT_TILE entries, and their weight; ``peaks``, ``masses`` [ROWS, PARTS]."""
    part = tl.program_id(0)
    entry = part * OUTPUT_TILE + tl.arange(0, OUTPUT_TILE)
    place = tl.arange(0, INPUT_TILE)
    # Beyond the vocabulary the last entry stands in: it is not stored, and not weighed.
    known = tl.minimum(entry, vocabulary - 1) if RAGGED else entry
    source = head + known.to(tl.int64)[:, None] * INPUTS + place[None, :]
    TILES: tl.constexpr = INPUTS // INPUT_TILE
    release_next(OVERLAP)
    ahead = ()
    for tile in tl.static_range(AHEAD):
        ahead = ahead + (tl.load(source + tile * INPUT_TILE),)
    wait_for_previous(OVERLAP)

    sums = ()
    squares = ()
    for row in tl.static_range(ROWS):
        sums = sums + (tl.zeros([OUTPUT_TILE, INPUT_TILE // VECTOR], tl.float32),)
        squares = squares + (tl.zeros([INPUT_TILE // VECTOR], tl.float32),)
    for tile in tl.static_range(TILES):
        if tile < AHEAD:
            weights = ahead[tile].to(tl.float32)
        else:
            weights = tl.load(source + tile * INPUT_TILE).to(tl.float32)
        if SCALED:
            factor = tl.load(norm_weight + tile * INPUT_TILE + place).to(tl.float32)
        new_sums = ()
        new_squares = ()
        for row in tl.static_range(ROWS):
            value = tl.load(stream + row * INPUTS + tile * INPUT_TILE + place).to(tl.float32)
            new_squares = new_squares + (squares[row] + squares_of(value, INPUT_TILE, VECTOR),)
            if SCALED:
                value = value * factor
            new_sums = new_sums + (products_of(weights, value, sums[row], OUTPUT_TILE, INPUT_TILE, VECTOR),)
        sums = new_sums
        squares = new_squares
    for row in tl.static_range(ROWS):
        scale = tl.rsqrt(tl.sum(squares[row], 0) / INPUTS + eps)
        rounded = (tl.sum(sums[row], 1) * scale).to(logits.dtype.element_ty)
        tl.store(logits + row * vocabulary + entry, rounded, mask=entry < vocabulary)
        slot = tl.load(row_slots + row)
        steepness = steepness_of(tl.load(temperature + slot))
        value = rounded.to(tl.float32)
        residue = value * 0.0
        forbidden = forbidden_stops(slot, outputs, min_tokens, stop_count)
        if RAGGED or (forbidden > 0):
            value = forbid(value, entry, vocabulary, stop_ids + slot * STOP_IDS, forbidden)
        peak = tl.max(value, 0)
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        mass = tl.sum(tl.exp2((value - shift) * steepness) + residue, 0)
        tl.store(peaks + row * PARTS + part, peak)
        tl.store(masses + row * PARTS + part, mass)


@triton.jit(
    do_not_specialize_on_alignment=[
        "row_slots", "live", "last_token", "computed", "outputs", "min_tokens", "max_tokens", "stop_count", "stop_ids",
        "temperature", "seeds", "sample_index",
    ]
)  # fmt: skip
def choose_kernel(
    logits, row_slots, peaks, masses, live, last_token, computed, outputs, min_tokens, max_tokens, stop_count, stop_ids,
    temperature, seeds, sample_index, steps, kept, vocabulary, tiles,
    ROWS: tl.constexpr, PARTS: tl.constexpr, PARTS_OF_TILE: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
    STOP_IDS: tl.constexpr, KEPT: tl.constexpr, INERT: tl.constexpr, MADE: tl.constexpr, FAILED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program ``row`` keeps the token and the status of its row and advances its slot. TILES ≥ ``tiles``."""
    row = tl.program_id(0)
    slot = tl.load(row_slots + row)
    warmth = tl.load(temperature + slot)
    last = tl.load(computed + slot)
    sample = tl.load(sample_index + slot)
    low, high = tl.load(seeds + 2 * slot), tl.load(seeds + 2 * slot + 1)
    seed = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    noise = warmth * gumbel(tl.arange(0, TILES // 4), last + 1, sample, _TILE_LEVEL, seed, TILES)
    target = kept + ((tl.load(steps) - 1) % KEPT) * (2 * ROWS) + row
    alive = tl.load(live + slot)
    release_next(OVERLAP)
    wait_for_previous(OVERLAP)
    if alive == 0:
        tl.store(target, 0)
        tl.store(target + ROWS, INERT)
        return
    lanes = tl.arange(0, TILES)
    parts = row * PARTS + lanes[:, None] * PARTS_OF_TILE + tl.arange(0, PARTS_OF_TILE)[None, :]
    inside = (lanes < tiles)[:, None] & (parts - row * PARTS < PARTS)
    peak = tl.load(peaks + parts, mask=inside, other=float("-inf"))
    mass = tl.load(masses + parts, mask=inside, other=0.0)
    best = tl.max(peak, 1)
    shift = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(tl.exp2((peak - shift[:, None]) * steepness_of(warmth)) * mass, 1)
    weight = best + warmth * (LN2 * log2(tl.where(total == 0, 1.0, total)))
    weight = tl.where(total == total, weight, float("nan"))
    if tl.sum((weight != weight).to(tl.int32), axis=0) > 0:
        tl.store(live + slot, 0)
        tl.store(target, 0)
        tl.store(target + ROWS, FAILED)
        return

    tile = lowest_of_best(weight + noise, lanes)
    entries = tile * TILE + tl.arange(0, TILE)
    value = tl.load(logits + row * vocabulary + entries, mask=entries < vocabulary, other=0.0).to(tl.float32)
    stops = stop_ids + slot * STOP_IDS
    value = forbid(value, entries, vocabulary, stops, forbidden_stops(slot, outputs, min_tokens, stop_count))
    token = entry_of_tile(value, entries, tile, warmth, last + 1, sample, seed, TILE)
    advance(slot, token, last, live, last_token, computed, outputs, max_tokens, stop_count, stops, STOP_IDS)
    tl.store(target, token)
    tl.store(target + ROWS, MADE)


def head_and_choice_triton(
    stream: Tensor, head: Tensor, norm: Norm, state: BatchState, out: FewTokens, shape: GemvShape, count: int
) -> None:
    """See :func:`penstock.kernels.gemv.head.head_and_choice`."""
    vocabulary, hidden = head.shape
    programs = triton.cdiv(vocabulary, shape.outputs)
    launch(head_kernel, (programs,))(
        stream, head, norm.weight, norm.eps,
        state.row_slots, state.outputs, state.min_tokens, state.stop_count, state.stop_ids, state.temperature,
        out.logits, out.peaks, out.masses, vocabulary,
        count, hidden, shape.outputs, shape.inputs, vector(head.dtype), shape.ahead, norm.weight is not None, programs,
        MAX_STOP_IDS, vocabulary % shape.outputs != 0, overlaps(count),
        num_warps=shape.warps, **launch_options(count),
    )  # fmt: skip
    tiles = triton.cdiv(vocabulary, TILE)
    launch(choose_kernel, (count,))(
        out.logits, state.row_slots, out.peaks, out.masses,
        state.live, state.last_token, state.computed, state.outputs, state.min_tokens, state.max_tokens,
        state.stop_count, state.stop_ids, state.temperature, state.seeds, state.sample_index, out.steps, out.kept,
        vocabulary, tiles,
        out.kept.shape[2], programs, TILE // shape.outputs, max(4, triton.next_power_of_2(tiles)), TILE,
        MAX_STOP_IDS, KEPT, INERT, MADE, FAILED, overlaps(count),
        num_warps=32, **launch_options(count),
    )  # fmt: skip
