"""The kernel of :mod:`penstock.kernels.rope`: a program takes some heads of one row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _normalised(first, second, weight, half, inside, eps, HALF: tl.constexpr):
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
    low = tl.load(weight + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    high = tl.load(weight + HALF + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    return first * scale * low, second * scale * high


@triton.jit
def rotate_and_store_kernel(
    qkv, positions, cos_sin, q_weight, k_weight, eps, keys, values, slot_mapping, query,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
    HEAD_TILE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)
    half = tl.arange(0, TILE)
    inside = half < HALF
    there = (head < HEADS + 2 * KV_HEADS)[:, None] & inside[None, :]
    source = qkv + row * ((HEADS + 2 * KV_HEADS) * 2 * HALF) + head[:, None] * (2 * HALF) + half[None, :]
    first_raw = tl.load(source, mask=there, other=0.0)
    second_raw = tl.load(source + HALF, mask=there, other=0.0)
    first, second = first_raw.to(tl.float32), second_raw.to(tl.float32)
    if NORM:
        q_first, q_second = _normalised(first, second, q_weight, half, inside, eps, HALF)
        k_first, k_second = _normalised(first, second, k_weight, half, inside, eps, HALF)
        is_query = (head < HEADS)[:, None]
        first = tl.where(is_query, q_first, k_first).to(qkv.dtype.element_ty).to(tl.float32)
        second = tl.where(is_query, q_second, k_second).to(qkv.dtype.element_ty).to(tl.float32)
    angle = cos_sin + tl.load(positions + row).to(tl.int64) * (2 * HALF) + half
    cos = tl.load(angle, mask=inside, other=0.0)[None, :]
    sin = tl.load(angle + HALF, mask=inside, other=0.0)[None, :]
    low = (first * cos - second * sin).to(qkv.dtype.element_ty)
    high = (second * cos + first * sin).to(qkv.dtype.element_ty)
    target = query + row * (HEADS * 2 * HALF) + head[:, None] * (2 * HALF) + half[None, :]
    is_query = there & (head < HEADS)[:, None]
    tl.store(target, low, mask=is_query)
    tl.store(target + HALF, high, mask=is_query)
    place = tl.load(slot_mapping + row) * (KV_HEADS * 2 * HALF)
    kv_head = head - HEADS
    is_key = there & ((kv_head >= 0) & (kv_head < KV_HEADS))[:, None]
    target = keys + place + kv_head[:, None] * (2 * HALF) + half[None, :]
    tl.store(target, low, mask=is_key)
    tl.store(target + HALF, high, mask=is_key)
    is_value = there & (kv_head >= KV_HEADS)[:, None]
    target = values + place + (kv_head - KV_HEADS)[:, None] * (2 * HALF) + half[None, :]
    tl.store(target, first_raw, mask=is_value)
    tl.store(target + HALF, second_raw, mask=is_value)


def rotate_and_store_triton(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
    heads: int,
    kv_heads: int,
) -> Tensor:
    """See :func:`penstock.kernels.rope.rotate_and_store`."""
    rows, head_dim = qkv.shape[0], keys.shape[-1]
    query = qkv.new_empty(rows, heads, head_dim)
    if rows:
        tile = 8 if rows >= 16 else 1
        rotate_and_store_kernel[(rows, triton.cdiv(heads + 2 * kv_heads, tile))](
            qkv, positions, cos_sin, q_weight, k_weight, eps, keys, values, slot_mapping, query,
            heads, kv_heads, head_dim // 2, triton.next_power_of_2(head_dim // 2), tile, q_weight is not None,
            num_warps=4 if tile > 1 else 1,
        )  # fmt: skip
    return query
