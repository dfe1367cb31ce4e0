"""What lies behind the end of a sequence in its last page, set to zero.

A kernel that loads whole pages multiplies it with weights that are zero, and zero times the not-a-number that an
earlier owner left there is not a number: clearing keeps a poisoned sequence to itself. Of keys it does no harm, their
scores are replaced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.dispatch import uses_triton


def clear_tails(values: Tensor, tables: Tensor, context_lengths: Tensor) -> None:
    """Clear ``values`` [blocks, block_tokens, kv_heads, head_dim], contiguous, behind the last token of each sequence.

    ``tables`` int32 [sequences, width]: the pages of each sequence; ``context_lengths`` int32 [sequences]. A sequence
    whose last page is full, or that has none, is left as it is. The last page of a sequence has no other reader.
    """
    if uses_triton(values):
        from penstock.kernels.attention.tails_kernel import clear_tails_triton

        clear_tails_triton(values, tables, context_lengths)
    else:
        clear_tails_reference(values, tables, context_lengths)


def clear_tails_reference(values: Tensor, tables: Tensor, context_lengths: Tensor) -> None:
    """The same in plain torch."""
    block_tokens = values.shape[1]
    used = context_lengths % block_tokens
    last = tables.gather(1, (context_lengths // block_tokens).clamp(max=tables.shape[1] - 1)[:, None].long())[:, 0]
    unused = (torch.arange(block_tokens, device=values.device) >= used[:, None]) & (used > 0)[:, None]
    sequence, place = unused.nonzero(as_tuple=True)
    values[last[sequence].long(), place] = 0
