"""The kernel of :mod:`penstock.kernels.attention.tails`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch


@triton.jit
def clear_tails_kernel(
    values, tables, context_lengths,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    place = tl.program_id(1)
    context = tl.load(context_lengths + sequence)
    used = context % BLOCK
    if (used == 0) | (place < used):
        return
    page = tl.load(tables + sequence.to(tl.int64) * WIDTH + context // BLOCK).to(tl.int64)
    element = tl.arange(0, TILE)
    zero = tl.zeros([TILE], values.dtype.element_ty)
    tl.store(values + (page * BLOCK + place) * ROW + element, zero, mask=element < ROW)


def clear_tails_triton(values: Tensor, tables: Tensor, context_lengths: Tensor) -> None:
    """See :func:`penstock.kernels.attention.tails.clear_tails`."""
    _, block_tokens, kv_heads, head_dim = values.shape
    row = kv_heads * head_dim
    if tables.shape[0]:
        launch(clear_tails_kernel, (tables.shape[0], block_tokens))(
            values, tables, context_lengths, tables.stride(0), block_tokens, row, triton.next_power_of_2(row),
            num_warps=4,
        )  # fmt: skip
