"""A plan's differences: words of the arena change."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import uses_triton


def apply_words(arena: Tensor, words: Tensor) -> None:
    """``arena[offset] = word`` for each (offset, word) of ``words``.

    ``arena`` int32 [n]; ``words`` int32 [m, 2], contiguous. The offsets differ from each other and are not checked.
    """
    if uses_triton(arena):
        from penstock.kernels.batch.update_kernel import apply_words_triton

        apply_words_triton(arena, words)
    else:
        apply_words_reference(arena, words)


def apply_words_reference(arena: Tensor, words: Tensor) -> None:
    """The same in plain torch."""
    arena[words[:, 0].long()] = words[:, 1]
