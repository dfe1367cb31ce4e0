"""``config.json`` in its spellings, and every fault as one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from penstock.executor.models.config import FAMILY_DEFAULTS, ModelConfig, RopeConfig, read_config
from penstock.executor.models.errors import CheckpointError
from penstock.executor.models.registry import FAMILIES, build_model
from support.tiny_llama import FAMILIES as MODEL_TYPES
from support.tiny_llama import LLAMA3_SCALING, TINY_QWEN3, TinyLlama

LLAMA3 = RopeConfig(5e5, "llama3", 4.0, 1.0, 4.0, 64)
NEEDED: dict[str, object] = {
    "vocab_size": 320, "hidden_size": 2048, "intermediate_size": 64, "num_hidden_layers": 40, "num_attention_heads": 64,
}  # fmt: skip
"""Keys without a default, and with numbers that no family has for one."""


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
    assert FAMILIES.keys() == FAMILY_DEFAULTS.keys() == set(MODEL_TYPES.values())


def read_both(folder: Path, model_type: str, **given: object) -> tuple[ModelConfig, Any]:
    """A configuration with these keys beside the needed ones, as we read it and as transformers does."""
    config = {"architectures": [MODEL_TYPES[model_type]], "model_type": model_type, **NEEDED, **given}
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder), AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_absent_keys_have_the_defaults_of_transformers(model_type: str, tmp_path: Path) -> None:
    ours, theirs = read_both(tmp_path, model_type)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2048 // 64)
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.window == getattr(theirs, "sliding_window", None)
    assert ours.max_positions == min(theirs.max_position_embeddings, ours.window or theirs.max_position_embeddings)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert (ours.rope.kind, ours.rope.theta) == tuple(
        theirs.rope_parameters[key] for key in ("rope_type", "rope_theta")
    )
    assert ours.tied_head is theirs.tie_word_embeddings
    assert ours.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert theirs.hidden_act == "silu"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("biases", [None, False, True], ids=["", "no biases", "biases"])
def test_the_tensors_are_those_of_transformers(
    model_type: str, biases: bool | None, tied: bool, tmp_path: Path
) -> None:
    """Whatever the keys of biases say in a family that does not read them."""
    told = {} if biases is None else {"attention_bias": biases, "mlp_bias": biases}
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    ours, theirs = read_both(tmp_path, model_type, **small, **told, tie_word_embeddings=tied)
    model = build_model(ours, torch.float32, torch.device("cpu"))
    reference: Any = AutoModelForCausalLM
    expected = {name: tensor.shape for name, tensor in reference.from_config(theirs).state_dict().items()}
    if tied:
        assert "lm_head.weight" in model.spare()
        del expected["lm_head.weight"]
    assert {name: tensor.shape for name, tensor in model.destinations().items()} == expected


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_no_number_of_key_heads_is_that_of_query_heads(model_type: str, tmp_path: Path) -> None:
    ours, theirs = read_both(tmp_path, model_type, num_key_value_heads=None)
    assert ours.kv_heads == theirs.num_key_value_heads == 64


QWEN2, MISTRAL = ({"architectures": [MODEL_TYPES[name]]} for name in ("qwen2", "mistral"))
SLIDING, FULL = ["sliding_attention"], ["full_attention"]
ASKED = {"use_sliding_window": True}


@pytest.mark.parametrize(
    ("model_type", "given", "window"),
    [
        ("llama", {"sliding_window": 7}, None),
        ("llama", {"layer_types": 40 * FULL}, None),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 1024, "use_sliding_window": False}, 1024),
        ("mistral", {"sliding_window": 1024, "layer_types": 20 * (FULL + SLIDING)}, 1024),
        ("qwen2", {"sliding_window": 1024, "max_window_layers": 3}, None),
        ("qwen2", ASKED, 4096),
        ("qwen2", ASKED | {"sliding_window": None}, None),
        ("qwen2", ASKED | {"sliding_window": 1024, "max_window_layers": 39}, 1024),
        ("qwen2", ASKED | {"sliding_window": 1024, "max_window_layers": 40}, None),
        ("qwen2", ASKED | {"sliding_window": 1024, "max_window_layers": 0}, 1024),
        ("qwen2", ASKED | {"num_hidden_layers": 28}, None),
        ("qwen2", ASKED | {"num_hidden_layers": 29}, 4096),
        ("qwen2", ASKED | {"layer_types": 40 * FULL}, None),
        ("qwen3", ASKED | {"sliding_window": 77, "max_window_layers": 40, "layer_types": 20 * (FULL + SLIDING)}, 77),
        ("qwen3", {"sliding_window": 77, "layer_types": 40 * FULL}, None),
    ],
)
@pytest.mark.parametrize("positions", [512, 8192])
def test_a_sequence_is_no_longer_than_the_window(
    model_type: str, given: dict[str, object], window: int | None, positions: int, tmp_path: Path
) -> None:
    ours, theirs = read_both(tmp_path, model_type, max_position_embeddings=positions, **given)
    assert ours.window == window
    assert ours.max_positions == min(positions, window or positions)
    if model_type == "llama":
        return  # reads no such key
    kinds = getattr(theirs, "layer_types", None) if model_type != "mistral" else None
    windowed = theirs.sliding_window is not None and (kinds is None or "sliding_attention" in kinds)
    assert ours.window == (theirs.sliding_window if windowed else None)


def test_a_window_shortens_sequences_and_not_what_the_rotation_was_trained_for(tmp_path: Path) -> None:
    scaling = {key: value for key, value in LLAMA3_SCALING.items() if key != "original_max_position_embeddings"}
    config, _ = read_both(
        tmp_path, "mistral", sliding_window=100, max_position_embeddings=512, rope_scaling=scaling, rope_theta=7.0
    )
    assert config.max_positions == 100
    assert config.rope == RopeConfig(7.0, "llama3", 4.0, 1.0, 4.0, 512)


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


def test_no_end_of_sequence_where_it_is_null(tmp_path: Path) -> None:
    assert read_both(tmp_path, "llama", eos_token_id=None)[0].eos_ids == ()


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
        ({"use_sliding_window": True}, "use_sliding_window is true, LlamaForCausalLM has no sliding windows"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "are not supported, only 'full_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden_layers is 2"),
        ({"layer_types": "full_attention"}, "layer_types 'full_attention' are not supported"),
        (QWEN2 | {"layer_types": ["full_attention", "chunked_attention"]}, "only 'full_attention' and 'sliding_att"),
        (QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]}, "there is no sliding_window in use"),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 3, **ASKED}, "layer_types has 3 entries"),
        (QWEN2 | ASKED | {"sliding_window": 0}, "sliding_window is 0, must be at least 1"),
        (QWEN2 | ASKED | {"sliding_window": "all"}, "sliding_window is 'all', must be of type int"),
        (QWEN2 | ASKED | {"max_window_layers": -1}, "max_window_layers is -1, must be at least 0"),
        (QWEN2 | {"use_sliding_window": "no"}, "use_sliding_window is 'no', must be of type bool"),
        (MISTRAL | {"sliding_window": -4096}, "sliding_window is -4096, must be at least 1"),
        ({"architectures": ["MixtralForCausalLM"]}, "only LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qw"),
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
