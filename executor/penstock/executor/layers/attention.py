"""Attention of a layer: add biases, normalise heads, rotate, store keys and values in the pages, attend.

:class:`PagedAttention` says what a layer's attention is; an :class:`AttentionStep` knows which rows a step has, where
their keys and values go and by what they are computed. :class:`AttentionBatch` is that step in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from penstock.executor.layers.norm import RMSNorm
from penstock.executor.layers.rotary import RotaryEmbedding, Rotation
from penstock.kernels.attention.reference import (
    PagedLayout,
    Scratch,
    fresh_blocks,
    paged_attention,
    slot_mapping,
    write_kv,
)
from penstock.kernels.norm import Late, finish_product


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [blocks, block_tokens, kv_heads, head_dim]."""

    keys: Tensor
    values: Tensor


class AttentionStep(Protocol):
    """One step's ragged batch, as attention sees it; the same for all layers."""

    def attend(self, qkv: Tensor, attention: PagedAttention, cache: LayerCache, late: Late | None = None) -> Tensor:
        """``qkv`` [rows, (heads + 2 kv_heads) * head_dim], the merged product → [rows, heads * head_dim].

        ``late``: the normalisation of the product's rows, if that is still to come; the bias comes behind it. The keys
        and values of these rows are in ``cache`` afterwards.
        """
        ...


class PagedAttention:
    """Grouped-query attention over the cache of one layer (Ainslie et al. 2023)."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary: RotaryEmbedding,
        *,
        bias: Tensor | None = None,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        """``heads`` is a multiple of ``kv_heads``; ``bias`` [(heads + 2 kv_heads) * head_dim] of the merged product.

        Both norms, of size ``head_dim``, or none (Dehghani et al. 2023).
        """
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale = head_dim**-0.5
        self.rotary = rotary
        self.bias = bias
        self.q_norm, self.k_norm = q_norm, k_norm

    def __call__(self, qkv: Tensor, step: AttentionStep, cache: LayerCache, late: Late | None = None) -> Tensor:
        """See :meth:`AttentionStep.attend`."""
        return step.attend(qkv, self, cache, late)


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """What attention must know of a step's ragged batch, worked out once for all layers."""

    positions: Tensor
    """int64 [rows]"""
    slots: Tensor
    """int64 [rows]: where each row's key and value go"""
    fresh: Tensor
    """int64: blocks that this step begins to fill"""
    layout: PagedLayout
    rotations: dict[RotaryEmbedding, Rotation] = field(default_factory=dict)
    """Filled by the first layer that asks for one."""

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
        return cls(positions, slots, fresh_blocks(slots, block_tokens), layout)

    def attend(self, qkv: Tensor, attention: PagedAttention, cache: LayerCache, late: Late | None = None) -> Tensor:
        """See :class:`AttentionStep`."""
        qkv = finish_product(qkv, late, attention.bias)
        heads, both = attention.heads, attention.heads + attention.kv_heads
        split = qkv.view(qkv.shape[0], -1, attention.head_dim)
        turned = self._rotation(attention.rotary, qkv.dtype).apply(_normalised(split[:, :both], attention))
        write_kv(turned[:, heads:], split[:, both:], cache.keys, cache.values, self.slots, self.fresh)
        return paged_attention(turned[:, :heads], cache.keys, cache.values, self.layout, attention.scale).flatten(1)

    def _rotation(self, rotary: RotaryEmbedding, dtype: torch.dtype) -> Rotation:
        rotation = self.rotations.get(rotary)
        if rotation is None:
            rotation = self.rotations[rotary] = rotary.at(self.positions, dtype)
        return rotation


def _normalised(query_key: Tensor, attention: PagedAttention) -> Tensor:
    """Queries and keys [rows, heads + kv_heads, head_dim], each head normalised if the family does that."""
    if attention.q_norm is None or attention.k_norm is None:
        return query_key
    query, key = torch.split(query_key, [attention.heads, attention.kv_heads], dim=1)
    pairs = ((query, attention.q_norm), (key, attention.k_norm))
    return torch.cat([rms_norm(x, norm.weight.shape, norm.weight, norm.eps) for x, norm in pairs], dim=1)
