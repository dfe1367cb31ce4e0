"""The kernels of :mod:`penstock.kernels.attention.decode`: split-KV ("flash decoding", Dao et al. 2023), GQA-packed.

A program takes the query heads that share a key/value head of one row, packed into one tile, and one *chunk* of the
row's context. The grid is fixed by the number of rows, so that a CUDA graph can hold it; how long a chunk is depends on
the lengths: ``max(min_chunk, longest / splits)``, where the longest context is that of row 0 (rows come longest first;
should they not, the last chunk of a row takes what is left). So chunks are about equal whatever the lengths are, and no
program works long after the others. A row of one chunk is done when its program is. The chunks of another are merged:
if a row has two of them at most, by the program that is done last; otherwise by programs of their own.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch
from penstock.kernels.attention.decode_shapes import DecodeShape, Spread, decode_shape
from penstock.kernels.dispatch import full_precision
from penstock.kernels.overlap import launch_options, overlaps
from penstock.kernels.overlap_kernel import release_next, wait_for_previous

_LOG2E = 1.4426950408889634
_PACKED = 16
"""Rows of a tensor core's tile: heads of a group are packed into so many."""
_ARRIVALS = 1 << 16
MOST_MERGED = 2
"""Splits up to which the last chunk to be done merges its row; with more, programs of their own are faster."""
_SMALLEST_TILE = 16
"""The tensor cores' depth; pages may be smaller."""


@triton.jit
def _chunk_length(context_lengths, SPLITS: tl.constexpr, MIN_CHUNK: tl.constexpr, TILE: tl.constexpr):
    longest = tl.load(context_lengths)
    return tl.maximum(tl.cdiv(tl.cdiv(longest, SPLITS), TILE) * TILE, MIN_CHUNK)


