# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Which entries of a row may not be chosen."""

import triton
import triton.language as tl


@triton.jit
def forbidden_stops(slot, outputs, min_tokens, stop_count):
    """How many of the slot's stop ids may not be chosen yet: all of them until ``min_tokens`` are made."""
    early = tl.load(outputs + slot) < tl.load(min_tokens + slot)
    return tl.where(early, tl.load(stop_count + slot), 0)


@triton.jit
def forbid(values, ids, size, stop_ids, forbidden):
    """``values`` of the entries ``ids`` with -inf at the first ``forbidden`` stop ids, and beyond ``size``."""
    values = tl.where(ids < size, values, float("-inf"))
    for index in range(forbidden):
        values = tl.where(ids == tl.load(stop_ids + index), float("-inf"), values)
    return values
