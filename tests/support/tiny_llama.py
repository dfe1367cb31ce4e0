"""Random tiny checkpoints of every family, made from a seed: small enough for tests, complete enough to be served."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

LLAMA3_SCALING: dict[str, object] = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""By model_type."""


@dataclass(frozen=True, slots=True)
class TinyLlama:
    """The shape of a tiny model. The defaults have 4 query heads on 2 key heads and an untied head."""

    model_type: str = "llama"
    """Or "mistral"; "qwen2": queries, keys and values have biases; "qwen3": each query and key head has a norm."""
    vocab_size: int = 320
    hidden_size: int = 64
    intermediate_size: int = 96
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Qwen2 and Mistral pay no attention to it."""
    mlp_bias: bool = False
    """Llama alone pays attention to it."""
    eos_token_id: int | None = 2
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, object] | None = None
    rope_parameters: dict[str, object] | None = None
    use_sliding_window: bool | None = None
    sliding_window: int | None = None
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    dtype: str = "float32"

    def config(self) -> dict[str, object]:
        """``config.json``; what is None is not in it."""
        shape = {key: value for key, value in asdict(self).items() if value is not None or key == "eos_token_id"}
        return {
            "architectures": [FAMILIES[self.model_type]],
            "hidden_act": "silu",
            "bos_token_id": 1,
            **shape,
        }


TINY_QWEN3 = TinyLlama(model_type="qwen3", head_dim=24, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True)
"""Heads larger than their share of the hidden size, and a tied head, as the small models of the family have."""
TINY_QWEN2 = TinyLlama(model_type="qwen2", rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True)
"""As the small models of the family: a tied head, and three biases a layer."""
TINY_MISTRAL = TinyLlama(model_type="mistral", head_dim=24, rope_theta=1e6)
"""Heads that are not their share of the hidden size, as in Nemo."""


def random_weights(shape: TinyLlama, seed: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint; large enough weights that greedy choices are far apart."""
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, shape.dtype)

    def random(*size: int, scale: float) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> dict[str, Tensor]:
        found = {f"{name}.weight": random(outputs, inputs, scale=1.5 / inputs**0.5)}
        return found | ({f"{name}.bias": random(outputs, scale=0.3)} if bias else {})

    def norm(name: str, size: int = shape.hidden_size, scale: float = 0.1) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + random(size, scale=scale)}

    hidden, inner = shape.hidden_size, shape.intermediate_size
    output_bias = shape.attention_bias and shape.model_type in ("llama", "qwen3")
    qkv_bias = output_bias or shape.model_type == "qwen2"
    mlp_bias = shape.mlp_bias and shape.model_type == "llama"
    queries, shared = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    found = {"model.embed_tokens.weight": random(shape.vocab_size, hidden, scale=1.0)}
    for number in range(shape.num_hidden_layers):
        layer = f"model.layers.{number}"
        for part, outputs in (("q", queries), ("k", shared), ("v", shared)):
            found |= linear(f"{layer}.self_attn.{part}_proj", outputs, hidden, qkv_bias)
        found |= linear(f"{layer}.self_attn.o_proj", hidden, queries, output_bias)
        if shape.model_type == "qwen3":
            found |= norm(f"{layer}.self_attn.q_norm", shape.head_dim, 0.5)
            found |= norm(f"{layer}.self_attn.k_norm", shape.head_dim, 0.5)
        found |= linear(f"{layer}.mlp.gate_proj", inner, hidden, mlp_bias)
        found |= linear(f"{layer}.mlp.up_proj", inner, hidden, mlp_bias)
        found |= linear(f"{layer}.mlp.down_proj", hidden, inner, mlp_bias)
        found |= norm(f"{layer}.input_layernorm") | norm(f"{layer}.post_attention_layernorm")
    found |= norm("model.norm")
    if not shape.tie_word_embeddings:
        found["lm_head.weight"] = random(shape.vocab_size, hidden, scale=1.5 / hidden**0.5)
    return found


def build_tiny_llama(
    folder: Path, *, seed: int = 0, shape: TinyLlama | None = None, shards: int = 1, tokenizer: bool = False
) -> Path:
    """Write a checkpoint into ``folder`` (made if need be) and return it.

    ``shards`` > 1 writes that many files and their index; ``tokenizer`` adds ``tokenizer.json`` and
    ``tokenizer_config.json`` (byte-level: every text can be encoded, every id below 259 be decoded).
    """
    shape = shape or TinyLlama()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    save_weights(folder, random_weights(shape, seed), shards)
    if tokenizer:
        save_tokenizer(folder, shape.vocab_size)
    return folder


def save_weights(folder: Path, weights: dict[str, Tensor], shards: int = 1) -> None:
    """Write ``weights`` as one safetensors file, or as several with an index."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    shard_of: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer without merges: ids 0…2 are pad, bos, eos, 3…258 the bytes, then fillers."""
    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(ByteLevel.alphabet())
    fillers = [f"<filler{number}>" for number in range(vocab_size - len(special) - len(letters))]
    vocabulary = {token: number for number, token in enumerate([*special, *letters, *fillers])}
    tokenizer = Tokenizer(BPE(vocabulary, [], fuse_unk=False))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
