"""Every family against ``transformers``, through shuffled pages and mixed batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from penstock.executor.layers.attention import AttentionBatch, LayerCache
from penstock.executor.models.config import read_config
from penstock.executor.models.llama import Llama
from penstock.executor.models.registry import Model, build_model
from penstock.executor.models.weights import load_weights
from penstock.kernels.attention.reference import Scratch
from support.tiny_llama import LLAMA3_SCALING, TINY_MISTRAL, TINY_QWEN2, TINY_QWEN3, TinyLlama, build_tiny_llama

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
    "qwen2": TINY_QWEN2,
    "qwen2, untied, keys without meaning": replace(
        TINY_QWEN2,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        num_key_value_heads=1,
        use_sliding_window=False,
        sliding_window=7,
        max_window_layers=1,
    ),
    "mistral": TINY_MISTRAL,
    "mistral, tied, keys without meaning": replace(
        TINY_MISTRAL,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        num_key_value_heads=4,
        head_dim=16,
        use_sliding_window=False,
    ),
}
FAMILIES = [BASE, TINY_MISTRAL, TINY_QWEN2, TINY_QWEN3]
WINDOW = 24
WINDOWED = {
    "mistral": replace(TINY_MISTRAL, sliding_window=WINDOW),
    "qwen2, upper layer": replace(TINY_QWEN2, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen2, all layers": replace(TINY_QWEN2, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=0),
    "qwen3, by layer": replace(
        TINY_QWEN3,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
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


@pytest.mark.parametrize("base", FAMILIES, ids=lambda shape: shape.model_type)
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


@pytest.mark.parametrize("name", WINDOWED)
def test_a_sequence_as_long_as_the_window_is_the_longest_that_equals_transformers(name: str, tmp_path: Path) -> None:
    """Which is what is served: with a token more the windowed layers of transformers no longer see the first one."""
    folder = build_tiny_llama(tmp_path, seed=11, shape=WINDOWED[name])
    pages = Pages(folder, torch.float32, 1)
    assert (pages.config.max_positions, pages.config.window) == (WINDOW, WINDOW)
    ids = prompts(BASE.vocab_size)[3][: WINDOW + 1]
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    got = torch.cat([pages.logits({0: part}, None) for part in (ids[:10], ids[10:20], ids[20:WINDOW])])
    torch.testing.assert_close(got, expected[:WINDOW], atol=1e-4, rtol=0)
    beyond = pages.step({0: ids[WINDOW:]})[0]
    assert (beyond - expected[WINDOW]).abs().max() > 1e-2


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


@pytest.mark.parametrize(
    ("shape", "absorbed"),
    [
        *((shape, True) for shape in FAMILIES),
        (replace(BASE, attention_bias=True), False),
        (replace(TINY_QWEN3, attention_bias=True), False),
        (replace(BASE, mlp_bias=True), False),
    ],
)
def test_biases_of_queries_keys_and_values_are_no_hindrance_to_absorbing(
    shape: TinyLlama, absorbed: bool, tmp_path: Path
) -> None:
    """Those of products that add to the residual stream are, and those of gate and up."""
    model = Pages(build_tiny_llama(tmp_path, shape=shape), torch.float32, 1).model
    assert isinstance(model, Llama)
    norms = [norm for layer in model.layers for norm in (layer.attention_norm, layer.feed_forward_norm)]
    before = [norm.weight.clone() for norm in norms]
    with torch.inference_mode():
        model.absorb_norms()
    assert [layer.absorbed for layer in model.layers] == [absorbed] * len(model.layers)
    for norm, weight in zip(norms, before, strict=True):
        assert torch.equal(norm.weight, torch.ones_like(weight) if absorbed else weight)


@pytest.mark.parametrize("base", FAMILIES, ids=lambda shape: shape.model_type)
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
