"""Llama and Qwen3 against ``transformers``, through shuffled pages and mixed batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from penstock.executor.layers.attention import AttentionBatch, LayerCache
from penstock.executor.models.config import read_config
from penstock.executor.models.registry import Model, build_model
from penstock.executor.models.weights import load_weights
from penstock.kernels.attention.reference import Scratch
from support.tiny_llama import LLAMA3_SCALING, TINY_QWEN3, TinyLlama, build_tiny_llama

BASE = TinyLlama()
SHAPES = {
    "grouped heads, untied": BASE,
    "one key head, tied, odd sizes": replace(
        BASE,
        num_attention_heads=6,
        num_key_value_heads=1,
        head_dim=10,
        hidden_size=60,
        tie_word_embeddings=True,
    ),
    "all biases": replace(BASE, attention_bias=True, mlp_bias=True, num_key_value_heads=4),
    "llama3 rope, old keys": replace(BASE, rope_theta=500_000.0, rope_scaling=LLAMA3_SCALING),
    "llama3 rope, new keys": replace(BASE, rope_parameters={**LLAMA3_SCALING, "rope_theta": 500_000.0}),
    "linear rope": replace(BASE, rope_scaling={"type": "linear", "factor": 2.5}),
    "qwen3": TINY_QWEN3,
    "qwen3, untied, biases": replace(TINY_QWEN3, tie_word_embeddings=False, attention_bias=True, head_dim=16),
}
BLOCK_TOKENS = 16
BLOCKS = 60


def no_progress(done: int, total: int) -> None:
    """Progress is not looked at here."""


class Pages:
    """A model with its cache, driven by hand: each sequence is its ids and a table of shuffled pages."""

    def __init__(self, folder: Path, dtype: torch.dtype, sequences: int) -> None:
        self.config = read_config(folder)
        self.scratch = Scratch(dtype)
        self.model: Model = build_model(self.config, dtype, torch.device("cpu"))
        load_weights(self.model, folder, no_progress)
        shape = (BLOCKS, BLOCK_TOKENS, self.config.kv_heads, self.config.head_dim)
        self.caches = [
            LayerCache(torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype))
            for _ in range(self.config.layers)
        ]
        pages = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(9)).int()
        self.tables = pages[: BLOCKS // sequences * sequences].view(sequences, -1)
        self.computed = [0] * sequences

    def step(self, rows: dict[int, list[int]]) -> dict[int, Tensor]:
        """Compute these ids of these sequences; the logits of each one's last row."""
        lengths = torch.tensor([len(tokens) for tokens in rows.values()])
        logits = self.logits(rows, lengths.cumsum(0) - 1)
        return dict(zip(rows, logits, strict=True))

    def logits(self, rows: dict[int, list[int]], chosen: Tensor | None) -> Tensor:
        """Compute these ids of these sequences; the logits of the chosen rows, of all rows if that is None."""
        ids = [token for tokens in rows.values() for token in tokens]
        positions = [self.computed[s] + i for s, tokens in rows.items() for i in range(len(tokens))]
        start = torch.tensor([0, *(len(tokens) for tokens in rows.values())]).cumsum(0)
        for sequence, tokens in rows.items():
            self.computed[sequence] += len(tokens)
        contexts = torch.tensor([self.computed[sequence] for sequence in rows], dtype=torch.int32)
        batch = AttentionBatch.build(
            torch.tensor(positions),
            start.int(),
            contexts,
            self.tables[list(rows)],
            block_tokens=BLOCK_TOKENS,
            scratch=self.scratch,
        )
        with torch.inference_mode():
            return self.model.logits(self.model.forward(torch.tensor(ids), batch, self.caches, chosen))


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    lengths = (5, 47, 16, 90, 1)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def run_mixed(pages: Pages, asked: list[list[int]], steps: int) -> tuple[list[list[int]], list[list[Tensor]]]:
    """Greedy decoding with chunks of at most 11 prompt tokens, sequences joining one step after another."""
    known = [list(prompt) for prompt in asked]
    logits: list[list[Tensor]] = [[] for _ in asked]
    number = 0
    while any(len(seen) < steps for seen in logits):
        active = [s for s in range(len(asked)) if s <= number and len(logits[s]) < steps]
        rows = {s: known[s][pages.computed[s] :][:11] for s in active}
        for sequence, row in pages.step(rows).items():
            if pages.computed[sequence] == len(known[sequence]):
                logits[sequence].append(row)
                known[sequence].append(int(row.argmax()))
        number += 1
    return known, logits


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    folder = build_tiny_llama(tmp_path, seed=11, shape=shape, shards=1 + len(name) % 3)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked, steps = prompts(shape.vocab_size), 20
    known, logits = run_mixed(Pages(folder, torch.float32, len(asked)), asked, steps)
    for sequence, prompt in enumerate(asked):
        ids = torch.tensor([known[sequence][:-1]])
        with torch.inference_mode():
            expected = reference(ids).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.stack(logits[sequence]), expected, atol=1e-4, rtol=0)
        assert known[sequence][len(prompt) :] == expected.argmax(-1).tolist()


