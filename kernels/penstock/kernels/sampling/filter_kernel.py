# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The lowest logit that top-k, top-p and min-p leave in a row, without sorting it.

Logits are compared as *keys*: integers in the same order, 16 bits for bfloat16 and 32 for float32, so that a floor is
found by narrowing a range of keys and is exact. :func:`survey` finds the largest logit of each tile. Then one program a
row narrows in three ways, from cheap to dear:

1. The k-th largest of the tiles' peaks is a bound from below for the k-th largest logit; for top-p such a bound is the
   highest pivot whose logits hold the mass.
2. If no more than ``CANDIDATES`` logits reach the bound, they are gathered, and only they are searched.
3. Each pass over what is to be searched, candidates in registers or the whole row, measures three pivots and leaves a
   quarter of the range.

Counts and masses are integers: neither the order of additions nor other rows can change a floor. The masses are those
of :func:`penstock.kernels.sampling.reference.masses`.
"""

import triton
import triton.language as tl

from penstock.kernels.sampling.forbid_kernel import forbid, forbidden_stops
from penstock.kernels.sampling.reference import LOG2_E, STEEPEST, UNIT_MASS

_LOG2_E = tl.constexpr(LOG2_E)
_STEEPEST = tl.constexpr(STEEPEST)
_UNIT_MASS = tl.constexpr(UNIT_MASS)
_LEAST = tl.constexpr(float("-inf"))


@triton.jit
def _is_filtered(slot, live, temperature, top_k, top_p, min_p, vocabulary):
    """Whether the slot's next token is drawn from less than all."""
    drawn = (tl.load(live + slot) != 0) & (tl.load(temperature + slot) > 0)
    count = tl.load(top_k + slot)
    limited = (count > 0) & (count < vocabulary)
    return drawn & (limited | (tl.load(top_p + slot) < 1) | (tl.load(min_p + slot) > 0))


@triton.jit
def _key(value, SHIFT: tl.constexpr):
    """The int32 key of float32 values that have 32 - SHIFT significant bits; both zeros have one key."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    """The float32 value of an int32 key."""
    bits = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["slots"])
def survey(
    logits,  # [rows, vocabulary], rows logits_stride apart
    logits_stride,
    slots,  # int32 [rows]
    live,  # columns of the state
    outputs,
    min_tokens,
    stop_count,
    stop_ids,
    temperature,
    top_k,
    top_p,
    min_p,
    peaks,  # out: float32 [rows, peak_stride]: the largest logit of each PEAK entries
    peak_stride,
    vocabulary,
    tiles,
    STOP_IDS: tl.constexpr,
    TILE: tl.constexpr,
    PEAK: tl.constexpr,
):
    """Program (chunk, row) goes over the ``tiles`` tiles of its chunk. Rows without filters write nothing."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    if not _is_filtered(slot, live, temperature, top_k, top_p, min_p, vocabulary):
        return
    forbidden = forbidden_stops(slot, outputs, min_tokens, stop_count)
    stops = stop_ids + slot * STOP_IDS
    logits += row.to(tl.int64) * logits_stride
    COUNT: tl.constexpr = TILE // PEAK
    for tile in range(chunk * tiles, chunk * tiles + tiles):
        entries = tile * TILE + tl.arange(0, COUNT)[:, None] * PEAK + tl.arange(0, PEAK)[None, :]
        value = tl.load(logits + entries, mask=entries < vocabulary, other=_LEAST).to(tl.float32)
        value = forbid(value, entries, vocabulary, stops, forbidden)
        index = tile * COUNT + tl.arange(0, COUNT)
        tl.store(peaks + row * peak_stride + index, tl.max(value, axis=1), mask=index < peak_stride)


