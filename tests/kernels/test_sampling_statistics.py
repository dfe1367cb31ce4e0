"""100,000 draws of every sampling mode follow the law that its parameters name: chi-square tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.kernels.batch.state import LIVE, ArenaLayout, BatchState
from penstock.kernels.dispatch import INTERPRETED
from penstock.kernels.sampling.reference import SamplingRows, sample
from penstock.kernels.sampling.tail import TailOutput, sample_step

DRAWS = 100_000
MODES = {
    "temperature": (0.7, 0, 1.0, 0.0),
    "top_k": (1.3, 13, 1.0, 0.0),
    "top_p": (0.9, 0, 0.8, 0.0),
    "min_p": (1.1, 0, 1.0, 0.2),
    "all of them": (1.5, 40, 0.9, 0.12),
}
"""Temperature, top-k, top-p, min-p."""


def law(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The distribution that a mode names, float64, by sorting and summing as its definition does."""
    probabilities = (logits.double() / temperature).softmax(0)
    order = probabilities.argsort(descending=True)
    ranked = probabilities[order]
    if top_k:
        ranked[top_k:] = 0
    ranked /= ranked.sum()
    ranked[ranked.cumsum(0) - ranked >= top_p] = 0
    ranked[ranked < min_p * ranked[0]] = 0
    kept = torch.zeros_like(probabilities)
    kept[order] = ranked / ranked.sum()
    return kept


def check(drawn: Tensor, probabilities: Tensor) -> None:
    """Nothing outside the support; chi-square at most six standard deviations above its mean."""
    counts = torch.bincount(drawn, minlength=probabilities.numel())
    assert int(counts.sum()) == DRAWS
    inside = probabilities > 0
    assert not counts[~inside].any()
    expected = probabilities[inside] * DRAWS
    assert float(expected.min()) >= 5  # what the test needs to be one
    freedom = int(inside.sum()) - 1
    chi_square = float(((counts[inside] - expected) ** 2 / expected).sum())
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.skipif(INTERPRETED, reason="there is no kernel in it, and once is enough")
@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[] if mode == "all of them" else pytest.mark.long) for mode in MODES]
)
def test_draws_of_the_reference(mode: str) -> None:
    temperature, top_k, top_p, min_p = MODES[mode]
    logits = torch.randn(61, generator=torch.Generator().manual_seed(1))
    rows = SamplingRows(
        temperature=torch.full((DRAWS,), temperature),
        top_k=torch.full((DRAWS,), top_k),
        top_p=torch.full((DRAWS,), top_p),
        seed=torch.arange(DRAWS) % 500,
        sample_index=torch.zeros(DRAWS, dtype=torch.int64),
        min_p=torch.full((DRAWS,), min_p),
    )
    check(sample(logits.expand(DRAWS, -1), rows, torch.arange(DRAWS) // 500), law(logits, *MODES[mode]))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocab", [61, 5003])
def test_draws_of_the_kernels(mode: str, vocab: int) -> None:
    """500 slots of different seeds, 200 steps each: as in serving, the state leads from one to the next."""
    temperature, top_k, top_p, min_p = MODES[mode]
    device, slots = torch.device("cuda"), 500
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * (1.0 if vocab < 100 else 0.15)
    state = BatchState.allocate(ArenaLayout(slots, 1, slots), device, scratch_block=0)
    out = TailOutput.allocate(slots, vocab, device)
    live = slice(0, slots)
    state.live[live] = LIVE
    state.max_tokens[live] = DRAWS
    state.temperature[live] = temperature
    state.top_k[live] = top_k
    state.top_p[live] = top_p
    state.min_p[live] = min_p
    state.seeds[live, 0] = torch.arange(slots, dtype=torch.int32, device=device)
    rows, names = logits.expand(slots, -1).cuda().contiguous(), torch.arange(slots, dtype=torch.int32, device=device)
    drawn = []
    for _ in range(DRAWS // slots):
        sample_step(rows, names, state, out, filtered=mode != "temperature")
        drawn.append(out.tokens.clone())
    check(torch.cat(drawn).long().cpu(), law(logits, *MODES[mode]))
