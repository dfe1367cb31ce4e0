"""Paged attention in plain torch: the CPU path, and what every faster kernel is compared with.

A *ragged batch* holds rows (tokens) of several sequences, one sequence after the other:

- ``query_start`` int32 [sequences + 1]: the rows of sequence ``s`` are ``query_start[s] : query_start[s +
  1]``;
- ``context_lengths`` int32 [sequences]: tokens of the sequence, the rows of this step included, so that row
  ``i`` of the ``n`` rows of a sequence stands at position ``context_length - n + i`` and sees every position
  up to its own;
- ``block_tables`` int32 [sequences, any width]: the pages of each sequence in order. Entries behind the last
  page in use are never read as addresses and may hold anything.

The cache of one layer is two tensors [blocks, block_tokens, kv_heads, head_dim]. Query heads share key/value
heads in consecutive groups (grouped-query attention, Ainslie et al. 2023). Pages are those of Kwon et al.
2023.

Everything that depends on the batch but not on the layer is worked out once per step, in
:class:`PagedLayout`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHORT_CONTEXT = 128
"""Decodes of contexts up to this many tokens always share one padded call."""


def slot_mapping(positions: Tensor, tables: Tensor, block_tokens: int) -> Tensor:
    """Address of each row in a cache seen as [blocks * block_tokens, …].

    ``positions`` int64 [rows]; ``tables`` integer [rows, width], the block table of the sequence of each row.
    Returns int64 [rows].
    """
    page = torch.div(positions, block_tokens, rounding_mode="floor")
    block = tables.gather(1, page[:, None]).squeeze(1).long()
    return block * block_tokens + positions % block_tokens


def fresh_blocks(slots: Tensor, block_tokens: int) -> Tensor:
    """The blocks whose first token is written by this step: int64, a part of ``slots // block_tokens``."""
    return slots[slots % block_tokens == 0] // block_tokens


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, fresh: Tensor) -> None:
    """Store ``key`` and ``value`` [rows, kv_heads, head_dim] at ``slots`` int64 [rows] of the cache.

    Blocks in ``fresh`` are cleared first. Attention multiplies the unused end of a page with weights that are
    zero, and zero times a NaN that an earlier owner left there is NaN: clearing keeps a poisoned sequence to
    itself.
    """
    for rows, cache in ((key, key_cache), (value, value_cache)):
        if fresh.numel():
            cache.index_fill_(0, fresh, 0)
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, rows)


def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, layout: PagedLayout, scale: float) -> Tensor:
    """Attend each row of ``query`` [rows, heads, head_dim] to its sequence's past and itself. Same shape out.

    Products accumulate and the softmax is taken in float32, also for bfloat16.
    """
    if len(layout.parts) == 1:
        return layout.parts[0].attend(query, key_cache, value_cache, scale)
    out = torch.empty_like(query)
    for part in layout.parts:
        out[part.rows] = part.attend(query[part.rows], key_cache, value_cache, scale)
    return out


