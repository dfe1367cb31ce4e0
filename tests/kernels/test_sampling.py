"""The sampling tail: what each filter keeps, what law the draws follow, and what a row may depend on."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from penstock.kernels.sampling.reference import (
    ENTRY_LEVEL,
    TILE,
    TILE_LEVEL,
    SamplingRows,
    gumbel_noise,
    keep_top_k,
    keep_top_p,
    sample,
    tile_weights,
)

INF = float("inf")


def rows(
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 7,
    sample_index: int = 0,
) -> SamplingRows:
    """Equal rows."""
    return SamplingRows(
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p),
        seed=torch.full((count,), seed),
        sample_index=torch.full((count,), sample_index),
    )


def chi_square(drawn: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * drawn.numel()
    counts = torch.bincount(drawn, minlength=probabilities.numel())
    return float(((counts - expected) ** 2 / expected).sum())


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.zeros(3, 5003)
    logits[0, [17, 4099, 5002]] = 2.0
    logits[1, 5002] = 1.0
    assert sample(logits, rows(3, temperature=0.0), torch.arange(3)).tolist() == [17, 5002, 0]


@pytest.mark.parametrize("vocabulary", [5, 63, 1000, 2500])
def test_draws_follow_the_softmax(vocabulary: int) -> None:
    """Chi-square over 20,000 positions of one seed; the bound is six standard deviations above the mean."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 0.7
    draws, temperature = 20_000, 1.3
    drawn = sample(logits.expand(draws, -1), rows(draws, temperature=temperature), torch.arange(draws))
    freedom = vocabulary - 1
    assert chi_square(drawn, (logits / temperature).softmax(0)) < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("axis", ["seed", "sample_index"])
def test_seeds_and_samples_are_independent_streams(axis: str) -> None:
    """The same position under 20,000 seeds (or sample indexes) follows the same law."""
    logits = torch.tensor([0.5, 0.0, -1.0, 1.0, 0.2])
    draws = 20_000
    parameters = replace(rows(draws), **{axis: torch.arange(draws)})
    drawn = sample(logits.expand(draws, -1), parameters, torch.full((draws,), 3))
    assert chi_square(drawn, logits.softmax(0)) < 4 + 6 * 8**0.5


def test_tiles_weigh_the_logarithms_of_their_sums() -> None:
    logits = torch.randn(3, 2 * TILE, generator=torch.Generator().manual_seed(4)) * 5
    logits[1, TILE:] = -INF
    warmth = torch.tensor([0.3, 1.0, 4.0])
    tiles = logits.double().view(3, 2, TILE)
    expected = warmth[:, None].double() * torch.logsumexp(tiles / warmth[:, None, None].double(), dim=-1)
    torch.testing.assert_close(tile_weights(logits, warmth).double(), expected, rtol=1e-6, atol=1e-6)


def test_noise_is_distinct_across_every_coordinate() -> None:
    positions, quads = torch.arange(50), torch.arange(250)
    noise = gumbel_noise(rows(50), positions, quads, ENTRY_LEVEL)
    assert noise.shape == (50, 1000)
    assert torch.isfinite(noise).all()
    assert torch.unique(noise).numel() > 0.99 * noise.numel()
    others = [
        (rows(50, seed=7 + 2**40), 0, ENTRY_LEVEL),
        (rows(50, sample_index=1), 0, ENTRY_LEVEL),
        (rows(50), 50, ENTRY_LEVEL),
        (rows(50), 0, TILE_LEVEL),
    ]
    for other, offset, level in others:
        assert not (noise == gumbel_noise(other, positions + offset, quads, level)).any(dim=1).all()


def test_noise_of_a_member_is_that_of_its_quad() -> None:
    positions, wide = torch.arange(3), torch.arange(250)
    each = torch.stack((wide[:8], wide[8:16], wide[16:24]))
    noise = gumbel_noise(rows(3), positions, wide, ENTRY_LEVEL)
    some = gumbel_noise(rows(3), positions, each, ENTRY_LEVEL)
    assert torch.equal(some, torch.stack([noise[row, 32 * row : 32 * row + 32] for row in range(3)]))


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    generator = torch.Generator().manual_seed(5)
    count, vocabulary = 40, 1003
    logits = torch.randn(count, vocabulary, generator=generator) * 2
    parameters = SamplingRows(
        temperature=torch.rand(count, generator=generator) * torch.tensor([0.0, 1.0, 2.0, 1.0]).repeat(10),
        top_k=torch.randint(0, 60, (count,), generator=generator) * torch.tensor([0, 1]).repeat(20),
        top_p=torch.where(torch.arange(count) % 3 > 0, torch.rand(count, generator=generator) + 1e-3, 1.0).clamp(max=1),
        seed=torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        sample_index=torch.randint(0, 9, (count,), generator=generator),
    )
    positions = torch.randint(0, 2**20, (count,), generator=generator)
    together = sample(logits, parameters, positions)
    singles = torch.split(torch.arange(count), 1)
    alone = [sample(logits[i], parameters.take(i), positions[i]).item() for i in singles]
    assert together.tolist() == alone
    order = torch.randperm(count, generator=generator)
    assert sample(logits[order], parameters.take(order), positions[order]).tolist() == together[order].tolist()


def test_the_logits_are_left_alone() -> None:
    logits = torch.randn(4, 33, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    sample(logits, rows(4, top_k=3, top_p=0.5), torch.arange(4))
    assert torch.equal(logits, before)


def test_top_k_keeps_ties_and_leaves_unlimited_rows() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    kept = keep_top_k(logits, torch.tensor([2, 0, 1]))
    assert kept.tolist() == [[-INF, 3.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0], [-INF, -INF, -INF, 4.0]]


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().repeat(5, 1)
    kept = keep_top_p(logits, torch.tensor([0.49, 0.51, 0.8, 1.0, 1e-9]))
    assert torch.isfinite(kept).tolist() == [
        [False, True, False, False],
        [False, True, False, True],
        [False, True, True, True],
        [True, True, True, True],
        [False, True, False, False],
    ]


def test_top_p_of_a_flat_row_sorts_all_of_it() -> None:
    """3,000 nearly equal tokens: far more than the candidates looked at first."""
    logits = torch.linspace(0.0, 1e-2, 3000)[None]
    kept = torch.isfinite(keep_top_p(logits, torch.tensor([0.5])))[0]
    assert abs(int(kept.sum()) - 1500) < 10
    assert bool(kept[-1490:].all())


def test_draws_stay_inside_the_filters_and_follow_the_law_inside() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    drawn = sample(logits.expand(20_000, -1), rows(20_000, top_k=3, top_p=0.6), torch.arange(20_000))
    assert set(drawn.tolist()) == {0, 1}
    assert chi_square(drawn, torch.tensor([4 / 7, 3 / 7])) < 1 + 6 * 2**0.5


def test_masked_tokens_are_never_drawn_and_tiny_temperatures_are_greedy() -> None:
    logits = torch.randn(2000, 64, generator=torch.Generator().manual_seed(3))
    logits[:, ::2] = -INF
    positions = torch.arange(2000)
    assert bool((sample(logits, rows(2000, temperature=5.0), positions) % 2 == 1).all())
    assert torch.equal(sample(logits, rows(2000, temperature=1e-37), positions), logits.argmax(-1))
