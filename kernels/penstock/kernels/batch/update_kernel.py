"""The kernel of :mod:`penstock.kernels.batch.update`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch

_TILE = 256


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["words"])
def apply_words_kernel(arena, words, count, TILE: tl.constexpr):
    entry = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = entry < count
    offset = tl.load(words + 2 * entry, mask=inside, other=0)
    tl.store(arena + offset, tl.load(words + 2 * entry + 1, mask=inside, other=0), mask=inside)


def apply_words_triton(arena: Tensor, words: Tensor) -> None:
    """See :func:`penstock.kernels.batch.update.apply_words`."""
    count = words.shape[0]
    if count:
        launch(apply_words_kernel, (triton.cdiv(count, _TILE),))(arena, words, count, _TILE, num_warps=4)
