"""Attention of several rows a sequence over its pages (chunks of prompts)."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.dispatch import uses_triton


def paged_prefill_attention(
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
    """Attend each row to its sequence's past and itself, over pages that hold all of it.

    ``query`` [rows, heads, head_dim], sequence after sequence; ``keys``, ``values`` [blocks, block_tokens, kv_heads,
    head_dim]; ``block_tables`` int32 [slots, width]; ``sequence_slots`` int32 [sequences]; ``query_start`` int32
    [sequences + 1]; ``context_lengths`` int32 [sequences], the rows of this step included: row ``i`` of the ``n`` of a
    sequence stands at position ``context - n + i``; ``max_query``: the most rows of one sequence. Returns [rows,
    heads, head_dim].
    """
    arguments = (query, keys, values, block_tables, sequence_slots, query_start, context_lengths, max_query, scale)
    if uses_triton(query):
        from penstock.kernels.attention.prefill_kernel import paged_prefill_attention_triton

        return paged_prefill_attention_triton(*arguments, out=out)
    return paged_prefill_attention_reference(*arguments, out=out)


def paged_prefill_attention_reference(
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
    """The same in plain torch, sequence by sequence."""
    out = torch.empty_like(query) if out is None else out
    group = query.shape[1] // keys.shape[2]
    starts = query_start.tolist()
    for number, (slot, length) in enumerate(zip(sequence_slots.tolist(), context_lengths.tolist(), strict=True)):
        rows = slice(starts[number], starts[number + 1])
        count = rows.stop - rows.start
        pages = block_tables[slot, : -(-length // keys.shape[1])].long()
        key = keys[pages].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
        value = values[pages].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,thd->hqt", query[rows].float(), key) * scale
        seen = torch.arange(length)[None, :] <= torch.arange(length - count, length)[:, None]
        weights = scores.masked_fill(~seen.to(scores.device), float("-inf")).softmax(dim=-1)
        out[rows] = torch.einsum("hqt,thd->qhd", weights, value).to(out.dtype)
    return out
