"""The kernel of :mod:`penstock.kernels.attention.prefill`: FlashAttention (Dao et al. 2022, 2023) over pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch
from penstock.kernels.dispatch import full_precision

_LOG2E = 1.4426950408889634
_SMALLEST_TILE = 16
"""The tensor cores' depth; pages may be smaller."""


@triton.jit
def _attend(
    q, best, mass, acc, keys, values, table, first, position, kv_head, context, scale,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, TILE)
    dim = tl.arange(0, DIM)
    if BLOCK >= TILE:
        page = tl.load(table + first // BLOCK).to(tl.int64)
        address = page * BLOCK + first % BLOCK + place
    else:
        page = tl.load(table + (first + place) // BLOCK, mask=first + place < context, other=0).to(tl.int64)
        address = page * BLOCK + (first + place) % BLOCK
    address = address * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
    if MASKED:
        inside = (first + place < context)[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(keys + address[:, None] + dim[None, :], mask=inside, other=0.0)
        v = tl.load(values + address[:, None] + dim[None, :], mask=inside, other=0.0)
    elif HEAD_DIM == DIM:
        k = tl.load(keys + address[:, None] + dim[None, :])
        v = tl.load(values + address[:, None] + dim[None, :])
    else:
        k = tl.load(keys + address[:, None] + dim[None, :], mask=(dim < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(values + address[:, None] + dim[None, :], mask=(dim < HEAD_DIM)[None, :], other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        score = tl.where((first + place)[None, :] <= position[:, None], score, -1e30)
    higher = tl.maximum(best, tl.max(score, 1))
    weight = tl.exp2(score - higher[:, None])
    decay = tl.exp2(best - higher)
    mass = mass * decay + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return higher, mass, acc


@triton.jit
def prefill_kernel(
    query, keys, values, block_tables, sequence_slots, query_start, context_lengths, out, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The last tiles of a sequence see the most keys: they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    begin = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - begin
    if tile * ROWS >= count:
        return
    context = tl.load(context_lengths + sequence)
    table = block_tables + tl.load(sequence_slots + sequence).to(tl.int64) * WIDTH
    kv_head = head // (HEADS // KV_HEADS)
    local = tile * ROWS + tl.arange(0, ROWS)
    position = context - count + local
    dim = tl.arange(0, DIM)
    inside = (local < count)[:, None] & (dim < HEAD_DIM)[None, :]
    offset = (begin + local).to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM + dim[None, :]
    q = tl.load(query + offset, mask=inside, other=0.0)
    best = tl.full([ROWS], -1e30, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    last = tl.minimum(context, context - count + (tile + 1) * ROWS)
    # Up to the first row's own position no key is hidden from any row.
    whole = (context - count + tile * ROWS + 1) // TILE * TILE
    for first in tl.range(0, whole, TILE, num_stages=STAGES):
        best, mass, acc = _attend(
            q, best, mass, acc, keys, values, table, first, position, kv_head, context, scale,
            KV_HEADS, HEAD_DIM, DIM, BLOCK, TILE, False, PRECISION,
        )  # fmt: skip
    for first in tl.range(whole, last, TILE, num_stages=1):
        best, mass, acc = _attend(
            q, best, mass, acc, keys, values, table, first, position, kv_head, context, scale,
            KV_HEADS, HEAD_DIM, DIM, BLOCK, TILE, True, PRECISION,
        )  # fmt: skip
    tl.store(out + offset, (acc / mass[:, None]).to(out.dtype.element_ty), mask=inside)


def paged_prefill_attention_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    sequence_slots: Tensor,
    query_start: Tensor,
    context_lengths: Tensor,
    max_query: int,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`penstock.kernels.attention.prefill.paged_prefill_attention`."""
    _, heads, head_dim = query.shape
    _, block_tokens, kv_heads, _ = keys.shape
    out = torch.empty_like(query) if out is None else out
    if not sequence_slots.numel() or not max_query:
        return out
    dim = max(16, triton.next_power_of_2(head_dim))
    wide = query.dtype != torch.float32
    rows = 64 if wide and max_query > 16 else 16
    launch(prefill_kernel, (triton.cdiv(max_query, rows), heads, sequence_slots.numel()))(
        query, keys, values, block_tables, sequence_slots, query_start, context_lengths, out, scale * _LOG2E,
        heads, kv_heads, head_dim, dim, block_tables.stride(0), block_tokens, rows,
        max(_SMALLEST_TILE, min(64 if wide else 16, block_tokens)), 2 if wide else 1, full_precision(query.dtype),
        num_warps=8 if head_dim > 128 else 4,
    )  # fmt: skip
    return out
