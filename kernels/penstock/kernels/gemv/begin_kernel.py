# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The kernel of :mod:`penstock.kernels.gemv.begin`: a program a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch
from penstock.kernels.batch.state import LIVE, BatchState
from penstock.kernels.gemv.attention import FewRows
from penstock.kernels.overlap import launch_options, overlaps
from penstock.kernels.overlap_kernel import release_next, wait_for_previous

_LIVE = tl.constexpr(LIVE)


@triton.jit(do_not_specialize_on_alignment=["row_slots", "live", "last_token", "computed"])
def begin_kernel(
    row_slots, live, last_token, computed, embedding, positions, tables, stream, steps,
    SLOTS: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, TILE)
    release_next(OVERLAP)
    wait_for_previous(OVERLAP)
    slot = tl.load(row_slots + row)
    counts = tl.load(live + slot) == _LIVE
    token = tl.where(counts, tl.load(last_token + slot), 0).to(tl.int64)
    tl.store(positions + row, tl.where(counts, tl.load(computed + slot), 0))
    tl.store(tables + row, tl.where(counts, slot, SLOTS))
    element = tl.load(embedding + token * HIDDEN + column, mask=column < HIDDEN)
    tl.store(stream + row * HIDDEN + column, element, mask=column < HIDDEN)
    if row == 0:
        tl.store(steps, tl.load(steps) + 1)


def begin_step_triton(state: BatchState, embedding: Tensor, out: FewRows, steps: Tensor, count: int) -> None:
    """See :func:`penstock.kernels.gemv.begin.begin_step`."""
    hidden = embedding.shape[1]
    launch(begin_kernel, (count,))(
        state.row_slots, state.live, state.last_token, state.computed, embedding,
        out.positions, out.tables, out.stream, steps,
        state.layout.slots, hidden, triton.next_power_of_2(hidden), overlaps(count),
        num_warps=8, **launch_options(count),
    )  # fmt: skip
