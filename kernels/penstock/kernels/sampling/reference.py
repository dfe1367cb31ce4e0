"""The sampling tail in plain torch: temperature, top-k, top-p, and a choice by the Gumbel-max trick.

What a row yields depends on its own logits, parameters, seed, sample index and position, and on nothing else:
the noise of vocabulary entry ``v`` is lane ``v % 4`` of Philox4x32-10 with

    counter = (v // 4, position, sample index, 0)        key = (low, high word of the 64-bit seed)

so a sequence that is preempted, moved or decoded in other company draws the same noise again.

``argmax(logits / temperature + g)`` with Gumbel noise ``g`` is a draw from ``softmax(logits / temperature)``
(Gumbel 1954; Maddison et al. 2014): no normalisation, no cumulative sum, no sort.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from penstock.kernels.sampling.philox import Counter, philox_4x32, uniform, words

LANES = 4
NUCLEUS_CANDIDATES = 256
"""Top-p looks at this many best tokens first, and sorts the whole row only if they do not hold the mass."""


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Parameters of the rows of one batch, each a tensor [rows].

    A seed is 64 unsigned bits held in int64. A temperature of 0 asks for the best token. ``top_k`` 0 and
    ``top_p`` 1 leave everything in.
    """

    temperature: Tensor
    """float32, ≥ 0"""
    top_k: Tensor
    """int64, ≥ 0"""
    top_p: Tensor
    """float32, in (0, 1]"""
    seed: Tensor
    """int64"""
    sample_index: Tensor
    """int64, in [0, 2^32)"""

    def take(self, rows: Tensor) -> SamplingRows:
        """Those rows: int64 indexes or a bool mask."""
        return SamplingRows(*(getattr(self, field.name)[rows] for field in fields(self)))


def sample(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """One token id, int64 [rows], for each row of ``logits`` float32 [rows, vocabulary], left as they are.

    ``positions`` int64 [rows], in [0, 2^32): where the token to be sampled will stand in its sequence.
    Among equal logits a greedy row takes the lowest id. Entries of -inf are never taken unless a row has no
    other.
    """
    chosen = logits.argmax(dim=-1)
    drawn = (rows.temperature > 0).nonzero().squeeze(1)
    if drawn.numel():
        chosen[drawn] = _draw(logits[drawn], rows.take(drawn), positions[drawn])
    return chosen


def gumbel_noise(rows: SamplingRows, positions: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise float32 [rows, vocabulary]."""
    lanes = torch.arange(-(-vocabulary // LANES), device=rows.seed.device)
    low, high = words(rows.seed[:, None])
    counter: Counter = (lanes, positions[:, None], rows.sample_index[:, None], torch.zeros_like(lanes))
    noise = torch.stack(philox_4x32(counter, (low, high)), dim=-1).flatten(1)[:, :vocabulary]
    # -log(u) of a uniform u is exponential; log1p(-u) has the same law and keeps the digits where they
    # matter.
    return -torch.log(-torch.log1p(-uniform(noise)))


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """``logits`` with everything below the k-th largest of its row at -inf; ties with the k-th stay."""
    limited = (top_k > 0) & (top_k < logits.shape[1])
    if not limited.any():
        return logits
    best = logits.topk(int(top_k[limited].max()), dim=-1).values
    floor = best.gather(1, torch.where(limited, top_k - 1, 0)[:, None])
    return logits.masked_fill((logits < floor) & limited[:, None], float("-inf"))


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """``logits`` with all at -inf but the fewest best tokens whose probabilities reach ``top_p``; ties stay.

    The best token always stays (Holtzman et al. 2020).
    """
    limited = (top_p < 1).nonzero().squeeze(1)
    if not limited.numel():
        return logits
    chosen = logits[limited]
    probabilities = chosen.softmax(dim=-1)
    outside = probabilities < _nucleus_floor(probabilities, top_p[limited])[:, None]
    return logits.index_copy(0, limited, chosen.masked_fill(outside, float("-inf")))


def _draw(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    best = logits.max(dim=-1, keepdim=True).values
    # Relative to the best, so that a tiny temperature overflows to -inf, never to +inf.
    scaled = (logits - best) / rows.temperature[:, None]
    kept = keep_top_p(keep_top_k(scaled, rows.top_k), rows.top_p)
    return (kept + gumbel_noise(rows, positions, logits.shape[1])).argmax(dim=-1)


def _nucleus_floor(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability inside the nucleus of each row."""
    candidates = min(NUCLEUS_CANDIDATES, probabilities.shape[1])
    best = probabilities.topk(candidates, dim=-1).values
    floor = _reaching(best, top_p)
    short = (best.sum(dim=-1) < top_p).nonzero().squeeze(1)
    if short.numel():
        floor[short] = _reaching(probabilities[short].sort(dim=-1, descending=True).values, top_p[short])
    return floor


def _reaching(best: Tensor, top_p: Tensor) -> Tensor:
    """Of probabilities in falling order, the one at which each row's sum reaches ``top_p``, or the last."""
    before = best.cumsum(dim=-1) - best
    inside = (before < top_p[:, None]).sum(dim=-1).clamp(min=1)
    return best.gather(1, (inside - 1)[:, None]).squeeze(1)
