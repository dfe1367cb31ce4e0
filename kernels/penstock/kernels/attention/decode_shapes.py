"""How the decode kernel is cut, by the number of rows: measured on an H200, not reasoned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """One cut of the decode kernel."""

    tile: int
    """Tokens of one step of a program; at most a page."""
    stages: int
    """Tiles under way at a time."""
    warps: int
    splits: int
    """Most chunks of a row."""
    min_chunk: int
    """Tokens of a chunk, at least; a multiple of the tile."""


EVEN: Final = (
    (2, DecodeShape(32, 3, 2, 32, 64)),
    (8, DecodeShape(32, 3, 2, 16, 128)),
    (24, DecodeShape(64, 2, 2, 8, 128)),
    (40, DecodeShape(32, 6, 2, 2, 128)),
    (80, DecodeShape(32, 6, 2, 1, 64)),
    (112, DecodeShape(32, 3, 2, 1, 64)),
    (176, DecodeShape(64, 2, 2, 1, 64)),
    (208, DecodeShape(32, 4, 2, 1, 64)),
    (240, DecodeShape(64, 2, 2, 1, 64)),
    (1 << 30, DecodeShape(32, 6, 2, 1, 64)),
)
"""Up to so many rows of eight key/value heads. From 48 rows on there are programs enough without splitting."""
UNEVEN: Final = DecodeShape(64, 3, 4, 16, 256)
"""Where one sequence is far longer than the others: the program that had all of it would hold up the step."""
FLOAT32: Final = DecodeShape(16, 1, 4, 8, 64)
"""The reference mode: right, not fast."""


def decode_shape(rows: int, kv_heads: int, dtype: torch.dtype, *, uneven: bool = False) -> DecodeShape:
    """The cut for so many rows, of which each has ``kv_heads`` programs a chunk."""
    if dtype == torch.float32:
        return FLOAT32
    if uneven and rows * kv_heads > 8 * 24:
        return UNEVEN
    return next(shape for most, shape in EVEN if rows * kv_heads <= 8 * most)