@pytest.mark.parametrize("base", [BASE, TINY_QWEN3], ids=["llama", "qwen3"])
def test_bfloat16_is_close_to_transformers_in_float32(base: TinyLlama, tmp_path: Path) -> None:
    """16-bit weights are the same numbers in both; what differs is the rounding of activations."""
    shape = replace(base, dtype="bfloat16")
    folder = build_tiny_llama(tmp_path, seed=3, shape=shape)
    assert read_config(folder).dtype == "bfloat16"
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pages = Pages(folder, torch.bfloat16, 5)
    asked = prompts(shape.vocab_size)
    got = pages.step(dict(enumerate(asked)))
    for sequence, prompt in enumerate(asked):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0, -1]
        assert got[sequence].dtype == torch.bfloat16
        error = (got[sequence].float() - expected).abs().max() / expected.std()
        assert error < 0.1


def test_the_norms_of_heads_matter(tmp_path: Path) -> None:
    """The comparison has teeth: with the weights of the two norms exchanged it would fail."""
    folder = build_tiny_llama(tmp_path, seed=11, shape=TINY_QWEN3)
    pages = Pages(folder, torch.float32, 2)
    expected = pages.step({0: prompts(BASE.vocab_size)[1]})[0]
    destinations = pages.model.destinations()
    query, key = (destinations[f"model.layers.1.self_attn.{part}_norm.weight"] for part in "qk")
    exchanged = query.clone(), key.clone()
    key.copy_(exchanged[0])
    query.copy_(exchanged[1])
    got = pages.step({1: prompts(BASE.vocab_size)[1]})[1]
    assert (got - expected).abs().max() > 1e-2


@pytest.mark.parametrize("base", [BASE, TINY_QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_chosen_rows_are_those_of_all_rows(base: TinyLlama, dtype: torch.dtype, tmp_path: Path) -> None:
    """In any order; and rows that are not chosen have left their keys and values in the cache."""
    folder = build_tiny_llama(tmp_path, seed=11, shape=base)
    asked = dict(enumerate(prompts(base.vocab_size)))
    every = Pages(folder, torch.float32, 5)
    some, none = Pages(folder, torch.float32, 5), Pages(folder, torch.float32, 5)
    chosen = torch.tensor([40, 3, 158, 0], dtype=dtype)
    expected = every.logits(asked, None)
    torch.testing.assert_close(some.logits(asked, chosen), expected[chosen], atol=1e-5, rtol=0)
    assert none.logits(asked, chosen[:0]).shape == (0, base.vocab_size)
    following = {sequence: [9] for sequence in asked}
    expected = every.logits(following, None)
    for pages in (some, none):
        torch.testing.assert_close(pages.logits(following, None), expected, atol=1e-5, rtol=0)


def test_logits_go_where_they_are_told(tmp_path: Path) -> None:
    model = Pages(build_tiny_llama(tmp_path), torch.float32, 1).model
    hidden = torch.randn(3, BASE.hidden_size)
    out = torch.full((4, BASE.vocab_size), float("nan"))
    with torch.inference_mode():
        assert model.logits(hidden, out=out[:3]).data_ptr() == out.data_ptr()
        torch.testing.assert_close(out[:3], model.logits(hidden), atol=1e-5, rtol=0)
    assert out[3].isnan().all()


def test_a_wrong_page_is_noticed(tmp_path: Path) -> None:
    """The comparison has teeth: two sequences with exchanged tables no longer agree with transformers."""
    folder = build_tiny_llama(tmp_path, seed=11)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pages = Pages(folder, torch.float32, 2)
    first, second = prompts(BASE.vocab_size)[1:3]
    pages.step({0: first, 1: second[:16]})
    pages.step({1: second + first[:20]})
    pages.tables = pages.tables.flip(0)
    got = pages.step({0: [7]})
    with torch.inference_mode():
        expected = reference(torch.tensor([[*first, 7]])).logits[0, -1]
    assert (got[0] - expected).abs().max() > 1e-2
