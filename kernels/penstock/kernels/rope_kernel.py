"""The kernel of :mod:`penstock.kernels.rope`: a program takes some heads of one row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch
from penstock.kernels.norm import Late
from penstock.kernels.norm_kernel import late_scale
from penstock.kernels.overlap import launch_options, overlaps
from penstock.kernels.overlap_kernel import release_next, wait_for_previous


@triton.jit
def _normalised(first, second, q_weight, k_weight, is_query, half, inside, eps, HALF: tl.constexpr):
    """Both halves of each head, normalised and multiplied by the weight of queries or of keys; float32, rounded."""
    element = q_weight.dtype.element_ty
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
    q_low = tl.load(q_weight + half, mask=inside, other=0.0)[None, :]
    k_low = tl.load(k_weight + half, mask=inside, other=0.0)[None, :]
    q_high = tl.load(q_weight + HALF + half, mask=inside, other=0.0)[None, :]
    k_high = tl.load(k_weight + HALF + half, mask=inside, other=0.0)[None, :]
    first = (first * scale).to(element).to(tl.float32) * tl.where(is_query, q_low, k_low).to(tl.float32)
    second = (second * scale).to(element).to(tl.float32) * tl.where(is_query, q_high, k_high).to(tl.float32)
    return first.to(element).to(tl.float32), second.to(element).to(tl.float32)


@triton.jit
def _store(target, low, high, mask, HALF: tl.constexpr):
    tl.store(target, low, mask=mask)
    tl.store(target + HALF, high, mask=mask)


@triton.jit
def rotate_and_store_kernel(
    qkv, positions, cos_sin, q_weight, k_weight, eps, keys, values, slot_mapping, query, stream, stream_eps, bias,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
    HEAD_TILE: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr, SIZE_TILE: tl.constexpr,
    BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """SIZE: of a row of ``stream``, 0 without one."""
    HEAD_DIM: tl.constexpr = 2 * HALF
    ALL_HEADS: tl.constexpr = HEADS + 2 * KV_HEADS
    element = qkv.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE))[:, None]
    half = tl.arange(0, TILE)
    inside = half < HALF
    there = (head < ALL_HEADS) & inside[None, :]
    component = head * HEAD_DIM + half[None, :]
    source = qkv + row * (ALL_HEADS * HEAD_DIM) + component
    position = tl.load(positions + row).to(tl.int64)
    place = tl.load(slot_mapping + row) * (KV_HEADS * HEAD_DIM)
    angle = cos_sin + position * HEAD_DIM + half
    cos = tl.load(angle, mask=inside, other=0.0)[None, :]
    sin = tl.load(angle + HALF, mask=inside, other=0.0)[None, :]
    if BIAS:
        bias_first = tl.load(bias + component, mask=there, other=0.0).to(tl.float32)
        bias_second = tl.load(bias + component + HALF, mask=there, other=0.0).to(tl.float32)
    release_next(OVERLAP)
    wait_for_previous(OVERLAP)
    raw_first = tl.load(source, mask=there, other=0.0)
    raw_second = tl.load(source + HALF, mask=there, other=0.0)

    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    if SIZE > 0:
        scale = late_scale(stream, row, stream_eps, SIZE, SIZE_TILE)
        first, second = first * scale, second * scale
    if BIAS:
        first, second = first + bias_first, second + bias_second
    if SIZE > 0 or BIAS:
        raw_first, raw_second = first.to(element), second.to(element)
        first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    if NORM:
        first, second = _normalised(first, second, q_weight, k_weight, head < HEADS, half, inside, eps, HALF)
    low = (first * cos - second * sin).to(element)
    high = (second * cos + first * sin).to(element)

    key_head, value_head = head - HEADS, head - HEADS - KV_HEADS
    _store(query + row * (HEADS * HEAD_DIM) + component, low, high, there & (head < HEADS), HALF)
    is_key = there & (key_head >= 0) & (value_head < 0)
    _store(keys + place + key_head * HEAD_DIM + half[None, :], low, high, is_key, HALF)
    is_value = there & (value_head >= 0)
    _store(values + place + value_head * HEAD_DIM + half[None, :], raw_first, raw_second, is_value, HALF)


def program_shape(rows: int) -> tuple[int, int]:
    """Heads and warps of a program: one head while the programs are few, then more, so that they are not too many."""
    return (1, 1) if rows < 16 else (8, 4)


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
    late: Late | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See :func:`penstock.kernels.rope.rotate_and_store`."""
    rows, head_dim = qkv.shape[0], keys.shape[-1]
    query = qkv.new_empty(rows, heads, head_dim)
    if rows:
        tile, warps = program_shape(rows)
        stream, stream_eps = late or (qkv, 0.0)
        size = stream.shape[1] if late else 0
        launch(rotate_and_store_kernel, (rows, triton.cdiv(heads + 2 * kv_heads, tile)))(
            qkv, positions, cos_sin, q_weight, k_weight, eps, keys, values, slot_mapping, query, stream, stream_eps,
            bias, heads, kv_heads, head_dim // 2, triton.next_power_of_2(head_dim // 2), tile, q_weight is not None,
            size, triton.next_power_of_2(max(1, size)), bias is not None,
            overlaps(rows), num_warps=warps, **launch_options(rows),
        )  # fmt: skip
    return query
