"""The shipped model: what lies in its folder, that it is what the card says, and that it knows Python."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

from penstock.local import embedded

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = embedded.path()
LIMIT_BYTES = 8_000_000

# Written for this test: in no corpus. Chance would be 8 bits, the byte 5-gram of the card is near 2.
UNSEEN_SOURCE = '''\
"""Count how often each word occurs in some text files."""

import argparse
import collections
import sys


def count_words(lines):
    """Return a mapping of words to the number of their occurrences."""
    counts = collections.Counter()
    for line in lines:
        counts.update(word.lower() for word in line.split())
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help="the files to read")
    args = parser.parse_args()
    for name in args.files:
        try:
            with open(name, encoding="utf-8") as f:
                counts = count_words(f)
        except OSError as exc:
            print(f"cannot read {name}: {exc}", file=sys.stderr)
            return 1
        for word, number in counts.most_common(10):
            print(word, number)
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''
BITS_PER_BYTE_BOUND = 1.0


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return read("config.json")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((REPOSITORY / "bench/results/embedded_model.json").read_text(encoding="utf-8"))
    return loaded


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layers = range(config["num_hidden_layers"])
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in layers for name, shape in layer.items()}
    shapes["model.embed_tokens.weight"] = (config["vocab_size"], hidden)
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def test_folder_is_complete_and_small() -> None:
    names = {file.name for file in FOLDER.iterdir() if file.is_file()}
    assert names == {
        "README.md",
        "__init__.py",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (FOLDER / "model.safetensors").stat().st_size <= LIMIT_BYTES


def test_tensors_are_those_of_the_config(config: dict[str, Any]) -> None:
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_shapes(config)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_special_tokens_agree_in_every_file(config: dict[str, Any], tokenizer: Tokenizer) -> None:
    tokens = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    assert [tokenizer.token_to_id(token) for token in tokens] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    names = read("tokenizer_config.json")
    assert tokenizer.token_to_id(names["bos_token"]) == config["bos_token_id"]
    assert tokenizer.token_to_id(names["eos_token"]) == config["eos_token_id"]
    assert read("generation_config.json")["eos_token_id"] == config["eos_token_id"]
    assert names["model_max_length"] == config["max_position_embeddings"]


@pytest.mark.parametrize(
    "text",
    [
        UNSEEN_SOURCE,
        "\tif x:\r\n        y = 'ü — 漢字 🐍'  \n\n\n",
        "".join(map(chr, range(0x20, 0x250))),
        " leading and trailing ",
    ],
    ids=["source", "unicode", "alphabet", "spaces"],
)
def test_tokenizer_round_trips(tokenizer: Tokenizer, text: str) -> None:
    encoded = tokenizer.encode(text)
    assert encoded.ids[0] == 0
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_prompt_that_stops_after_a_line_break_is_cut_as_in_whole_text(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("def f(n):\n    return n\n").ids
    for prompt in ("def f(n):", "def f(n):\n", "def f(n):\n    "):
        ids = tokenizer.encode(prompt).ids
        assert whole[: len(ids)] == ids


def render(messages: list[dict[str, Any]]) -> str:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    names = read("tokenizer_config.json")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(names["chat_template"]).render(
        messages=messages,
        add_generation_prompt=messages[-1]["role"] == "user",
        bos_token=names["bos_token"],
        eos_token=names["eos_token"],
    )


def test_chat_template_writes_what_training_showed() -> None:
    conversation: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Add two numbers.\n"},
        {"role": "assistant", "content": "def add(a, b):\n    return a + b"},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "three?"}]},
    ]
    assert render(conversation) == (
        "<|begin|><|system|>Be brief.<|user|>Add two numbers.<|assistant|>def add(a, b):\n    return a + b<|end|>"
        "<|user|>And three?<|assistant|>"
    )
    with pytest.raises(TemplateError, match="not tool"):
        render([{"role": "tool", "content": "4"}])


@pytest.fixture
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))


@pytest.mark.usefixtures("_tools")
def test_training_text_of_a_dialogue_is_the_templates() -> None:
    from embedded_model.dialogues import Dialogue, Exchange
    from embedded_model.tokenizer import render as render_for_training

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Do nothing."},
        {"role": "assistant", "content": "def nothing():\n    pass"},
    ]
    exchange = Exchange("Do nothing.", "def nothing():\n    pass")
    assert render_for_training(Dialogue("Be brief.", (exchange,))) == render(messages)


@pytest.mark.usefixtures("_tools")
@pytest.mark.parametrize("context", [[0], [0, 1, 1], [3, 3, 2, 1], [2, 0, 2, 0, 2]])
def test_five_gram_baseline_is_a_distribution(context: list[int]) -> None:
    import numpy as np

    from embedded_model.ngram import Alphabet, Ints, kneser_ney_bits

    def symbols(values: list[int]) -> Ints:
        return np.asarray(values, np.int64)

    alphabet = Alphabet(size=6, begin=5)
    train = [symbols([0, 1, 1, 2, 3, 3, 0, 4]), symbols([1, 2, 3, 3, 0, 0, 1, 4]), symbols([3, 3, 0, 1, 1, 4])]

    def bits(values: list[int]) -> float:
        return kneser_ney_bits(train, [symbols(values)], 5, alphabet)

    total = sum(2 ** (bits(context) - bits([*context, symbol])) for symbol in range(5))
    assert total == pytest.approx(1.0, abs=1e-9)


def test_card_states_the_measured_figures(results: dict[str, Any]) -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \**([^|*]+?)\** \| \**([\d.]+)\** \|$", card, re.MULTILINE))
    ngrams = results["ngrams_bits_per_byte"]
    assert rows == {
        "unigram of bytes, add-one": f"{ngrams['byte_unigram']:.3f}",
        "5-gram of bytes, interpolated Kneser-Ney": f"{ngrams['byte_5gram']:.3f}",
        "unigram of this model's tokens, add-one": f"{ngrams['token_unigram']:.3f}",
        "5-gram of this model's tokens, interpolated Kneser-Ney": f"{ngrams['token_5gram']:.3f}",
        "this model": f"{results['evaluation']['bits_per_byte']:.3f}",
    }
    assert results["evaluation"]["bits_per_byte"] < min(ngrams.values())
    training = results["training"]
    for fact in (f"{training['steps']:,} steps", f"{training['minutes']:.1f} minutes", training["hardware"]):
        assert fact in card
    assert f"CPython {results['corpus']['python']}'s" in card
    assert f"{results['model']['parameters']:,} in bfloat16" in card


def test_results_are_of_the_shipped_weights(results: dict[str, Any], config: dict[str, Any]) -> None:
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert results["model"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert results["model"]["config"] == config
    assert results["model"]["parameters"] == sum(math.prod(shape) for shape in expected_shapes(config).values())


def test_model_predicts_unseen_python_and_ends_it(tokenizer: Tokenizer) -> None:
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    model.eval()
    ids = torch.tensor([tokenizer.encode(UNSEEN_SOURCE).ids])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0]
    nats = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
    assert float(nats) / math.log(2) / len(UNSEEN_SOURCE.encode()) < BITS_PER_BYTE_BOUND
    # After `sys.exit(main())` at the end of a script, the likeliest next token is the end.
    assert int(logits[-1].argmax()) == 1
