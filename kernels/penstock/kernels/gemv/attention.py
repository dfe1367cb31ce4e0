"""Attention of a step of few rows, from the product for queries, keys and values to what attention made of them.

One kernel normalises heads, rotates, stores key and value of the row in its page, and attends to the sequence's past
and the row itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.attention.decode import paged_decode_attention_reference
from penstock.kernels.dispatch import uses_triton
from penstock.kernels.gemv.product import Splits
from penstock.kernels.gemv.shapes import SplitShape
from penstock.kernels.rope import rotate_and_store_reference


@dataclass(frozen=True, slots=True)
class FewRows:
    """Who the rows of a step are, and its residual stream: see :func:`penstock.kernels.gemv.begin.begin_step`."""

    positions: Tensor
    """int32 [rows]: where each row stands in its sequence, which is how many tokens are before it"""
    tables: Tensor
    """int32 [rows]: whose block table each row has; a row that does not count has that of the extra slot"""
    stream: Tensor
    """[rows, hidden]"""


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights [head_dim] by which normalised heads are multiplied, of one layer."""

    queries: Tensor
    keys: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class SplitRoom:
    """Memory between the splits of attention and whoever merges them, allocated once."""

    splits: Splits
    arrivals: Tensor
    """int32 [rows, kv_heads]: how many splits are done; zero between steps"""
    merged: Tensor
    """[rows, heads · head_dim]"""

    @classmethod
    def allocate(
        cls, rows: int, heads: int, kv_heads: int, head_dim: int, splits: int, dtype: torch.dtype, device: torch.device
    ) -> SplitRoom:
        """For attention of one shape."""
        return cls(
            Splits(
                torch.zeros(rows, heads, splits, head_dim, device=device),
                torch.zeros(rows, heads, splits, device=device),
            ),
            torch.zeros(rows, kv_heads, dtype=torch.int32, device=device),
            torch.zeros(rows, heads * head_dim, dtype=dtype, device=device),
        )


def few_rows_attention(
    qkv: Tensor,
    rows: FewRows,
    cos_sin: Tensor,
    norms: HeadNorms | None,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    scale: float,
    shape: SplitShape,
    room: SplitRoom,
) -> Tensor | Splits:
    """Attend each row; the cache has it then.

    ``qkv`` [rows, (heads + 2 · kv_heads) · head_dim]; ``cos_sin`` float32 [positions, head_dim], cosines first;
    ``keys``, ``values`` [blocks, block_tokens, kv_heads, head_dim]; ``block_tables`` int32 [slots + 1, width].
    Returns [rows, heads · head_dim], or splits if the shape leaves them to the product behind.

    Under programmatic dependent launch the kernel in front must release this one late (:func:`.product.gemv`): it
    reads the past, which older kernels wrote, before it waits.
    """
    arguments = (qkv, rows, cos_sin, norms, keys, values, block_tables, scale)
    if uses_triton(qkv):
        from penstock.kernels.gemv.attention_kernel import few_rows_attention_triton

        return few_rows_attention_triton(*arguments, shape, room)
    return few_rows_attention_reference(*arguments)


def few_rows_attention_reference(
    qkv: Tensor,
    rows: FewRows,
    cos_sin: Tensor,
    norms: HeadNorms | None,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    scale: float,
) -> Tensor:
    """The same in plain torch, merged."""
    block_tokens, kv_heads, head_dim = keys.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    count = qkv.shape[0]
    positions, tables = rows.positions[:count], rows.tables[:count]
    pages = block_tables[tables.long(), positions.long() // block_tokens].long()
    query = rotate_and_store_reference(
        qkv,
        positions,
        cos_sin,
        norms.queries if norms else None,
        norms.keys if norms else None,
        norms.eps if norms else 0.0,
        keys,
        values,
        pages * block_tokens + positions % block_tokens,
        heads,
        kv_heads,
    )
    attended = paged_decode_attention_reference(query, keys, values, block_tables, tables, positions + 1, scale)
    return attended.flatten(1)
