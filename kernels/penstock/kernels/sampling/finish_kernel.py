# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""From the weights of the tiles to the token of each row, and what the token means for its slot."""

import triton
import triton.language as tl

from penstock.kernels.overlap_kernel import wait_for_previous
from penstock.kernels.sampling.forbid_kernel import forbid, forbidden_stops
from penstock.kernels.sampling.noise_kernel import gumbel
from penstock.kernels.sampling.reference import ENTRY_LEVEL, TILE_LEVEL

_ENTRY_LEVEL = tl.constexpr(ENTRY_LEVEL)
_TILE_LEVEL = tl.constexpr(TILE_LEVEL)


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["slots"])
def finish(
    logits,  # [rows, vocabulary], rows logits_stride apart
    logits_stride,
    slots,  # int32 [rows]
    weights,  # float32 [rows, weights_stride]: what weigh wrote
    weights_stride,
    floors,  # float32 [rows]: entries below are not chosen
    live,  # columns of the state
    last_token,
    computed,
    outputs,
    min_tokens,
    max_tokens,
    stop_count,
    stop_ids,
    temperature,
    seeds,
    sample_index,
    tokens,  # out: int32 [rows]
    status,  # out: int32 [rows]
    vocabulary,
    tiles,
    FILTERED: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    STOP_IDS: tl.constexpr,
    INERT: tl.constexpr,
    MADE: tl.constexpr,
    FAILED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program ``row`` writes the token and the status of its row and advances its slot. TILES ≥ ``tiles``."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    wait_for_previous(OVERLAP)
    if tl.load(live + slot) == 0:
        tl.store(tokens + row, 0)
        tl.store(status + row, INERT)
        return
    lanes = tl.arange(0, TILES)
    weight = tl.load(weights + row * weights_stride + lanes, mask=lanes < tiles, other=float("-inf"))
    if tl.sum((weight != weight).to(tl.int32), axis=0) > 0:
        tl.store(live + slot, 0)
        tl.store(tokens + row, 0)
        tl.store(status + row, FAILED)
        return

    warmth = tl.load(temperature + slot)
    last = tl.load(computed + slot)
    sample = tl.load(sample_index + slot)
    low, high = tl.load(seeds + 2 * slot), tl.load(seeds + 2 * slot + 1)
    seed = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    quads = tl.arange(0, TILES // 4)
    tile = lowest_of_best(weight + warmth * gumbel(quads, last + 1, sample, _TILE_LEVEL, seed, TILES), lanes)

    entries = tile * TILE + tl.arange(0, TILE)
    value = tl.load(logits + row.to(tl.int64) * logits_stride + entries, mask=entries < vocabulary, other=0.0)
    value = value.to(tl.float32)
    stops = stop_ids + slot * STOP_IDS
    value = forbid(value, entries, vocabulary, stops, forbidden_stops(slot, outputs, min_tokens, stop_count))
    if FILTERED:
        value = tl.where(value >= tl.load(floors + row), value, float("-inf"))
    token = entry_of_tile(value, entries, tile, warmth, last + 1, sample, seed, TILE)
    advance(slot, token, last, live, last_token, computed, outputs, max_tokens, stop_count, stops, STOP_IDS)
    tl.store(tokens + row, token)
    tl.store(status + row, MADE)


@triton.jit
def entry_of_tile(value, entries, tile, warmth, position, sample, seed, TILE: tl.constexpr):
    """The entry that is chosen of a tile: ``value`` float32 [TILE] are the logits of ``entries``."""
    quads = tile * (TILE // 4) + tl.arange(0, TILE // 4)
    return lowest_of_best(value + warmth * gumbel(quads, position, sample, _ENTRY_LEVEL, seed, TILE), entries)


@triton.jit
def advance(
    slot, token, last, live, last_token, computed, outputs, max_tokens, stop_count, stops, STOP_IDS: tl.constexpr
):
    """The slot has made ``token``; a stop id or the last of its tokens ends it. ``stops``: where its stop ids begin."""
    made = tl.load(outputs + slot) + 1
    tl.store(outputs + slot, made)
    tl.store(computed + slot, last + 1)
    tl.store(last_token + slot, token)
    indexes = tl.arange(0, STOP_IDS)
    stop = tl.load(stops + indexes, mask=indexes < tl.load(stop_count + slot), other=-1)
    if (tl.max((stop == token).to(tl.int32), axis=0) > 0) | (made >= tl.load(max_tokens + slot)):
        tl.store(live + slot, 0)


@triton.jit
def lowest_of_best(scores, ids):
    """The lowest of the ``ids`` int32 [n] whose ``scores`` float32 [n] are the best."""
    return tl.min(tl.where(scores == tl.max(scores, axis=0), ids, 0x7FFFFFFF), axis=0)
