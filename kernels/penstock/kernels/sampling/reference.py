"""Choosing tokens in plain torch: temperature, top-k, top-p, min-p, and a choice by the Gumbel-max trick.

``argmax(logits + temperature · g)`` with Gumbel noise ``g`` is a draw from ``softmax(logits / temperature)``
(Gumbel 1954; Maddison et al. 2014): no normalisation, no cumulative sum, no sort. The temperature multiplies the noise
rather than dividing the logits, so that none is too small: 0 is the greedy choice.

The choice has two levels: first a tile of 512 entries, by its weight ``temperature · log Σ exp(logit / temperature)``,
then an entry of that tile. That is the same law, P(tile) · P(entry | tile), and takes noise for some hundred tiles and
512 entries instead of the whole vocabulary; the logits are read once, without any noise.

What a row yields depends on its own logits, parameters, seed, sample index and position, and on nothing else:
the noise of member ``m`` of a level (a tile: 1, an entry of the vocabulary: 0) is lane ``m % 4`` of Philox4x32-10 with

    counter = (m // 4, position, sample index, level)        key = (low, high word of the 64-bit seed)

so a sequence that is preempted, moved or decoded in other company draws the same noise again.

The filters come in the order of ``transformers``: temperature, top-k, top-p of what top-k left, min-p. (vLLM applies
min-p before top-k and top-p; the two differ only in the mass of which top-p takes its share.) Each keeps the logits at
or above a floor, so ties with the last one kept stay. Top-p sums *masses*: probabilities relative to the best one as
40-bit integers. Integers add up to the same sum in any order, on any device, in any company.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from penstock.kernels.sampling.philox import Counter, philox_4x32, uniform, words

LANES = 4
TILE: Final = 512
"""Vocabulary entries that are drawn from together: a part of what a seed means."""
ENTRY_LEVEL: Final = 0
TILE_LEVEL: Final = 1
NUCLEUS_CANDIDATES = 256
"""Top-p looks at this many best tokens first, and sorts the whole row only if they do not hold the mass."""

UNIT_MASS = 2.0**40
"""The mass of the best token: a row of 2^22 such tokens fits int64."""
LOG2_E = math.log2(math.e)
STEEPEST = 2e38
"""Bound of 1 / temperature: finite, so that the best token's exponent is 0 and not NaN."""


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Parameters of the rows of one batch, each a tensor [rows].

    A seed is 64 unsigned bits held in int64. A temperature of 0 asks for the best token. ``top_k`` 0, ``top_p`` 1 and
    ``min_p`` 0 leave everything in.
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
    min_p: Tensor | None = None
    """float32, in [0, 1]; None: 0 for all"""

    def take(self, rows: Tensor) -> SamplingRows:
        """Those rows: int64 indexes or a bool mask."""
        return SamplingRows(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            seed=self.seed[rows],
            sample_index=self.sample_index[rows],
            min_p=None if self.min_p is None else self.min_p[rows],
        )


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


def gumbel_noise(rows: SamplingRows, positions: Tensor, quads: Tensor, level: int) -> Tensor:
    """Standard Gumbel noise float32 [rows, 4 · quads]: for four members of the level after ``4 · quads`` each.

    ``positions`` int64 [rows]; ``quads`` int64 [quads] or [rows, quads].
    """
    low, high = words(rows.seed[:, None])
    counter: Counter = (quads, positions[:, None], rows.sample_index[:, None], torch.full_like(quads, level))
    noise = torch.stack(philox_4x32(counter, (low, high)), dim=-1).flatten(1)
    # -log(u) of a uniform u is exponential; log1p(-u) has the same law and keeps the digits where they
    # matter.
    return -torch.log(-torch.log1p(-uniform(noise)))


def tile_weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """``temperature · log Σ exp(logit / temperature)`` of each tile, float32 [rows, tiles]; -inf where all logits are.

    ``logits`` [rows, tiles · TILE]; ``temperature`` float32 [rows], > 0.
    """
    tiled = logits.reshape(len(logits), -1, TILE)
    best = tiled.amax(dim=-1)
    shifted = tiled - torch.where(best == float("-inf"), 0.0, best)[..., None]
    total = torch.exp2(shifted * _steepness(temperature)[:, None, None]).sum(dim=-1)
    return best + temperature[:, None] * total.log()


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """``logits`` with everything below the k-th largest of its row at -inf; ties with the k-th stay."""
    limited = (top_k > 0) & (top_k < logits.shape[1])
    if not limited.any():
        return logits
    best = logits.topk(int(top_k[limited].max()), dim=-1).values
    floor = best.gather(1, torch.where(limited, top_k - 1, 0)[:, None])
    return logits.masked_fill((logits < floor) & limited[:, None], float("-inf"))


