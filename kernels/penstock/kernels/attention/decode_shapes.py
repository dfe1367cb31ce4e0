"""How the decode kernel is cut, by the number of rows: measured on an H200, not reasoned."""

from __future__ import annotations

import enum
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


class Spread(enum.Enum):
    """How the lengths of a batch differ: a hint for the cut, whatever it is the result is the same."""

    EVEN = enum.auto()
    """The longest is at most half as long again as the mean."""
    MIXED = enum.auto()
    LONE = enum.auto()
    """One sequence holds more than an eighth of all tokens: whoever had it alone would hold up the step."""

    @classmethod
    def of(cls, longest: int, total: int, rows: int) -> Spread:
        """From the longest length, the sum of all, and how many they are."""
        if rows > FEW and 8 * longest > total:
            return cls.LONE
        return cls.EVEN if 2 * longest * rows <= 3 * total else cls.MIXED


FEW: Final = 24
"""The rows of a small batch are split among programs whatever their lengths are."""
_SMALL: Final = (
    (2, DecodeShape(32, 3, 2, 32, 64)),
    (8, DecodeShape(32, 3, 2, 16, 128)),
    (FEW, DecodeShape(64, 2, 2, 8, 128)),
)
_LARGE: Final = (
    (176, DecodeShape(64, 2, 2, 1, 64)),
    (208, DecodeShape(32, 4, 2, 1, 64)),
    (240, DecodeShape(64, 2, 2, 1, 64)),
    (1 << 30, DecodeShape(32, 6, 2, 1, 64)),
)
CUTS: Final = {
    Spread.EVEN: (
        *_SMALL,
        (80, DecodeShape(32, 6, 2, 1, 64)),
        (112, DecodeShape(32, 3, 2, 1, 64)),
        (144, DecodeShape(32, 3, 1, 1, 64)),
        *_LARGE,
    ),
    Spread.MIXED: (
        *_SMALL,
        (56, DecodeShape(64, 4, 4, 4, 128)),
        (80, DecodeShape(32, 6, 2, 2, 128)),
        (112, DecodeShape(32, 3, 1, 2, 128)),
        (144, DecodeShape(32, 6, 2, 1, 64)),
        *_LARGE,
    ),
    Spread.LONE: (*_SMALL, (1 << 30, DecodeShape(64, 3, 4, 16, 256))),
}
"""Up to so many rows of eight key/value heads. From about 96 rows on there are programs enough without splitting."""
FLOAT32: Final = DecodeShape(16, 1, 4, 8, 64)
"""The reference mode: right, not fast."""


def decode_shape(rows: int, kv_heads: int, dtype: torch.dtype, spread: Spread) -> DecodeShape:
    """The cut for so many rows, of which each has ``kv_heads`` programs a chunk."""
    if dtype == torch.float32:
        return FLOAT32
    return next(shape for most, shape in CUTS[spread] if rows * kv_heads <= 8 * most)