class Scratch:
    """Where pages of decodes are gathered, kept from step to step: fresh memory costs more than the copy."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Empty; grows to the largest batch seen."""
        self._memory = torch.empty(0, dtype=dtype)

    @property
    def dtype(self) -> torch.dtype:
        """That of the caches."""
        return self._memory.dtype

    def gather(self, keys: Tensor, values: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Those ``blocks`` int64 [n] of both caches, [n, …]; valid until the next call."""
        shape = (2, blocks.numel(), *keys.shape[1:])
        size = math.prod(shape)
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=self.dtype, device=keys.device)
        out_keys, out_values = self._memory[:size].view(shape)
        torch.index_select(keys, 0, blocks, out=out_keys)
        torch.index_select(values, 0, blocks, out=out_values)
        return out_keys, out_values


class Part(Protocol):
    """Rows that one call of the attention product serves."""

    @property
    def rows(self) -> slice | Tensor:
        """Where these rows stand in the batch."""
        ...

    def attend(self, query: Tensor, key_cache: Tensor, value_cache: Tensor, scale: float) -> Tensor:
        """Attention of ``query`` [len(rows), heads, head_dim]; same shape out."""
        ...


@dataclass(frozen=True, slots=True)
class Decodes:
    """Sequences of one row each, padded to the longest; the heads that share a key head are its queries."""

    rows: slice | Tensor
    blocks: Tensor
    """int64 [sequences * width]"""
    mask: Tensor
    """[sequences, 1, 1, width * block_tokens]: 0 or -inf"""
    scratch: Scratch

    def attend(self, query: Tensor, key_cache: Tensor, value_cache: Tensor, scale: float) -> Tensor:
        """See :class:`Part`."""
        sequences, heads, head_dim = query.shape
        kv_heads = key_cache.shape[2]
        keys, values = (
            pages.view(sequences, -1, kv_heads, head_dim).transpose(1, 2)
            for pages in self.scratch.gather(key_cache, value_cache, self.blocks)
        )
        grouped = query.view(sequences, kv_heads, heads // kv_heads, head_dim)
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask, scale=scale)
        return out.reshape(query.shape)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several rows of one sequence, behind what the cache holds of it."""

    rows: slice
    blocks: Tensor
    """int64 [pages in use]"""
    context: int
    mask: Tensor | None
    """[rows, context]: 0 or -inf; None where the chunk is the whole context."""

    def attend(self, query: Tensor, key_cache: Tensor, value_cache: Tensor, scale: float) -> Tensor:
        """See :class:`Part`."""
        out = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            self._past(key_cache),
            self._past(value_cache),
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)

    def _past(self, cache: Tensor) -> Tensor:
        """The sequence's part of ``cache`` as [1, kv_heads, context, head_dim]."""
        pages = cache.index_select(0, self.blocks).flatten(0, 1)
        return pages[: self.context].transpose(0, 1)[None]


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """How the sequences of one ragged batch are grouped into calls; the same for every layer."""

    parts: tuple[Part, ...]

    @classmethod
    def build(
        cls,
        query_start: Tensor,
        context_lengths: Tensor,
        block_tables: Tensor,
        block_tokens: int,
        scratch: Scratch,
    ) -> PagedLayout:
        """Group a batch (see the module's text for the shapes); ``scratch`` is used by one layout at a time.

        Sequences of one row are attended together with those of a similar context, the rest one by one.
        """
        starts: list[int] = query_start.tolist()
        contexts: list[int] = context_lengths.tolist()
        decodes: defaultdict[int, list[int]] = defaultdict(list)
        parts: list[Part] = []
        for sequence, context in enumerate(contexts):
            if starts[sequence + 1] - starts[sequence] == 1:
                decodes[max(context, SHORT_CONTEXT).bit_length()].append(sequence)
            else:
                rows = slice(starts[sequence], starts[sequence + 1])
                parts.append(_chunk(rows, context, block_tables[sequence], block_tokens, scratch.dtype))
        for members in decodes.values():
            parts.append(_decodes(members, starts, context_lengths, block_tables, block_tokens, scratch))
        return cls(tuple(parts))


def _chunk(rows: slice, context: int, table: Tensor, block_tokens: int, dtype: torch.dtype) -> Chunk:
    blocks = table[: -(-context // block_tokens)].long()
    length = rows.stop - rows.start
    mask = None
    if length < context:
        position = torch.arange(context - length, context, device=table.device)
        mask = _additive(torch.arange(context, device=table.device) <= position[:, None], dtype)
    return Chunk(rows, blocks, context, mask)


def _decodes(
    members: list[int],
    starts: list[int],
    context_lengths: Tensor,
    block_tables: Tensor,
    block_tokens: int,
    scratch: Scratch,
) -> Decodes:
    rows: slice | Tensor = slice(None)
    if len(members) != len(starts) - 1:
        sequences = torch.tensor(members, device=block_tables.device)
        context_lengths, block_tables = context_lengths[sequences], block_tables[sequences]
        rows = torch.tensor([starts[member] for member in members], device=block_tables.device)
    width = -(-int(context_lengths.max()) // block_tokens)
    position = torch.arange(width * block_tokens, device=block_tables.device)
    seen = position < context_lengths[:, None]
    in_use = seen[:, ::block_tokens]
    # Padding repeats the sequence's own first page: what it reads there is masked, and nobody else's.
    blocks = torch.where(in_use, block_tables[:, :width], block_tables[:, :1]).long()
    return Decodes(rows, blocks.flatten(), _additive(seen, scratch.dtype)[:, None, None], scratch)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``seen``, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
