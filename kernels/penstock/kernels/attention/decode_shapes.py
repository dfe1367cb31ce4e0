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
    """The longest is hardly longer than the mean: programs of whole rows end together."""
    UNEVEN = enum.auto()
    """It is up to two thirds longer, as among sequences that began together."""
    MIXED = enum.auto()
    LONE = enum.auto()
    """One sequence holds more than an eighth of all tokens: whoever had it alone would hold up the step."""

    @classmethod
    def of(cls, longest: int, total: int, rows: int) -> Spread:
        """From the longest length, the sum of all, and how many they are."""
        if rows > FEW and 8 * longest > total:
            return cls.LONE
        if 20 * longest * rows <= 23 * total:
            return cls.EVEN
        return cls.UNEVEN if 3 * longest * rows <= 5 * total else cls.MIXED


FEW: Final = 24
"""The rows of a small batch are split among programs whatever their lengths are."""
_PAIR: Final = (2, DecodeShape(32, 3, 2, 32, 64))
_REST: Final = (1 << 30, DecodeShape(32, 6, 2, 1, 64))
CUTS: Final = {
    Spread.EVEN: (
        _PAIR,
        (4, DecodeShape(32, 6, 2, 8, 128)),
        (12, DecodeShape(32, 6, 2, 4, 128)),
        (FEW, DecodeShape(32, 6, 2, 2, 128)),
        (64, DecodeShape(32, 6, 2, 1, 64)),
        (100, DecodeShape(32, 4, 2, 1, 64)),
        (136, DecodeShape(32, 3, 1, 1, 64)),
        (152, DecodeShape(64, 2, 2, 1, 64)),
        (168, DecodeShape(32, 6, 2, 1, 64)),
        (200, DecodeShape(32, 3, 2, 1, 64)),
        (216, DecodeShape(32, 3, 1, 1, 64)),
        _REST,
    ),
    Spread.UNEVEN: (
        _PAIR,
        (8, DecodeShape(32, 6, 2, 8, 128)),
        (16, DecodeShape(32, 6, 2, 4, 128)),
        (60, DecodeShape(32, 6, 2, 2, 128)),
        (76, DecodeShape(32, 3, 1, 2, 128)),
        (168, DecodeShape(32, 6, 2, 1, 64)),
        (200, DecodeShape(32, 4, 2, 1, 64)),
        _REST,
    ),
    Spread.MIXED: (
        _PAIR,
        (8, DecodeShape(32, 6, 2, 8, 128)),
        (12, DecodeShape(32, 6, 2, 6, 128)),
        (16, DecodeShape(32, 6, 2, 8, 128)),
        (FEW, DecodeShape(32, 3, 2, 6, 128)),
        (36, DecodeShape(32, 4, 2, 4, 128)),
        (44, DecodeShape(32, 6, 2, 2, 128)),
        (52, DecodeShape(64, 2, 4, 3, 128)),
        (76, DecodeShape(32, 6, 2, 2, 128)),
        (84, DecodeShape(32, 3, 2, 2, 128)),
        (92, DecodeShape(32, 6, 2, 2, 128)),
        (100, DecodeShape(32, 3, 1, 2, 128)),
        _REST,
    ),
    Spread.LONE: (
        _PAIR,
        (8, DecodeShape(32, 6, 2, 8, 128)),
        (FEW, DecodeShape(64, 2, 2, 8, 128)),
        (1 << 30, DecodeShape(64, 3, 4, 16, 256)),
    ),
}
"""Up to so many rows of eight key/value heads. From about 96 rows on there are programs enough without splitting."""
FLOAT32: Final = DecodeShape(16, 1, 4, 8, 64)
"""The reference mode: right, not fast."""


def decode_shape(rows: int, kv_heads: int, dtype: torch.dtype, spread: Spread) -> DecodeShape:
    """The cut for so many rows, of which each has ``kv_heads`` programs a chunk."""
    if dtype == torch.float32:
        return FLOAT32
    return next(shape for most, shape in CUTS[spread] if rows * kv_heads <= 8 * most)
