"""Attention of one row a sequence over its pages (decode)."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.attention.decode_shapes import Spread
from penstock.kernels.dispatch import uses_triton


def paged_decode_attention(
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
) -> Tensor:
    """Attend each row to its sequence's past and itself.

    ``query`` [rows, heads, head_dim]; ``keys``, ``values`` [blocks, block_tokens, kv_heads, head_dim]; ``block_tables``
    int32 [slots, width]; ``row_slots`` int32 [rows]: whose table each row has; ``context_lengths`` int32 [rows], the
    row itself included; 0: the row does not count and its output is zero. ``spread``: how the lengths
    differ, a hint for the kernel's cut. Returns [rows, heads, head_dim].
    """
    arguments = (query, keys, values, block_tables, row_slots, context_lengths, scale)
    if uses_triton(query):
        from penstock.kernels.attention.decode_kernel import paged_decode_attention_triton

        return paged_decode_attention_triton(*arguments, out=out, spread=spread)
    return paged_decode_attention_reference(*arguments, out=out)


def paged_decode_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    row_slots: Tensor,
    context_lengths: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, row by row."""
    out = torch.empty_like(query) if out is None else out
    group = query.shape[1] // keys.shape[2]
    for row, (slot, length) in enumerate(zip(row_slots.tolist(), context_lengths.tolist(), strict=True)):
        if not length:
            out[row] = 0
            continue
        pages = block_tables[slot, : -(-length // keys.shape[1])].long()
        key = keys[pages].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
        value = values[pages].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
        weights = torch.einsum("hd,thd->ht", query[row].float(), key).mul(scale).softmax(dim=-1)
        out[row] = torch.einsum("ht,thd->hd", weights, value).to(out.dtype)
    return out
