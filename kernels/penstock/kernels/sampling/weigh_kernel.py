# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The weight of each tile of each row: how likely the next token is one of its entries."""

import triton
import triton.language as tl

from penstock.kernels.overlap_kernel import release_next, wait_for_previous
from penstock.kernels.sampling.forbid_kernel import forbid, forbidden_stops
from penstock.kernels.sampling.noise_kernel import LN2, log2
from penstock.kernels.sampling.reference import LOG2_E, STEEPEST

_LOG2_E = tl.constexpr(LOG2_E)
_STEEPEST = tl.constexpr(STEEPEST)


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["slots"])
def weigh(
    logits,  # [rows, vocabulary], rows logits_stride apart
    logits_stride,
    slots,  # int32 [rows]
    live,  # columns of the state
    outputs,
    min_tokens,
    stop_count,
    stop_ids,
    temperature,
    floors,  # float32 [rows]: entries below are not chosen
    weights,  # out: float32 [rows, weights_stride]: see tile_weight
    weights_stride,
    vocabulary,
    tiles,
    FILTERED: tl.constexpr,
    STOP_IDS: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (chunk, row) goes over the ``tiles`` tiles of its chunk. Rows that are not live write nothing."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    release_next(OVERLAP)
    wait_for_previous(OVERLAP)
    if tl.load(live + slot) == 0:
        return
    warmth = tl.load(temperature + slot)
    # A greedy row is weighed as if at temperature 1: of its weight only the largest logit remains.
    steepness = tl.minimum(1.0 / tl.where(warmth > 0, warmth, 1.0), _STEEPEST) * _LOG2_E
    forbidden = forbidden_stops(slot, outputs, min_tokens, stop_count)
    stops = stop_ids + slot * STOP_IDS
    floor = tl.load(floors + row) if FILTERED else float("-inf")
    logits += row.to(tl.int64) * logits_stride

    first = chunk * tiles
    last = tl.minimum(first + tiles, tl.cdiv(vocabulary, TILE))
    lanes = tl.arange(0, TILE)
    ahead = tl.load(logits + first * TILE + lanes, mask=first * TILE + lanes < vocabulary, other=0.0)
    for tile in range(first, last):
        entries = tile * TILE + lanes
        value = ahead.to(tl.float32)
        # The next tile comes while this one is weighed.
        inside = (entries + TILE < vocabulary) & (tile + 1 < last)
        ahead = tl.load(logits + TILE + entries, mask=inside, other=0.0)
        residue = value * 0.0
        if (forbidden > 0) | (tile * TILE + TILE > vocabulary):
            value = forbid(value, entries, vocabulary, stops, forbidden)
        if FILTERED:
            value = tl.where(value >= floor, value, float("-inf"))
        tl.store(weights + row * weights_stride + tile, tile_weight(value, residue, warmth, steepness))


@triton.jit
def tile_weight(value, residue, warmth, steepness):
    """``warmth · log Σ exp(value / warmth)`` of float32 [n]; the largest value if ``warmth`` is 0.

    -inf if all values are. ``residue`` [n] is 0 or NaN, and NaN anywhere makes the weight NaN.
    """
    best = tl.max(value, axis=0)
    shift = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(tl.exp2((value - shift) * steepness) + residue, axis=0)
    return best + warmth * (LN2 * log2(tl.where(total == 0, 1.0, total)))
