"""What a step computes, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.executor.worker.slots import NO_TOKEN, SlotTensors
from penstock.kernels.sampling.reference import SamplingRows


@dataclass(frozen=True, slots=True)
class Choosing:
    """How the next tokens of some slots are chosen and when they end: copies of their rows, made once per batch."""

    slots: Tensor
    """int64 [rows]"""
    sampling: SamplingRows
    max_tokens: Tensor
    min_tokens: Tensor
    stop_ids: Tensor
    """int64 [rows, the most that one of them has]"""
    has_min_tokens: bool

    @classmethod
    def of(cls, slots: Tensor, tensors: SlotTensors) -> Choosing:
        """Gather the rows of ``slots``."""
        stop_ids, min_tokens = tensors.stop_ids[slots], tensors.min_tokens[slots]
        width = int((stop_ids != NO_TOKEN).sum(dim=1).max()) if slots.numel() else 0
        return cls(
            slots,
            tensors.sampling.take(slots),
            tensors.max_tokens[slots],
            min_tokens,
            stop_ids[:, :width],
            bool(min_tokens.any()),
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Known ids of one slot that a step computes."""

    slot: int
    start: int
    ids: Tensor
    """int64"""
    completes: bool
    """Its last row is the newest known id: the next token is chosen from it."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """The rows of one step: first the decodes, then the chunks, sequence after sequence."""

    ids: Tensor
    """int64 [rows]"""
    positions: Tensor
    """int64 [rows]"""
    query_start: Tensor
    """int32 [sequences + 1]"""
    context_lengths: Tensor
    """int32 [sequences]: tokens of each, those of this step included"""
    slots: Tensor
    """int64 [sequences]"""
    lengths: Tensor
    """int64 [sequences]: rows of each"""
    block_tables: Tensor
    """int32 [sequences, blocks of the longest]"""
    last_rows: Tensor
    """int64 [samples]: the rows whose next token is chosen"""
    choosing: Choosing
    """For those rows."""

    @classmethod
    def of_decodes(cls, decoding: Choosing, tensors: SlotTensors, block_tokens: int) -> StepInput:
        """One row of each slot that decodes; at least one."""
        slots, count = decoding.slots, decoding.slots.numel()
        positions = tensors.computed[slots]
        contexts = positions + 1
        starts = torch.arange(count + 1)
        return cls(
            ids=tensors.last_token[slots],
            positions=positions,
            query_start=starts.int(),
            context_lengths=contexts.int(),
            slots=slots,
            lengths=torch.ones_like(slots),
            block_tables=_tables(tensors, slots, contexts, block_tokens),
            last_rows=starts[:-1],
            choosing=decoding,
        )

    @classmethod
    def of_mixed(
        cls, decoding: Choosing, chunks: Sequence[Chunk], tensors: SlotTensors, block_tokens: int
    ) -> StepInput:
        """One row of each slot that decodes, and the chunks; at least one chunk."""
        decodes = decoding.slots
        slots = torch.cat((decodes, torch.tensor([chunk.slot for chunk in chunks])))
        sizes = torch.tensor([chunk.ids.numel() for chunk in chunks])
        lengths = torch.cat((torch.ones_like(decodes), sizes))
        known = [torch.arange(chunk.start, chunk.start + chunk.ids.numel()) for chunk in chunks]
        ends = lengths.cumsum(0)
        contexts = tensors.computed[slots] + lengths
        chooses = torch.tensor([True] * decodes.numel() + [chunk.completes for chunk in chunks])
        return cls(
            ids=torch.cat((tensors.last_token[decodes], *(chunk.ids for chunk in chunks))),
            positions=torch.cat((tensors.computed[decodes], *known)),
            query_start=torch.cat((torch.zeros_like(ends[:1]), ends)).int(),
            context_lengths=contexts.int(),
            slots=slots,
            lengths=lengths,
            block_tables=_tables(tensors, slots, contexts, block_tokens),
            last_rows=ends[chooses] - 1,
            choosing=Choosing.of(slots[chooses], tensors),
        )


def _tables(tensors: SlotTensors, slots: Tensor, contexts: Tensor, block_tokens: int) -> Tensor:
    """Block tables as wide as the longest context needs: a whole row may be thousands of entries."""
    return tensors.block_tables[slots, : -(-int(contexts.max()) // block_tokens)]
