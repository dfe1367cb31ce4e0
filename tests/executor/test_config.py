"""``config.json`` in its spellings, and every fault as one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.executor.models.config import FAMILY_DEFAULTS, ModelConfig, RopeConfig, read_config
from penstock.executor.models.errors import CheckpointError
from penstock.executor.models.registry import FAMILIES
from support.tiny_llama import LLAMA3_SCALING, TINY_QWEN3, TinyLlama

LLAMA3 = RopeConfig(5e5, "llama3", 4.0, 1.0, 4.0, 64)


def read(folder: Path, **changes: object) -> ModelConfig:
    """A tiny model's configuration with these changes; None takes a key away."""
    config = TinyLlama().config() | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return read_config(folder)


def test_the_shape(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.heads, config.kv_heads, config.head_dim, config.layers) == (4, 2, 16, 2)
    assert config.eos_ids == (2,)
    assert config.rope == RopeConfig(10_000.0)
    assert config.dtype == "float32"


def test_what_is_derived(tmp_path: Path) -> None:
    absent = dict.fromkeys(("head_dim", "num_key_value_heads", "dtype", "rope_theta"))
    config = read(tmp_path, **absent, torch_dtype="float16")
    assert config.head_dim == 64 // 4
    assert config.kv_heads == 4
    assert config.dtype == "bfloat16"


def test_what_qwen3_leaves_out(tmp_path: Path) -> None:
    config = read(tmp_path, **TINY_QWEN3.config() | {"head_dim": None, "max_position_embeddings": None})
    assert (config.architecture, config.head_dim, config.max_positions) == ("Qwen3ForCausalLM", 128, 32_768)


def test_a_family_that_can_be_read_can_be_built() -> None:
    assert FAMILIES.keys() == FAMILY_DEFAULTS.keys()


@pytest.mark.parametrize("file", ["quantize_config.json", "hf_quant_config.json"])
def test_quantization_that_is_told_in_a_file_of_its_own(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{file}: quantized checkpoints are not supported"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}, LLAMA3),
        ({"rope_theta": None, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500_000}}, LLAMA3),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, RopeConfig(7.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(1e4, "linear", 2.0)),
        ({"rope_scaling": None}, RopeConfig(1e4)),
    ],
)
def test_rope_in_either_spelling(changes: dict[str, object], rope: RopeConfig, tmp_path: Path) -> None:
    assert read(tmp_path, **changes).rope == rope


def test_ends_of_sequence_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert read(tmp_path, eos_token_id=2).eos_ids == (2, 7, 9)
    assert read(tmp_path, eos_token_id=None).eos_ids == (7, 9)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "many"}, "vocab_size is 'many', must be of type int"),
        ({"hidden_size": True}, "hidden_size is True, must be of type int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, must be at least 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, must be positive and finite"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"eos_token_id": 320}, "eos_token_id 320 is outside the vocabulary of 320"),
        ({"eos_token_id": [1, "x"]}, "must be token ids"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized checkpoints (quantization_config) are"),
        ({"quantization_config": {}}, "quantized checkpoints (quantization_config) are"),
        ({"compression_config": {"format": "int-quantized"}}, "quantized checkpoints (compression_config) are"),
        ({"use_sliding_window": True}, "sliding windows (use_sliding_window) are not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "only 'full_attention'"),
        ({"architectures": ["GPT2LMHeadModel"], "hidden_size": None}, "architecture 'GPT2LMHeadModel' is not"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": "long"}, "rope_scaling is not a JSON object"),
        ({"architectures": []}, "architectures must be a list of one name"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
    ],
)
def test_faults_name_the_file_and_the_key(changes: dict[str, object], fault: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, **changes)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\xff", "[" * 100_000])
def test_garbled_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config.json: is not"):
        read_config(tmp_path)
