"""Attention of one step on the device: decode rows first, rows of chunks behind them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penstock.executor.layers.attention import LayerCache, PagedAttention
from penstock.kernels.attention.chunks import AttendChunks, Chunks
from penstock.kernels.attention.decode import paged_decode_attention
from penstock.kernels.attention.decode_shapes import Spread
from penstock.kernels.batch.gather import StepRows
from penstock.kernels.batch.state import BatchState
from penstock.kernels.norm import Late
from penstock.kernels.rope import rotate_and_store


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """The chunks of a step."""

    slots: Tensor
    """int32 [sequences]"""
    query_start: Tensor
    """int32 [sequences + 1], counted from the first row of the chunks"""
    contexts: Tensor
    """int32 [sequences]: tokens of each sequence, this chunk included"""
    longest: int
    """Rows of the longest chunk; a bound of it if ``cached`` is None."""
    cached: int | None = None
    """Tokens of all these sequences before the chunks. None: only the device knows."""

    def over(self, block_tables: Tensor, slot_mapping: Tensor) -> Chunks:
        """As kernels see them; ``slot_mapping`` int64 [rows of chunks or more]."""
        return Chunks(
            block_tables, self.slots, self.query_start, self.contexts, self.longest, slot_mapping, self.cached
        )


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """See :class:`penstock.executor.layers.attention.AttentionStep`."""

    state: BatchState
    rows: StepRows
    """Its first ``decodes`` rows decode, the others belong to ``chunks``."""
    decodes: int
    attend_chunks: AttendChunks | None = None
    """None: there are no chunks."""
    spread: Spread = Spread.MIXED
    """Of the lengths of those that decode."""

    def attend(self, qkv: Tensor, attention: PagedAttention, cache: LayerCache, late: Late | None = None) -> Tensor:
        """``qkv`` [rows, (heads + 2 kv_heads) * head_dim] → [rows, heads * head_dim]; the cache has this step then."""
        count = qkv.shape[0]
        query = rotate_and_store(
            qkv,
            self.rows.positions[:count],
            attention.rotary.table,
            attention.q_norm.weight if attention.q_norm else None,
            attention.k_norm.weight if attention.k_norm else None,
            attention.q_norm.eps if attention.q_norm else 0.0,
            cache.keys,
            cache.values,
            self.rows.slot_mapping[:count],
            attention.heads,
            attention.kv_heads,
            late,
            attention.bias,
        )
        return self._attend(query, attention.scale, cache).flatten(1)

    def _attend(self, query: Tensor, scale: float, cache: LayerCache) -> Tensor:
        if self.attend_chunks is None:
            return self._decode(query, scale, cache, query.new_empty(query.shape))
        out = query.new_empty(query.shape)
        if self.decodes:
            self._decode(query[: self.decodes], scale, cache, out[: self.decodes])
        self.attend_chunks(query[self.decodes :], cache.keys, cache.values, scale, out[self.decodes :])
        return out

    def _decode(self, query: Tensor, scale: float, cache: LayerCache, out: Tensor) -> Tensor:
        rows = query.shape[0]
        return paged_decode_attention(
            query,
            cache.keys,
            cache.values,
            self.state.block_tables,
            self.state.row_slots[:rows],
            self.rows.context_lengths[:rows],
            scale,
            out=out,
            spread=self.spread,
        )
