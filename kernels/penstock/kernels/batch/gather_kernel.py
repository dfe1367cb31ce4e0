"""The kernels of :mod:`penstock.kernels.batch.gather`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch
from penstock.kernels.batch.gather import StepRows
from penstock.kernels.batch.state import LIVE, BatchState

_LIVE = tl.constexpr(LIVE)
_TILE = 128


@triton.jit
def _address(block_tables, slot, position, inside, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Where in a cache seen as [blocks · block_tokens, …] the token at ``position`` of ``slot`` is; int64."""
    block = tl.load(block_tables + slot * WIDTH + position // BLOCK, mask=inside, other=0).to(tl.int64)
    return block * BLOCK + position % BLOCK


@triton.jit(do_not_specialize=["rows"])
def gather_rows_kernel(
    row_slots, live, last_token, computed, block_tables, ids, positions, contexts, slot_mapping, rows,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    slot = tl.load(row_slots + row, mask=inside, other=SLOTS)
    # Every slot has these columns: they are loaded at once, and not only when it is known that the slot is live.
    counts = tl.load(live + slot) == _LIVE
    token = tl.where(counts, tl.load(last_token + slot), 0)
    position = tl.where(counts, tl.load(computed + slot), 0)
    slot = tl.where(counts, slot, SLOTS)
    tl.store(ids + row, token, mask=inside)
    tl.store(positions + row, position, mask=inside)
    tl.store(contexts + row, tl.where(counts, position + 1, 0), mask=inside)
    tl.store(slot_mapping + row, _address(block_tables, slot, position, inside, BLOCK, WIDTH), mask=inside)


@triton.jit(do_not_specialize=["first", "rows"])
def fill_rows_kernel(
    from_ids, from_positions, slots, block_tables, ids, positions, slot_mapping, first, rows,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    position = tl.load(from_positions + row, mask=inside, other=0)
    slot = tl.load(slots + row, mask=inside, other=0)
    tl.store(ids + first + row, tl.load(from_ids + row, mask=inside, other=0), mask=inside)
    tl.store(positions + first + row, position, mask=inside)
    tl.store(slot_mapping + first + row, _address(block_tables, slot, position, inside, BLOCK, WIDTH), mask=inside)


def gather_rows_triton(state: BatchState, rows: int, block_tokens: int, out: StepRows) -> None:
    """See :func:`penstock.kernels.batch.gather.gather_rows`."""
    if rows:
        launch(gather_rows_kernel, (triton.cdiv(rows, _TILE),))(
            state.row_slots, state.live, state.last_token, state.computed, state.block_tables,
            out.ids, out.positions, out.context_lengths, out.slot_mapping, rows,
            state.layout.slots, block_tokens, state.layout.table_width, _TILE, num_warps=4,
        )  # fmt: skip


def fill_rows_triton(
    state: BatchState, out: StepRows, first: int, ids: Tensor, positions: Tensor, slots: Tensor, block_tokens: int
) -> None:
    """See :func:`penstock.kernels.batch.gather.fill_rows`."""
    rows = ids.numel()
    if rows:
        launch(fill_rows_kernel, (triton.cdiv(rows, _TILE),))(
            ids, positions, slots, state.block_tables, out.ids, out.positions, out.slot_mapping, first, rows,
            block_tokens, state.layout.table_width, _TILE, num_warps=4,
        )  # fmt: skip
