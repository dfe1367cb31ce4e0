"""Model folders without weights: the shapes of Qwen3-0.6B and Llama-3.1-8B, each with a tokenizer of its vocabulary.

Weights are drawn by whoever loads the folder (a "dummy" load format). The tokenizer is made here, without asking a hub:
id i is the word "ti" with a space before it. Text of random words therefore keeps its exact count of tokens, and ids
become text the way they do with a byte-level tokenizer.
``python bench/models.py FOLDER`` writes FOLDER/qwen3-0.6b and FOLDER/llama-3.1-8b.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_SPACE = "Ġ"
"""How a byte-level tokenizer writes a space (Radford et al., "Language Models are Unsupervised Multitask Learners")."""

_COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
    "max_window_layers": 28,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
    "use_sliding_window": False,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131_072,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}
CONFIGS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {"qwen3-0.6b": _COMMON | _QWEN, "llama-3.1-8b": _COMMON | _LLAMA}
)


def write(name: str, folder: Path) -> Path:
    """Write one of ``CONFIGS`` to folder/name, unless it is there; its path."""
    path = folder / name
    if not (path / "tokenizer_config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        config = CONFIGS[name]
        (path / "config.json").write_text(json.dumps(config, indent=1))
        _tokenizer(config["vocab_size"]).save(str(path / "tokenizer.json"), pretty=False)
        (path / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(config), indent=1))
    return path


def _word(token: int) -> str:
    return f"{_SPACE}t{token}"


def _tokenizer(vocab_size: int) -> Tokenizer:
    vocabulary = {_word(token): token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _word(config["bos_token_id"]),
        "eos_token": _word(config["eos_token_id"]),
        "unk_token": _word(0),
        "model_max_length": 131_072,
        "clean_up_tokenization_spaces": False,
    }


if __name__ == "__main__":
    for model in CONFIGS:
        print(write(model, Path(sys.argv[1])))
