"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A pure function from a 128-bit counter and a 64-bit key to 128 random bits: no state, so any number can be
made anywhere, in any order, on any device. Words are unsigned 32-bit values held in int64 tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
"""The golden ratio and the square root of three less one, as fractions of 2^32."""

Counter = tuple[Tensor, Tensor, Tensor, Tensor]
Key = tuple[Tensor, Tensor]


def philox_4x32(counter: Counter, key: Key) -> Counter:
    """Four random words for each counter; all words int64 in [0, 2^32), of shapes that broadcast."""
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(ROUNDS):
        product0, product1 = word0 * MULTIPLIERS[0], word2 * MULTIPLIERS[1]
        word0, word1, word2, word3 = (
            _high(product1) ^ word1 ^ key0,
            product1 & WORD,
            _high(product0) ^ word3 ^ key1,
            product0 & WORD,
        )
        key0, key1 = (key0 + KEY_STEPS[0]) & WORD, (key1 + KEY_STEPS[1]) & WORD
    return word0, word1, word2, word3


def words(value: Tensor) -> Key:
    """The low and the high 32 bits of an int64 tensor that is read as unsigned 64-bit."""
    return value & WORD, (value >> 32) & WORD


def uniform(word: Tensor) -> Tensor:
    """float32 in (0, 1) from a random word: ``(word + 1/2) / 2^32``, fine near 0 and never 1."""
    return torch.clamp((word.to(torch.float32) + 0.5) * 2.0**-32, max=1.0 - 2.0**-24)


def _high(product: Tensor) -> Tensor:
    """The high word of a 64-bit product: int64 wraps around, so its bits are right if not its sign."""
    return (product >> 32) & WORD
