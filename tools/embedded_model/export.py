"""The model folder: weights and configuration in Hugging Face's layout."""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from embedded_model.llama import LlamaShape
from embedded_model.records import write_record

# Written by `tokenizer.save_tokenizer`: the special tokens have the first ids, in this order. Spelled out
# here because a machine that only trains need not have `tokenizers`.
BEGIN_ID, END_ID = 0, 1


def save_model(parameters: dict[str, Tensor], shape: LlamaShape, build: Path, out: Path) -> None:
    """Writes weights (bfloat16, head tied to the embedding), both configurations, and the tokenizer's files."""
    halves = {name: value.to(torch.bfloat16).contiguous() for name, value in sorted(parameters.items())}
    save_file(halves, out / "model.safetensors", metadata={"format": "pt"})
    write_record(out / "config.json", model_config(shape))
    write_record(out / "generation_config.json", {"bos_token_id": BEGIN_ID, "eos_token_id": END_ID})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(build / name, out / name)


def model_config(shape: LlamaShape) -> dict[str, object]:
    """`config.json` for `LlamaForCausalLM`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "rope_scaling": None,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": END_ID,
        "torch_dtype": "bfloat16",
    }
