"""Attention of a layer: rotate, store keys and values in the pages, attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from penstock.executor.layers.rotary import Rotation
from penstock.kernels.attention.reference import (
    PagedLayout,
    Scratch,
    fresh_blocks,
    paged_attention,
    slot_mapping,
    write_kv,
)


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [blocks, block_tokens, kv_heads, head_dim]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """What attention must know of a step's ragged batch, worked out once for all layers."""

    slots: Tensor
    """int64 [rows]: where each row's key and value go"""
    fresh: Tensor
    """int64: blocks that this step begins to fill"""
    layout: PagedLayout

    @classmethod
    def build(
        cls,
        positions: Tensor,
        query_start: Tensor,
        context_lengths: Tensor,
        block_tables: Tensor,
        *,
        block_tokens: int,
        scratch: Scratch,
    ) -> AttentionBatch:
        """``positions`` int64 [rows]; the others as :mod:`penstock.kernels.attention.reference` has them."""
        sequences, rows = context_lengths.numel(), positions.numel()
        tables = block_tables
        if rows != sequences:
            tables = block_tables.repeat_interleave(query_start.diff(), dim=0, output_size=rows)
        slots = slot_mapping(positions, tables, block_tokens)
        layout = PagedLayout.build(query_start, context_lengths, block_tables, block_tokens, scratch)
        return cls(slots, fresh_blocks(slots, block_tokens), layout)


class PagedAttention:
    """Grouped-query attention over the cache of one layer; holds no parameters."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        """``heads`` is a multiple of ``kv_heads``."""
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale = head_dim**-0.5

    def __call__(self, qkv: Tensor, rotation: Rotation, batch: AttentionBatch, cache: LayerCache) -> Tensor:
        """``qkv`` [rows, (heads + 2 kv_heads) * head_dim], the merged product → [rows, heads * head_dim].

        The keys and values of these rows are in ``cache`` afterwards.
        """
        split = qkv.view(qkv.shape[0], -1, self.head_dim)
        rotated = rotation.apply(split[:, : self.heads + self.kv_heads])
        query, key = rotated[:, : self.heads], rotated[:, self.heads :]
        value = split[:, self.heads + self.kv_heads :]
        write_kv(key, value, cache.keys, cache.values, batch.slots, batch.fresh)
        return paged_attention(query, cache.keys, cache.values, batch.layout, self.scale).flatten(1)
