"""The end of a step of few rows: the head's product, which weighs its logits as it makes them, and the choice.

The choice is that of :mod:`penstock.kernels.sampling`, with the same noise, without its filters: first a tile of the
vocabulary, then an entry of that. A program of the head's product knows a part of a tile, and leaves that part's
largest logit and sum of exponentials; whoever chooses adds the parts of each tile. The noise of the tiles is drawn
while the head is still at work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from penstock.kernels.batch.state import BatchState
from penstock.kernels.dispatch import uses_triton
from penstock.kernels.gemv.product import Norm, gemv_reference
from penstock.kernels.gemv.shapes import GemvShape
from penstock.kernels.sampling.reference import TILE
from penstock.kernels.sampling.tail import TailOutput, sample_step_reference

KEPT: Final = 32
"""Steps whose tokens are kept: the host may take them that much later."""


@dataclass(frozen=True, slots=True)
class FewTokens:
    """What steps of few rows leave behind, and the memory that choosing needs, allocated once."""

    steps: Tensor
    """int32 [1]: how many steps have begun"""
    kept: Tensor
    """int32 [KEPT, 2, rows]: of step ``n``, counted from 0, tokens and statuses stand at ``n % KEPT``; a status is
    INERT, MADE or FAILED as in :mod:`penstock.kernels.sampling.tail`"""
    logits: Tensor
    """[rows, vocabulary]: of the last step"""
    peaks: Tensor
    """float32 [rows, parts]: the largest logit of each part of a tile"""
    masses: Tensor
    """float32 [rows, parts]: Σ exp((logit - peak) / temperature); NaN where a logit is not finite"""

    @classmethod
    def allocate(cls, rows: int, logits: Tensor) -> FewTokens:
        """For steps of up to ``rows`` rows, which leave their logits in ``logits`` [≥ rows, vocabulary]."""
        parts, device = -(-logits.shape[1] // TILE) * TILE, logits.device
        return cls(
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(KEPT, 2, rows, dtype=torch.int32, device=device),
            logits[:rows],
            torch.zeros(rows, parts, device=device),
            torch.zeros(rows, parts, device=device),
        )


def head_and_choice(
    stream: Tensor, head: Tensor, norm: Norm, state: BatchState, out: FewTokens, shape: GemvShape, count: int
) -> None:
    """Choose the next token of each of the first ``count`` rows of the decode batch and advance its slot.

    ``stream`` [rows, hidden], still to be normalised; ``head`` [vocabulary, hidden]. See
    :func:`penstock.kernels.sampling.tail.sample_step` for what is chosen and what it means for the slot.
    """
    if uses_triton(head):
        from penstock.kernels.gemv.head_kernel import head_and_choice_triton

        head_and_choice_triton(stream, head, norm, state, out, shape, count)
    else:
        head_and_choice_reference(stream, head, norm, state, out, count)


def head_and_choice_reference(
    stream: Tensor, head: Tensor, norm: Norm, state: BatchState, out: FewTokens, count: int
) -> None:
    """The same in plain torch."""
    gemv_reference(stream[:count], head, out.logits[:count], norm=norm)
    tail = TailOutput.allocate(count, head.shape[0], head.device)
    sample_step_reference(out.logits[:count], state.row_slots[:count], state, tail, filtered=False)
    kept = out.kept[(int(out.steps) - 1) % KEPT]
    kept[0, :count], kept[1, :count] = tail.tokens, tail.status