def keep_top_p(logits: Tensor, top_p: Tensor, temperature: Tensor | None = None) -> Tensor:
    """``logits`` with all at -inf but the fewest best tokens whose probabilities reach ``top_p``; ties stay.

    The best token always stays (Holtzman et al. 2020). ``temperature`` float32 [rows], > 0; None: 1.
    """
    limited = (top_p < 1).nonzero().squeeze(1)
    if not limited.numel():
        return logits
    chosen = logits[limited]
    warmth = torch.ones_like(top_p) if temperature is None else temperature
    outside = chosen < _nucleus_floor(chosen, top_p[limited], warmth[limited])
    return logits.index_copy(0, limited, chosen.masked_fill(outside, float("-inf")))


def keep_min_p(logits: Tensor, min_p: Tensor, temperature: Tensor | None = None) -> Tensor:
    """``logits`` with all at -inf whose probabilities are below ``min_p`` times the best one (Nguyen et al. 2024).

    ``temperature`` float32 [rows], > 0; None: 1.
    """
    warmth = torch.ones_like(min_p) if temperature is None else temperature
    best = logits.max(dim=-1).values
    floor = torch.where(min_p > 0, torch.minimum(best + warmth * min_p.log(), best), float("-inf"))
    return logits.masked_fill(logits < floor[:, None], float("-inf"))


def masses(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities relative to the best token's, int64 in [0, UNIT_MASS], of ``logits`` [rows, entries].

    ``best`` and ``temperature`` float32 [rows].
    """
    return (torch.exp2((logits - best[:, None]) * _steepness(temperature)[:, None]) * UNIT_MASS).long()


def _steepness(temperature: Tensor) -> Tensor:
    """The factor of logits in powers of two."""
    return torch.clamp(1.0 / temperature, max=STEEPEST) * LOG2_E


def _draw(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    kept = keep_top_p(keep_top_k(logits, rows.top_k), rows.top_p, rows.temperature)
    if rows.min_p is not None:
        kept = keep_min_p(kept, rows.min_p, rows.temperature)
    padded = pad(kept, (0, -logits.shape[1] % TILE), value=float("-inf"))
    warmth = rows.temperature[:, None]
    weights = tile_weights(padded, rows.temperature)
    lanes = torch.arange(TILE, device=logits.device)
    quads = torch.arange(-(-weights.shape[1] // LANES), device=logits.device)
    noise = gumbel_noise(rows, positions, quads, TILE_LEVEL)[:, : weights.shape[1]]
    tile = (weights + warmth * noise).argmax(dim=-1, keepdim=True)
    entries = tile * TILE + lanes
    noise = gumbel_noise(rows, positions, tile * (TILE // LANES) + lanes[: TILE // LANES], ENTRY_LEVEL)
    chosen = (padded.gather(1, entries) + warmth * noise).argmax(dim=-1)
    return tile.squeeze(1) * TILE + chosen


def _nucleus_floor(logits: Tensor, top_p: Tensor, temperature: Tensor) -> Tensor:
    """The smallest logit [rows, 1] inside the nucleus of each row."""
    best = logits.max(dim=-1).values
    total = masses(logits, best, temperature).sum(dim=-1)
    wanted = (top_p.double() * total.double()).long().clamp(min=1)
    candidates = logits.topk(min(NUCLEUS_CANDIDATES, logits.shape[1]), dim=-1).values
    reached = masses(candidates, best, temperature).cumsum(dim=-1)
    floor = _reaching(candidates, reached, wanted)
    short = (reached[:, -1] < wanted).nonzero().squeeze(1)
    if short.numel():
        ordered = logits[short].sort(dim=-1, descending=True).values
        reached = masses(ordered, best[short], temperature[short]).cumsum(dim=-1)
        floor[short] = _reaching(ordered, reached, wanted[short])
    return floor


def _reaching(ordered: Tensor, reached: Tensor, wanted: Tensor) -> Tensor:
    """Of logits in falling order and the masses up to each, the logit [rows, 1] at which ``wanted`` is reached."""
    before = (reached < wanted[:, None]).sum(dim=-1).clamp(max=ordered.shape[1] - 1)
    return ordered.gather(1, before[:, None])
