"""The end of a step: from logits to tokens, stop conditions and the state of the slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from penstock.kernels.batch.state import LIVE, MAX_STOP_IDS, NOT_LIVE, BatchState
from penstock.kernels.dispatch import uses_triton
from penstock.kernels.sampling.reference import TILE, SamplingRows, sample

INERT: Final = 0
"""The row's slot is not live: nothing was made."""
MADE: Final = 1
"""A token was made."""
FAILED: Final = 2
"""A logit was not finite: nothing was made and the slot is not live any more."""

PEAK: Final = 512
"""Vocabulary entries of which the filters know the largest logit."""
CANDIDATES: Final = 4096
"""Logits of a row that the filters may set apart."""


@dataclass(frozen=True, slots=True)
class TailOutput:
    """What a step leaves behind, and the memory that it needs, allocated once. Row ``r`` is row ``r`` of the logits."""

    tokens: Tensor
    """int32 [max_rows]; 0 unless one was made"""
    status: Tensor
    """int32 [max_rows]: INERT, MADE or FAILED"""
    weights: Tensor
    """float32 [max_rows, tiles]: of each tile, as in the reference; NaN where a logit is not finite"""
    floors: Tensor
    """float32 [max_rows]: the lowest logit that the filters leave"""
    peaks: Tensor
    """float32 [max_rows, peaks]: the largest logit of each PEAK entries"""
    candidates: Tensor
    """float32 [max_rows, CANDIDATES]: the logits that filters look at more than twice"""
    cursors: Tensor
    """int32 [max_rows]: how many there are"""

    @classmethod
    def allocate(cls, max_rows: int, vocab: int, device: torch.device) -> TailOutput:
        """For steps of up to ``max_rows`` rows of ``vocab`` logits."""

        def floats(*shape: int) -> Tensor:
            return torch.zeros(max_rows, *shape, device=device)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(max_rows, *shape, dtype=torch.int32, device=device)

        return cls(
            tokens=integers(),
            status=integers(),
            weights=floats(-(-vocab // TILE)),
            floors=floats(),
            peaks=floats(-(-vocab // PEAK)),
            candidates=floats(CANDIDATES),
            cursors=integers(),
        )


def sample_step(logits: Tensor, slots: Tensor, state: BatchState, out: TailOutput, *, filtered: bool) -> None:
    """Choose the next token of each row, write it to ``out`` and advance the row's slot.

    ``logits`` bfloat16 or float32 [rows, vocabulary], each row contiguous. ``slots`` int32 [rows]: the slot of each;
    none that is live twice. ``filtered``: whether top-k, top-p and min-p are looked at; without it they must leave
    everything in for every live row.

    A live slot's token stands at position ``computed + 1``. Until ``min_tokens`` are made, its stop ids are not chosen.
    Temperature 0 takes the largest logit, the lowest id among equals; others draw as
    :func:`penstock.kernels.sampling.reference.sample` does. Then ``last_token``, ``computed`` and ``outputs`` advance,
    and a stop id or the last of ``max_tokens`` ends the slot: NOT_LIVE, and the token counts. A row with a logit that
    is not finite fails alone. Rows of slots that are not live change nothing.

    Nothing waits for the device, and what is launched depends on the shapes only: it can be captured in a CUDA graph.
    """
    if not uses_triton(logits):
        sample_step_reference(logits, slots, state, out, filtered=filtered)
        return
    from penstock.kernels.sampling.launch import launch_tail

    launch_tail(logits, slots, state, out, filtered=filtered)


def sample_step_reference(logits: Tensor, slots: Tensor, state: BatchState, out: TailOutput, *, filtered: bool) -> None:
    """:func:`sample_step` in plain torch."""
    count = slots.numel()
    out.tokens[:count] = 0
    out.status[:count] = INERT
    rows = (state.live[slots.long()] == LIVE).nonzero().squeeze(1)
    values = logits[rows].float()
    sound = values.isfinite().all(dim=1)
    out.status[rows[~sound]] = FAILED
    state.live[slots[rows[~sound]].long()] = NOT_LIVE
    rows, values = rows[sound], values[sound]
    if not rows.numel():
        return
    owners = slots[rows].long()
    _forbid_stopping(values, owners, state)
    tokens = sample(values, _sampling(owners, state, filtered), state.computed[owners].long() + 1).int()
    out.tokens[rows] = tokens
    out.status[rows] = MADE
    state.last_token[owners] = tokens
    state.computed[owners] += 1
    state.outputs[owners] += 1
    ends = (_stops(owners, state) == tokens[:, None]).any(dim=1)
    ends |= state.outputs[owners] >= state.max_tokens[owners]
    state.live[owners[ends]] = NOT_LIVE


def _sampling(slots: Tensor, state: BatchState, filtered: bool) -> SamplingRows:
    low, high = state.seeds[slots].long().unbind(dim=1)
    rows = SamplingRows(
        temperature=state.temperature[slots],
        top_k=state.top_k[slots].long(),
        top_p=state.top_p[slots],
        seed=(high << 32) | (low & 0xFFFFFFFF),
        sample_index=state.sample_index[slots].long() & 0xFFFFFFFF,
        min_p=state.min_p[slots],
    )
    if filtered:
        return rows
    return replace(rows, top_k=torch.zeros_like(rows.top_k), top_p=torch.ones_like(rows.top_p), min_p=None)


def _stops(slots: Tensor, state: BatchState) -> Tensor:
    """The stop ids int32 [rows, MAX_STOP_IDS] of slots, -1 where there is none."""
    lanes = torch.arange(MAX_STOP_IDS, device=slots.device)
    return state.stop_ids[slots].masked_fill(lanes >= state.stop_count[slots][:, None], -1)


def _forbid_stopping(logits: Tensor, slots: Tensor, state: BatchState) -> None:
    """Minus infinity for the stop ids of slots that have not made their min_tokens."""
    stops = _stops(slots, state)
    early = state.outputs[slots] < state.min_tokens[slots]
    row, entry = (early[:, None] & (stops >= 0) & (stops < logits.shape[1])).nonzero(as_tuple=True)
    logits[row, stops[row, entry].long()] = float("-inf")
