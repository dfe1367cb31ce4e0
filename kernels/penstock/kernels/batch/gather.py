"""The rows of a step: what each computes, where, and where its key and value go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.batch.state import LIVE, BatchState
from penstock.kernels.dispatch import uses_triton


@dataclass(frozen=True, slots=True)
class StepRows:
    """Room for the rows of a step, allocated once."""

    ids: Tensor
    """int32 [max_rows]"""
    positions: Tensor
    """int32 [max_rows]"""
    context_lengths: Tensor
    """int32 [max_rows]: of decode rows, their own token included; 0: the row does not count."""
    slot_mapping: Tensor
    """int64 [max_rows]: address of the row in a cache seen as [blocks · block_tokens, …]."""

    @classmethod
    def allocate(cls, max_rows: int, device: torch.device) -> StepRows:
        """All zero."""

        def column(dtype: torch.dtype) -> Tensor:
            return torch.zeros(max_rows, dtype=dtype, device=device)

        return cls(column(torch.int32), column(torch.int32), column(torch.int32), column(torch.int64))


def gather_rows(state: BatchState, rows: int, block_tokens: int, out: StepRows) -> None:
    """The first ``rows`` rows of the decode batch (``state.row_slots``): each computes its slot's newest token.

    A row whose slot is not live computes token 0 at position 0 with context 0, into the scratch block. ``out`` has room
    for ``rows``, and every live slot's table for its next token: neither is checked.
    """
    if uses_triton(state.arena):
        from penstock.kernels.batch.gather_kernel import gather_rows_triton

        gather_rows_triton(state, rows, block_tokens, out)
    else:
        gather_rows_reference(state, rows, block_tokens, out)


def gather_rows_reference(state: BatchState, rows: int, block_tokens: int, out: StepRows) -> None:
    """The same in plain torch."""
    slots = state.row_slots[:rows].long()
    live = state.live[slots] == LIVE
    positions = torch.where(live, state.computed[slots], 0)
    out.ids[:rows] = torch.where(live, state.last_token[slots], 0)
    out.positions[:rows] = positions
    out.context_lengths[:rows] = torch.where(live, positions + 1, 0)
    tables = torch.where(live, slots, state.layout.slots)
    out.slot_mapping[:rows] = _addresses(state, tables, positions, block_tokens)


def fill_rows(
    state: BatchState, out: StepRows, first: int, ids: Tensor, positions: Tensor, slots: Tensor, block_tokens: int
) -> None:
    """Rows of chunks, from row ``first`` on: ``ids``, ``positions``, ``slots`` int32 [n], contiguous.

    The context lengths of these rows are left as they are. ``out`` has room for them and the slots' tables for their
    positions: neither is checked.
    """
    if uses_triton(state.arena):
        from penstock.kernels.batch.gather_kernel import fill_rows_triton

        fill_rows_triton(state, out, first, ids, positions, slots, block_tokens)
    else:
        fill_rows_reference(state, out, first, ids, positions, slots, block_tokens)


def fill_rows_reference(
    state: BatchState, out: StepRows, first: int, ids: Tensor, positions: Tensor, slots: Tensor, block_tokens: int
) -> None:
    """The same in plain torch."""
    end = first + ids.numel()
    out.ids[first:end] = ids
    out.positions[first:end] = positions
    out.slot_mapping[first:end] = _addresses(state, slots.long(), positions, block_tokens)


def _addresses(state: BatchState, slots: Tensor, positions: Tensor, block_tokens: int) -> Tensor:
    """Where in a cache seen as [blocks · block_tokens, …] each row's token is; int64."""
    pages = positions.long() // block_tokens
    return state.block_tables[slots, pages].long() * block_tokens + positions % block_tokens