@triton.jit
def _kth_peak(keys, low, high, count):
    """The largest key, int64, that at least ``count`` of ``keys`` reach, or ``low``; all are below ``high``."""
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), axis=0) >= count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _gather(
    logits, vocabulary, stops, forbidden, floor, candidates, cursor,
    CANDIDATES: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Copies the logits whose keys reach ``floor`` to ``candidates``, in any order, and returns how many there are.

    What does not fit is counted only.
    """
    tl.store(cursor, 0)
    tl.debug_barrier()
    for start in range(0, vocabulary, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        raw = tl.load(logits + entries, mask=entries < vocabulary, other=_LEAST)
        value = forbid(raw.to(tl.float32), entries, vocabulary, stops, forbidden)
        reaches = (_key(value, SHIFT) >= floor.to(tl.int32)) & (entries < vocabulary)
        place = tl.atomic_add(cursor + tl.zeros_like(entries), 1, mask=reaches, sem="relaxed")
        tl.store(candidates + place, raw, mask=reaches & (place < CANDIDATES))
    tl.debug_barrier()
    return tl.load(cursor)


@triton.jit
def _narrow(low, high, key1, key2, key3, sum1, sum2, sum3, wanted):
    """The part of a range of keys, split by three pivots, in which the measure falls below ``wanted``."""
    above = tl.where(sum1 < wanted, key1, tl.where(sum2 < wanted, key2, tl.where(sum3 < wanted, key3, high)))
    below = tl.where(sum3 >= wanted, key3, tl.where(sum2 >= wanted, key2, tl.where(sum1 >= wanted, key1, low)))
    return below, above


@triton.jit
def _mass(value, best, steepness):
    return (tl.exp2((value - best) * steepness) * _UNIT_MASS).to(tl.int64)


@triton.jit
def _measure_row(
    logits, vocabulary, stops, forbidden, key1, key2, key3, best, steepness,
    MASS: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """How many logits reach each of three keys, or, with MASS, how much mass: three int64."""
    sum1 = tl.zeros([BLOCK], tl.int64)
    sum2 = tl.zeros([BLOCK], tl.int64)
    sum3 = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocabulary, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        value = tl.load(logits + entries, mask=entries < vocabulary, other=_LEAST).to(tl.float32)
        value = forbid(value, entries, vocabulary, stops, forbidden)
        key = _key(value, SHIFT)
        weight = _mass(value, best, steepness) if MASS else (entries < vocabulary).to(tl.int64)
        sum1 += tl.where(key >= key1.to(tl.int32), weight, 0)
        sum2 += tl.where(key >= key2.to(tl.int32), weight, 0)
        sum3 += tl.where(key >= key3.to(tl.int32), weight, 0)
    return tl.sum(sum1, axis=0), tl.sum(sum2, axis=0), tl.sum(sum3, axis=0)


@triton.jit
def _search_row(
    logits, vocabulary, stops, forbidden, low, high, wanted, best, steepness,
    MASS: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The largest key at which the row measures ``wanted``. ``low`` does, ``high`` (int64, both) does not."""
    while high - low > 1:
        step = (high - low + 3) // 4
        key1, key2, key3 = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        sum1, sum2, sum3 = _measure_row(
            logits, vocabulary, stops, forbidden, key1, key2, key3, best, steepness, MASS, BLOCK, SHIFT
        )
        low, high = _narrow(low, high, key1, key2, key3, sum1, sum2, sum3, wanted)
    return low


@triton.jit
def _search_held(value, weight, low, high, wanted, SHIFT: tl.constexpr):
    """The same of the candidates ``value`` that are held in registers, each worth its ``weight`` int64."""
    key = _key(value, SHIFT)
    while high - low > 1:
        step = (high - low + 3) // 4
        key1, key2, key3 = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        sum1 = tl.sum(tl.where(key >= key1.to(tl.int32), weight, 0), axis=0)
        sum2 = tl.sum(tl.where(key >= key2.to(tl.int32), weight, 0), axis=0)
        sum3 = tl.sum(tl.where(key >= key3.to(tl.int32), weight, 0), axis=0)
        low, high = _narrow(low, high, key1, key2, key3, sum1, sum2, sum3, wanted)
    return low


@triton.jit
def _top_k_floor(
    logits, vocabulary, stops, forbidden, tops, low, above, count, candidates, cursor,
    CANDIDATES: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The key of the ``count``-th largest logit, and how many candidates were to be set apart to find it."""
    bound = _kth_peak(_key(tops, SHIFT), low, above, count)
    held = _gather(logits, vocabulary, stops, forbidden, bound, candidates, cursor, CANDIDATES, BLOCK, SHIFT)
    wanted = count.to(tl.int64)
    if held <= CANDIDATES:
        lanes = tl.arange(0, CANDIDATES)
        value = tl.load(candidates + lanes, mask=lanes < held, other=_LEAST).to(tl.float32)
        floor = _search_held(value, (lanes < held).to(tl.int64), bound, above, wanted, SHIFT)
    else:
        floor = _search_row(logits, vocabulary, stops, forbidden, bound, above, wanted, 0.0, 1.0, False, BLOCK, SHIFT)
    return floor, held


@triton.jit
def _top_p_floor(
    logits, vocabulary, stops, forbidden, best, steepness, low, above, share, candidates, cursor, held,
    CANDIDATES: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The key of the last logit of the nucleus that holds ``share`` of the mass of those that reach ``low``.

    The ``held`` candidates, if they are no more than fit, are all that reach ``low``, and perhaps others.
    """
    lanes = tl.arange(0, CANDIDATES)
    if held <= CANDIDATES:
        value = tl.load(candidates + lanes, mask=lanes < held, other=_LEAST).to(tl.float32)
        weight = _mass(value, best, steepness)
        total = tl.sum(tl.where(_key(value, SHIFT) >= low.to(tl.int32), weight, 0), axis=0)
        floor = _search_held(value, weight, low, above, _share_of(share, total), SHIFT)
    else:
        # Most nuclei end above 2^-5 or 2^-11 of the best probability.
        key1 = tl.maximum(_key(best - 11 / steepness, SHIFT).to(tl.int64), low)
        key2 = tl.maximum(_key(best - 5 / steepness, SHIFT).to(tl.int64), low)
        total, sum1, sum2 = _measure_row(
            logits, vocabulary, stops, forbidden, low, key1, key2, best, steepness, True, BLOCK, SHIFT
        )
        wanted = _share_of(share, total)
        bound, above = _narrow(low, above, low, key1, key2, total, sum1, sum2, wanted)
        if bound > low:
            held = _gather(logits, vocabulary, stops, forbidden, bound, candidates, cursor, CANDIDATES, BLOCK, SHIFT)
        if held <= CANDIDATES:
            value = tl.load(candidates + lanes, mask=lanes < held, other=_LEAST).to(tl.float32)
            floor = _search_held(value, _mass(value, best, steepness), bound, above, wanted, SHIFT)
        else:
            floor = _search_row(
                logits, vocabulary, stops, forbidden, bound, above, wanted, best, steepness, True, BLOCK, SHIFT
            )
    return floor


@triton.jit
def _share_of(share, total):
    return tl.maximum((share.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def threshold(
    logits,  # [rows, vocabulary], rows logits_stride apart
    logits_stride,
    slots,  # int32 [rows]
    live,  # columns of the state
    outputs,
    min_tokens,
    stop_count,
    stop_ids,
    temperature,
    top_k,
    top_p,
    min_p,
    peaks,  # float32 [rows, peak_stride]: what survey wrote
    peak_stride,
    candidates,  # scratch: [rows, CANDIDATES] like logits, rows candidates_stride apart
    candidates_stride,
    cursors,  # scratch: int32 [rows]
    floors,  # out: float32 [rows]: the lowest logit that is kept
    vocabulary,
    STOP_IDS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PEAKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Program ``row`` finds the floor of its row; -inf where nothing is filtered. PEAKS ≥ ``peak_stride``."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if not _is_filtered(slot, live, temperature, top_k, top_p, min_p, vocabulary):
        tl.store(floors + row, _LEAST)
        return
    forbidden = forbidden_stops(slot, outputs, min_tokens, stop_count)
    stops = stop_ids + slot * STOP_IDS
    logits += row.to(tl.int64) * logits_stride
    candidates += row.to(tl.int64) * candidates_stride
    cursor = cursors + row

    indexes = tl.arange(0, PEAKS)
    tops = tl.load(peaks + row * peak_stride + indexes, mask=indexes < peak_stride, other=_LEAST)
    best = tl.max(tops, axis=0)
    above = _key(best, SHIFT).to(tl.int64) + 1
    low = _key(best * 0 + _LEAST, SHIFT).to(tl.int64)  # the key of the floor so far: that of -inf
    held = vocabulary + CANDIDATES  # none, that is

    count = tl.load(top_k + slot)
    if (count > 0) & (count < vocabulary):
        low, held = _top_k_floor(
            logits, vocabulary, stops, forbidden, tops, low, above, count, candidates, cursor,
            CANDIDATES, BLOCK, SHIFT,
        )  # fmt: skip
    warmth = tl.load(temperature + slot)
    share = tl.load(top_p + slot)
    if share < 1:
        steepness = tl.minimum(1.0 / warmth, _STEEPEST) * _LOG2_E
        low = _top_p_floor(
            logits, vocabulary, stops, forbidden, best, steepness, low, above, share, candidates, cursor, held,
            CANDIDATES, BLOCK, SHIFT,
        )  # fmt: skip
    floor = _value(low.to(tl.int32), SHIFT)
    least = tl.load(min_p + slot)
    if least > 0:
        floor = tl.maximum(floor, tl.minimum(best + warmth * tl.log(least), best))
    tl.store(floors + row, floor)
