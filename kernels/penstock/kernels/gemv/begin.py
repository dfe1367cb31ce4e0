"""The begin of a step of few rows: who its rows are, and the embeddings of what they compute."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.batch.state import LIVE, BatchState
from penstock.kernels.dispatch import uses_triton
from penstock.kernels.gemv.attention import FewRows


def begin_step(state: BatchState, embedding: Tensor, out: FewRows, steps: Tensor, count: int) -> None:
    """The first ``count`` rows of the decode batch (``state.row_slots``): each computes its slot's newest token.

    ``embedding`` [vocabulary, hidden]; ``steps`` int32 [1] counts: see :mod:`penstock.kernels.gemv.head`. A row whose
    slot is not live computes token 0 at position 0 with the table of the extra slot, which names the scratch block.
    """
    if uses_triton(embedding):
        from penstock.kernels.gemv.begin_kernel import begin_step_triton

        begin_step_triton(state, embedding, out, steps, count)
    else:
        begin_step_reference(state, embedding, out, steps, count)


def begin_step_reference(state: BatchState, embedding: Tensor, out: FewRows, steps: Tensor, count: int) -> None:
    """The same in plain torch."""
    slots = state.row_slots[:count].long()
    live = state.live[slots] == LIVE
    out.positions[:count] = state.computed[slots] * live
    out.tables[:count] = (slots * live + state.layout.slots * ~live).int()
    out.stream[:count] = embedding[state.last_token[slots].long() * live]
    steps += 1
