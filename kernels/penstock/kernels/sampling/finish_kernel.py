# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""From the best of each chunk to the token of each row, and what the token means for its slot."""

import triton
import triton.language as tl

from penstock.kernels.overlap_kernel import wait_for_previous


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["slots"])
def finish(
    slots,  # int32 [rows]
    scores,  # float32 [rows, partials], and so on: what choose wrote
    ids,
    residues,
    partials,
    chunks,
    live,  # columns of the state
    last_token,
    computed,
    outputs,
    max_tokens,
    stop_count,
    stop_ids,
    tokens,  # out: int32 [rows]
    status,  # out: int32 [rows]
    CHUNKS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    INERT: tl.constexpr,
    MADE: tl.constexpr,
    FAILED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program ``row`` writes the token and the status of its row and advances its slot. CHUNKS ≥ ``chunks``."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    wait_for_previous(OVERLAP)
    if tl.load(live + slot) == 0:
        tl.store(tokens + row, 0)
        tl.store(status + row, INERT)
        return
    lanes = tl.arange(0, CHUNKS)
    score = tl.load(scores + row * partials + lanes, mask=lanes < chunks, other=float("-inf"))
    entry = tl.load(ids + row * partials + lanes, mask=lanes < chunks, other=0x7FFFFFFF)
    residue = tl.load(residues + row * partials + lanes, mask=lanes < chunks, other=0.0)
    token = tl.min(tl.where(score == tl.max(score, axis=0), entry, 0x7FFFFFFF), axis=0)
    if tl.sum(residue, axis=0) != 0:  # NaN is not 0
        tl.store(live + slot, 0)
        tl.store(tokens + row, 0)
        tl.store(status + row, FAILED)
        return
    made = tl.load(outputs + slot) + 1
    tl.store(outputs + slot, made)
    tl.store(computed + slot, tl.load(computed + slot) + 1)
    tl.store(last_token + slot, token)
    tl.store(tokens + row, token)
    tl.store(status + row, MADE)
    stops = tl.arange(0, STOP_IDS)
    stop = tl.load(stop_ids + slot * STOP_IDS + stops, mask=stops < tl.load(stop_count + slot), other=-1)
    if (tl.max((stop == token).to(tl.int32), axis=0) > 0) | (made >= tl.load(max_tokens + slot)):
        tl.store(live + slot, 0)
