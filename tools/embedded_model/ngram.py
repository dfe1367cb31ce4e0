"""Unigram and interpolated Kneser-Ney models over bytes or tokens: what the network has to beat.

Kneser & Ney, "Improved backing-off for M-gram language modeling", ICASSP 1995, in the interpolated form of
Chen & Goodman, "An empirical study of smoothing techniques for language modeling", 1998, one discount
per order. An n-gram is one int64, its symbols the digits of a number in base `alphabet`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Alphabet:
    """Symbols are 0 … size-1; every text is led in by `begin` (never predicted) and closed by its end symbol."""

    size: int
    begin: int


def unigram_bits(train: Sequence[Ints], test: Sequence[Ints], alphabet: Alphabet) -> float:
    """Bits to code all of `test`, add-one smoothed over every symbol but `begin`."""
    counts = np.bincount(np.concatenate(train), minlength=alphabet.size) + 1.0
    counts[alphabet.begin] = 0.0
    bits = np.log2(counts.sum()) - np.log2(counts[np.concatenate(test)])
    return float(bits.sum())


def kneser_ney_bits(train: Sequence[Ints], test: Sequence[Ints], order: int, alphabet: Alphabet) -> float:
    """Bits to code all of `test` with an interpolated Kneser-Ney model of `order` fitted on `train`.

    Raises OverflowError when `order` symbols do not fit an int64.
    """
    if alphabet.size**order >= 2**63:
        raise OverflowError(f"{order} symbols of an alphabet of {alphabet.size} do not fit 63 bits")
    grams, counts = np.unique(_grams(train, order, alphabet), return_counts=True)
    levels = [_Level.fit(grams, counts, alphabet)]
    for length in range(order - 1, 0, -1):
        # Below the highest order a gram counts the distinct symbols seen before it, not its occurrences.
        grams, counts = np.unique(grams % alphabet.size**length, return_counts=True)
        levels.append(_Level.fit(grams, counts, alphabet))
    queries = _grams(test, order, alphabet)
    probability = np.full(queries.shape, 1.0 / (alphabet.size - 1))
    for length, level in enumerate(reversed(levels), start=1):
        probability = level.interpolate(queries % alphabet.size**length, probability)
    return float(-np.log2(probability).sum())


@dataclass(frozen=True, slots=True)
class _Level:
    """One order: sorted grams with their counts, and per sorted context its total and its number of grams."""

    alphabet: Alphabet
    discount: float
    grams: Ints
    counts: Ints
    contexts: Ints
    totals: Ints
    kinds: Ints

    @classmethod
    def fit(cls, grams: Ints, counts: Ints, alphabet: Alphabet) -> "_Level":
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = once / (once + 2 * twice) if once else 0.0
        contexts, starts, kinds = np.unique(grams // alphabet.size, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, starts)
        return cls(alphabet, discount, grams, counts, contexts, totals, kinds)

    def interpolate(self, queries: Ints, lower: Floats) -> Floats:
        """P(last symbol | the ones before it) for each query, `lower` being that of the next shorter gram."""
        counts = _look_up(self.grams, self.counts, queries)
        contexts = queries // self.alphabet.size
        totals = _look_up(self.contexts, self.totals, contexts)
        kinds = _look_up(self.contexts, self.kinds, contexts)
        seen = totals > 0
        divisor = np.where(seen, totals, 1.0)
        own = np.maximum(counts - self.discount, 0.0) / divisor
        weight = np.where(seen, self.discount * kinds / divisor, 1.0)
        return own + weight * lower


def _look_up(keys: Ints, values: Ints, queries: Ints) -> Floats:
    """The value beside each query in sorted `keys`; 0 where it is missing."""
    index = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[index] == queries, values[index], 0).astype(np.float64)


def _grams(texts: Sequence[Ints], order: int, alphabet: Alphabet) -> Ints:
    """One gram for every symbol of every text, padded on the left with `begin`."""
    padding = np.full(order - 1, alphabet.begin, np.int64)
    stream = np.concatenate([piece for text in texts for piece in (padding, text)])
    grams = np.zeros(len(stream) - order + 1, np.int64)
    for offset in range(order):
        grams = grams * alphabet.size + stream[offset : offset + len(grams)]
    predicted: Ints = grams[stream[order - 1 :] != alphabet.begin]
    return predicted