@triton.jit
def _merged(
    partial, partial_lse, first, chunks, inside, dim, is_head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, DIM: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_TILE: tl.constexpr,
):  # fmt: skip
    """The outputs of a row's ``chunks`` as one [PACKED, DIM]; ``first`` [PACKED]: the entries of chunk 0."""
    split = tl.arange(0, SPLIT_TILE)
    there = is_head[:, None] & (split < chunks)[None, :]
    lse = tl.load(partial_lse + first[:, None] + split[None, :] * HEADS, mask=there, other=-1e30, cache_modifier=".cg")
    highest = tl.max(lse, 1)
    mass = tl.sum(tl.where(there, tl.exp2(lse - highest[:, None]), 0.0), 1)
    acc = tl.zeros([PACKED, DIM], tl.float32)
    for split in tl.static_range(SPLITS):
        entry = first + split * HEADS
        own = is_head & (split < chunks)
        weight = tl.exp2(tl.load(partial_lse + entry, mask=own, other=-1e30, cache_modifier=".cg") - highest)
        part = tl.load(
            partial + entry[:, None] * HEAD_DIM + dim[None, :],
            mask=inside & (split < chunks), other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        acc += part * tl.where(own, weight, 0.0)[:, None]
    return acc / tl.where(is_head, mass, 1.0)[:, None]


@triton.jit
def decode_kernel(
    query, keys, values, block_tables, row_slots, context_lengths, out, partial, partial_lse, arrivals, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    PACKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_TILE: tl.constexpr, MERGED: tl.constexpr, MIN_CHUNK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    packed = tl.arange(0, PACKED)
    dim = tl.arange(0, DIM)
    head = kv_head * GROUP + packed
    is_head = (packed < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    target = out + row.to(tl.int64) * (HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + dim[None, :]
    length = tl.load(context_lengths + row)
    chunk = _chunk_length(context_lengths, SPLITS, MIN_CHUNK, TILE)
    start = split * chunk
    table = block_tables + tl.load(row_slots + row).to(tl.int64) * WIDTH
    wait_for_previous(OVERLAP)
    if start >= length:
        if split == 0:
            tl.store(target, tl.zeros([PACKED, DIM], out.dtype.element_ty), mask=is_head)
        return
    end = tl.minimum(start + chunk, length)
    if split == SPLITS - 1:
        end = length
    place = tl.arange(0, TILE)
    source = query + row.to(tl.int64) * (HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(source, mask=is_head, other=0.0)
    best = tl.full([PACKED], -1e30, tl.float32)
    mass = tl.zeros([PACKED], tl.float32)
    acc = tl.zeros([PACKED, DIM], tl.float32)
    row_stride: tl.constexpr = KV_HEADS * HEAD_DIM
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        position = first + place
        seen = position < end
        if BLOCK >= TILE:
            page = tl.load(table + first // BLOCK).to(tl.int64)
            address = (page * BLOCK + first % BLOCK + place) * row_stride + kv_head * HEAD_DIM
        else:
            page = tl.load(table + position // BLOCK, mask=seen, other=0).to(tl.int64)
            address = (page * BLOCK + position % BLOCK) * row_stride + kv_head * HEAD_DIM
        inside = seen[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(keys + address[:, None] + dim[None, :], mask=inside, other=0.0)
        v = tl.load(values + address[:, None] + dim[None, :], mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        score = tl.where(seen[None, :], score, -1e30)
        higher = tl.maximum(best, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        decay = tl.exp2(best - higher)
        mass = mass * decay + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        best = higher
    acc = acc / mass[:, None]
    if (SPLITS == 1) | (length <= chunk):
        tl.store(target, acc.to(out.dtype.element_ty), mask=is_head)
    else:
        entry = (row.to(tl.int64) * SPLITS + split) * HEADS + head
        tl.store(partial + entry[:, None] * HEAD_DIM + dim[None, :], acc, mask=is_head)
        tl.store(partial_lse + entry, best + tl.log2(mass), mask=packed < GROUP)
        if MERGED:
            chunks = tl.minimum(tl.cdiv(length, chunk), SPLITS)
            counter = arrivals + row * KV_HEADS + kv_head
            tl.debug_barrier()  # what all threads stored goes before the arrival
            if tl.atomic_add(counter, 1, sem="acq_rel") == chunks - 1:
                tl.store(counter, 0)
                entries = row.to(tl.int64) * SPLITS * HEADS + head
                merged = _merged(
                    partial, partial_lse, entries, chunks, is_head, dim, packed < GROUP,
                    HEADS, HEAD_DIM, PACKED, DIM, SPLITS, SPLIT_TILE,
                )  # fmt: skip
                tl.store(target, merged.to(out.dtype.element_ty), mask=is_head)


@triton.jit
def merge_kernel(
    partial, partial_lse, context_lengths, out,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_TILE: tl.constexpr, MIN_CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(context_lengths + row)
    chunk = _chunk_length(context_lengths, SPLITS, MIN_CHUNK, TILE)
    release_next(OVERLAP)
    wait_for_previous(OVERLAP)
    if length <= chunk:
        return
    split = tl.arange(0, SPLIT_TILE)
    dim = tl.arange(0, DIM)
    there = (split < SPLITS) & (split * chunk < length)
    entry = (row * SPLITS + split) * HEADS + head
    lse = tl.load(partial_lse + entry, mask=there, other=-1e30)
    weight = tl.where(there, tl.exp2(lse - tl.max(lse, 0)), 0.0)
    inside = there[:, None] & (dim < HEAD_DIM)[None, :]
    part = tl.load(partial + entry[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
    merged = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (row * HEADS + head) * HEAD_DIM + dim, merged.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


@functools.cache
def arrivals(device: torch.device) -> Tensor:
    """int32: how many chunks of each row and key/value head are done; zero between kernels, which run one by one."""
    return torch.zeros(_ARRIVALS, dtype=torch.int32, device=device)


def paged_decode_attention_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    row_slots: Tensor,
    context_lengths: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
    spread: Spread = Spread.MIXED,
    shape: DecodeShape | None = None,
) -> Tensor:
    """See :func:`penstock.kernels.attention.decode.paged_decode_attention`."""
    rows, heads, head_dim = query.shape
    _, block_tokens, kv_heads, _ = keys.shape
    out = torch.empty_like(query) if out is None else out
    if not rows:
        return out
    shape = shape or decode_shape(rows, kv_heads, keys.dtype, spread)
    dim = max(16, triton.next_power_of_2(head_dim))
    tile = max(_SMALLEST_TILE, min(shape.tile, block_tokens))
    packed = max(_PACKED, triton.next_power_of_2(heads // kv_heads))
    scratch = rows * shape.splits * heads if shape.splits > 1 else 0
    partial = query.new_empty(scratch, head_dim, dtype=torch.float32)
    partial_lse = query.new_empty(scratch, dtype=torch.float32)
    merged = 1 < shape.splits <= MOST_MERGED and rows * kv_heads <= _ARRIVALS
    counters = arrivals(query.device)
    launch(decode_kernel, (kv_heads, rows, shape.splits))(
        query, keys, values, block_tables, row_slots, context_lengths, out, partial, partial_lse, counters,
        scale * _LOG2E, heads, kv_heads, head_dim, dim, packed, block_tables.stride(0), block_tokens, tile,
        shape.splits, triton.next_power_of_2(shape.splits), merged, shape.min_chunk, shape.stages,
        full_precision(query.dtype), overlaps(rows), num_warps=shape.warps, **launch_options(rows),
    )  # fmt: skip
    if shape.splits > 1 and not merged:
        launch(merge_kernel, (heads, rows))(
            partial, partial_lse, context_lengths, out, heads, head_dim, dim, tile,
            shape.splits, triton.next_power_of_2(shape.splits), shape.min_chunk, overlaps(rows),
            num_warps=1, **launch_options(rows),
        )  # fmt: skip
    return out
