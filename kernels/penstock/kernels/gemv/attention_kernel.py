# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The kernel of :mod:`penstock.kernels.gemv.attention`: split-KV (Dao et al. 2023), query heads of a group packed.

A program takes one key/value head of one row and one of its splits. All that is older than the product in front of it,
the row's position, its block table, the rotation's angles and its first tile of keys and values, is in registers before
it waits for that product. The row's own key and value never come back from memory: the first split holds them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch
from penstock.kernels.gemv.attention import FewRows, HeadNorms, SplitRoom
from penstock.kernels.gemv.product import Splits
from penstock.kernels.gemv.shapes import MOST_PACKED, SplitShape
from penstock.kernels.overlap import launch_options, overlaps
from penstock.kernels.overlap_kernel import release_next, wait_for_previous

_LOG2E = 1.4426950408889634


@triton.jit
def _rotated(
    first,
    second,
    weight,
    weight_second,
    cos,
    sin,
    eps,
    NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    element: tl.constexpr,
):
    """Heads [n, HEAD_DIM], ``second`` their components' partners, normalised and rotated; rounded."""
    if NORM:
        scale = tl.rsqrt(tl.sum(first * first, 1) / HEAD_DIM + eps)[:, None]
        first = first * scale * weight[None, :]
        second = second * scale * weight_second[None, :]
    return (first * cos[None, :] + second * sin[None, :]).to(element)


@triton.jit
def _tile_of(
    cache, table, position, seen, head, dim, BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Keys or values [TILE, HEAD_DIM] of one head at ``position`` [TILE]; zero where not ``seen``."""
    page = tl.load(table + position // BLOCK, mask=seen, other=0).to(tl.int64)
    place = ((page * BLOCK + position % BLOCK) * KV_HEADS + head) * HEAD_DIM
    # Past the first-level cache: a multiprocessor's copy may be older than what an earlier step wrote.
    return tl.load(cache + place[:, None] + dim[None, :], mask=seen[:, None], other=0.0, cache_modifier=".cg")


@triton.jit
def _attended(query, key, value, seen, best, mass, acc, scale, PRECISION: tl.constexpr):
    """The running softmax of packed heads with one more tile."""
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    score = tl.where(seen[None, :], score, -1e30)
    highest = tl.maximum(best, tl.max(score, 1))
    weight = tl.where(seen[None, :], tl.exp2(score - highest[:, None]), 0.0)
    shrink = tl.exp2(best - highest)
    acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return highest, mass * shrink + tl.sum(weight, 1), acc


@triton.jit
def few_rows_attention_kernel(
    qkv, positions, tables, cos_sin, q_weight, k_weight, eps, keys, values, block_tables,
    partial, partial_lse, arrivals, out, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, MERGED: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``scale`` is in powers of two."""
    head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(0) // KV_HEADS
    row = tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    packed = tl.arange(0, PACKED)
    dim = tl.arange(0, HEAD_DIM)
    partner = dim ^ HALF
    place = tl.arange(0, TILE)
    element: tl.constexpr = qkv.dtype.element_ty
    release_next(OVERLAP)
    length = tl.load(positions + row)
    table = block_tables + tl.load(tables + row).to(tl.int64) * WIDTH
    cos = tl.load(cos_sin + length.to(tl.int64) * HEAD_DIM + dim % HALF)
    sin = tl.load(cos_sin + length.to(tl.int64) * HEAD_DIM + HALF + dim % HALF)
    sin = tl.where(dim < HALF, -sin, sin)
    q_low = cos
    q_high = cos
    k_low = cos
    k_high = cos
    if NORM:
        q_low = tl.load(q_weight + dim).to(tl.float32)
        q_high = tl.load(q_weight + partner).to(tl.float32)
        k_low = tl.load(k_weight + dim).to(tl.float32)
        k_high = tl.load(k_weight + partner).to(tl.float32)
    share = tl.cdiv(tl.cdiv(length, TILE), SPLITS) * TILE
    start = split * share
    end = tl.minimum(length, start + share)
    seen = start + place < end
    key = _tile_of(keys, table, start + place, seen, head, dim, BLOCK, KV_HEADS, HEAD_DIM)
    value = _tile_of(values, table, start + place, seen, head, dim, BLOCK, KV_HEADS, HEAD_DIM)
    new_page = tl.load(table + length // BLOCK).to(tl.int64)
    wait_for_previous(OVERLAP)

    of_row = qkv + row * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    is_head = (packed < GROUP)[:, None]
    source = of_row + (head * GROUP + packed)[:, None] * HEAD_DIM
    first = tl.load(source + dim[None, :], mask=is_head, other=0.0).to(tl.float32)
    second = tl.load(source + partner[None, :], mask=is_head, other=0.0).to(tl.float32)
    query = _rotated(first, second, q_low, q_high, cos, sin, eps, NORM, HEAD_DIM, element)
    best = tl.full([PACKED], -1e30, tl.float32)
    mass = tl.zeros([PACKED], tl.float32)
    acc = tl.zeros([PACKED, HEAD_DIM], tl.float32)
    best, mass, acc = _attended(query, key, value, seen, best, mass, acc, scale, PRECISION)
    for at in tl.range(start + TILE, end, TILE, num_stages=STAGES):
        seen = at + place < end
        key = _tile_of(keys, table, at + place, seen, head, dim, BLOCK, KV_HEADS, HEAD_DIM)
        value = _tile_of(values, table, at + place, seen, head, dim, BLOCK, KV_HEADS, HEAD_DIM)
        best, mass, acc = _attended(query, key, value, seen, best, mass, acc, scale, PRECISION)
    if split == 0:
        own = of_row + (HEADS + head) * HEAD_DIM
        own_first = tl.load(own + dim).to(tl.float32)[None, :]
        own_second = tl.load(own + partner).to(tl.float32)[None, :]
        new_key = _rotated(own_first, own_second, k_low, k_high, cos, sin, eps, NORM, HEAD_DIM, element)
        new_value = tl.load(own + KV_HEADS * HEAD_DIM + dim)
        target = ((new_page * BLOCK + length % BLOCK) * KV_HEADS + head) * HEAD_DIM
        tl.store(keys + target + dim[None, :], new_key)
        tl.store(values + target + dim, new_value)
        score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), 1) * scale
        highest = tl.maximum(best, score)
        shrink = tl.exp2(best - highest)
        own_weight = tl.exp2(score - highest)
        mass = mass * shrink + own_weight
        acc = acc * shrink[:, None] + own_weight[:, None] * new_value.to(tl.float32)[None, :]
        best = highest

    heads = row * HEADS + head * GROUP + packed
    some = tl.where(mass > 0, mass, 1.0)
    if SPLITS == 1 and MERGED:
        tl.store(out + heads[:, None] * HEAD_DIM + dim[None, :], (acc / some[:, None]).to(element), mask=is_head)
    else:
        entry = heads * SPLITS + split
        tl.store(partial + entry[:, None] * HEAD_DIM + dim[None, :], acc / some[:, None], mask=is_head)
        tl.store(partial_lse + entry, tl.where(mass > 0, best + tl.log2(some), -1e30), mask=packed < GROUP)
        if MERGED:
            counter = arrivals + row * KV_HEADS + head
            tl.debug_barrier()
            if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
                tl.store(counter, 0)
                _merge(partial, partial_lse, out, row * HEADS + head * GROUP, dim, GROUP, SPLITS, HEAD_DIM, element)


