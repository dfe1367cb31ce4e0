# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The best perturbed logit of each chunk of each row."""

import triton
import triton.language as tl

from penstock.kernels.overlap_kernel import release_next, wait_for_previous
from penstock.kernels.sampling.noise_kernel import gumbel


@triton.jit
def forbidden_stops(slot, outputs, min_tokens, stop_count):
    """How many of the slot's stop ids may not be chosen yet: all of them until ``min_tokens`` are made."""
    early = tl.load(outputs + slot) < tl.load(min_tokens + slot)
    return tl.where(early, tl.load(stop_count + slot), 0)


@triton.jit
def forbid(values, ids, size, stop_ids, forbidden):
    """``values`` of the entries ``ids`` with -inf at the first ``forbidden`` stop ids, and beyond ``size``."""
    values = tl.where(ids < size, values, float("-inf"))
    for index in range(forbidden):
        values = tl.where(ids == tl.load(stop_ids + index), float("-inf"), values)
    return values


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["slots"])
def choose(
    logits,  # [rows, vocabulary], rows logits_stride apart
    logits_stride,
    slots,  # int32 [rows]
    live,  # columns of the state
    computed,
    outputs,
    min_tokens,
    stop_count,
    stop_ids,
    temperature,
    seeds,
    sample_index,
    floors,  # float32 [rows]: entries below are not chosen
    scores,  # out: float32 [rows, partials]: the best perturbed logit of each chunk
    ids,  # out: int32 [rows, partials]: its entry, the lowest of equals
    residues,  # out: float32 [rows, partials]: 0, or NaN where a logit is not finite
    partials,
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
    position = tl.load(computed + slot) + 1
    sample = tl.load(sample_index + slot)
    low, high = tl.load(seeds + 2 * slot), tl.load(seeds + 2 * slot + 1)
    seed = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    forbidden = forbidden_stops(slot, outputs, min_tokens, stop_count)
    stops = stop_ids + slot * STOP_IDS
    floor = tl.load(floors + row) if FILTERED else float("-inf")
    logits += row.to(tl.int64) * logits_stride

    # Each lane keeps the best of its own entries, which come in rising order, so that a later equal never wins.
    first = chunk * tiles * TILE
    lane = first + tl.arange(0, TILE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_start = tl.zeros([TILE], tl.int32)
    residue = tl.zeros([TILE], tl.float32)
    ahead = tl.load(logits + lane, mask=lane < vocabulary, other=0.0)
    for tile in range(tiles):
        begin = tile * TILE
        entries = lane + begin
        value = ahead.to(tl.float32)
        # The noise of a tile takes about as long as the logits of the next one need to come.
        inside = (entries + TILE < vocabulary) & (tile + 1 < tiles)
        ahead = tl.load(logits + TILE + entries, mask=inside, other=0.0)
        residue += value * 0.0
        if (forbidden > 0) | (first + begin + TILE > vocabulary):
            value = forbid(value, entries, vocabulary, stops, forbidden)
        if FILTERED:
            value = tl.where(value >= floor, value, float("-inf"))
        if warmth > 0:
            quads = (first + begin) // 4 + tl.arange(0, TILE // 4)
            value += warmth * gumbel(quads, position, sample, seed, TILE)
        better = value > best
        best = tl.where(better, value, best)
        best_start = tl.where(better, begin, best_start)

    score = tl.max(best, axis=0)
    out = row * partials + chunk
    tl.store(scores + out, score)
    tl.store(ids + out, tl.min(tl.where(best == score, lane + best_start, 0x7FFFFFFF), axis=0))
    tl.store(residues + out, tl.sum(residue, axis=0))