@triton.jit
def _merge(
    partial, partial_lse, out, first_head, dim,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, element: tl.constexpr,
):  # fmt: skip
    """Of each of GROUP heads the mean of its splits by their weights."""
    split = tl.arange(0, SPLITS)
    for member in tl.static_range(GROUP):
        entry = (first_head + member) * SPLITS + split
        lse = tl.load(partial_lse + entry, cache_modifier=".cg")
        weight = tl.exp2(lse - tl.max(lse, 0))
        weight = weight / tl.sum(weight, 0)
        part = tl.load(partial + entry[:, None] * HEAD_DIM + dim[None, :], cache_modifier=".cg")
        whole = tl.sum(part * weight[:, None], 0)
        tl.store(out + (first_head + member) * HEAD_DIM + dim, whole.to(element))


def few_rows_attention_triton(
    qkv: Tensor,
    rows: FewRows,
    cos_sin: Tensor,
    norms: HeadNorms | None,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    scale: float,
    shape: SplitShape,
    room: SplitRoom,
) -> Tensor | Splits:
    """See :func:`penstock.kernels.gemv.attention.few_rows_attention`."""
    count = qkv.shape[0]
    block_tokens, kv_heads, head_dim = keys.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    launch(few_rows_attention_kernel, (kv_heads * shape.splits, count))(
        qkv, rows.positions, rows.tables, cos_sin, norms.queries if norms else None, norms.keys if norms else None,
        norms.eps if norms else 0.0, keys, values, block_tables,
        room.splits.partial, room.splits.lse, room.arrivals, room.merged, scale * _LOG2E,
        heads, kv_heads, head_dim, MOST_PACKED, block_tables.shape[1], block_tokens,
        shape.tile, shape.splits, shape.stages, norms is not None, shape.merged,
        "ieee" if qkv.element_size() == 4 else "tf32", overlaps(count),
        num_warps=shape.warps, **launch_options(count),
    )  # fmt: skip
    return room.merged[:count] if shape.merged else Splits(room.splits.partial[:count], room.splits.lse[:count])
