"""``config.json`` of a checkpoint folder, read into typed values. Plain data: loads no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

from penstock.executor.models.errors import CheckpointError

JsonObject = dict[str, object]
ModelDtype = Literal["float32", "bfloat16"]
T = TypeVar("T", int, float, bool, str)

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MAX_CONFIG_BYTES = 16 * 2**20
HALF_DTYPES = ("bfloat16", "float16")
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Where exporters that do not write into ``config.json`` say it."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding; ``kind`` says how it is stretched beyond the trained context."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer that is built like Llama."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: RopeConfig
    tied_head: bool
    attention_bias: bool
    mlp_bias: bool
    eos_ids: tuple[int, ...]
    dtype: ModelDtype
    """bfloat16 for any 16-bit checkpoint."""


@dataclass(frozen=True, slots=True)
class FamilyDefaults:
    """What ``config.json`` leaves out if it is this."""

    max_positions: int
    head_dim: int | None = None
    """None: the share of a head in the hidden size."""


FAMILY_DEFAULTS = {
    "LlamaForCausalLM": FamilyDefaults(max_positions=2048),
    "Qwen3ForCausalLM": FamilyDefaults(max_positions=32_768, head_dim=128),
}
"""By the name in ``architectures``: those that can be served."""


def read_config(folder: Path) -> ModelConfig:
    """Read ``config.json``, and the end-of-sequence ids of ``generation_config.json`` if there is one.

    Raises :class:`CheckpointError` for anything missing, garbled or not supported.
    """
    path = folder / CONFIG_FILE
    fields = ConfigFields(path, read_json_object(path))
    architecture = _architecture(fields)
    _refuse_quantized(folder, fields)
    _refuse_windows(fields)
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(path, f"hidden_act {activation!r} is not supported, only 'silu'")
    config = _model_config(architecture, fields, _eos_ids(folder, fields))
    _check_shape(path, config)
    return config


def read_json_object(path: Path) -> JsonObject:
    """The JSON object in ``path``."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(path, f"is larger than {MAX_CONFIG_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, "is not a JSON object")
    return value


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """Typed reading of one JSON object; every complaint names the file and the key."""

    path: Path
    raw: JsonObject

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._get(key, int, default)
        if value < 1:
            raise CheckpointError(self.path, f"{key} is {value}, must be at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number; an integer will do."""
        value = self.raw.get(key)
        if type(value) is int and abs(value) < 2**53:
            value = float(value)
        number = self._typed(key, value, float, default)
        if not 0 < number < float("inf"):
            raise CheckpointError(self.path, f"{key} is {number}, must be positive and finite")
        return number

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        return self._get(key, bool, default)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return self._get(key, str, default)

    def section(self, key: str) -> ConfigFields | None:
        """A nested object; None where it is absent or null."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise CheckpointError(self.path, f"{key} is not a JSON object")
        return ConfigFields(self.path, cast(JsonObject, value))

    def _get(self, key: str, kind: type[T], default: T | None) -> T:
        return self._typed(key, self.raw.get(key), kind, default)

    def _typed(self, key: str, value: object, kind: type[T], default: T | None) -> T:
        if value is None:
            if default is None:
                raise CheckpointError(self.path, f"{key} is missing")
            return default
        if type(value) is not kind:  # an exact type: true is no integer
            raise CheckpointError(self.path, f"{key} is {value!r:.40}, must be of type {kind.__name__}")
        return value


def _model_config(architecture: str, fields: ConfigFields, eos_ids: tuple[int, ...]) -> ModelConfig:
    defaults = FAMILY_DEFAULTS[architecture]
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    max_positions = fields.integer("max_position_embeddings", defaults.max_positions)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", defaults.head_dim or max(hidden // heads, 1)),
        max_positions=max_positions,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, max_positions),
        tied_head=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        eos_ids=eos_ids,
        dtype=_dtype(fields),
    )


def _check_shape(path: Path, config: ModelConfig) -> None:
    if config.heads % config.kv_heads:
        fault = f"num_attention_heads {config.heads} is not a multiple of num_key_value_heads {config.kv_heads}"
        raise CheckpointError(path, fault)
    if config.head_dim % 2:
        raise CheckpointError(path, f"head_dim {config.head_dim} is odd: rotary embedding needs pairs")
    beyond = [token for token in config.eos_ids if token >= config.vocab_size]
    if beyond:
        raise CheckpointError(path, f"eos_token_id {beyond[0]} is outside the vocabulary of {config.vocab_size}")


def _architecture(fields: ConfigFields) -> str:
    names = fields.raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(fields.path, "architectures must be a list of one name")
    if names[0] not in FAMILY_DEFAULTS:
        fault = f"architecture {names[0]!r} is not supported, only {', '.join(FAMILY_DEFAULTS)}"
        raise CheckpointError(fields.path, fault)
    return names[0]


def _refuse_quantized(folder: Path, fields: ConfigFields) -> None:
    for key in QUANTIZATION_KEYS:
        if fields.raw.get(key) is not None:
            raise CheckpointError(fields.path, f"quantized checkpoints ({key}) are not supported")
    for file in QUANTIZATION_FILES:
        if (folder / file).exists():
            raise CheckpointError(folder / file, "quantized checkpoints are not supported")


def _refuse_windows(fields: ConfigFields) -> None:
    """Attention that does not see the whole past."""
    if fields.flag("use_sliding_window", False):
        raise CheckpointError(fields.path, "sliding windows (use_sliding_window) are not supported")
    kinds = fields.raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise CheckpointError(fields.path, f"layer_types {kinds!r:.60} are not supported, only 'full_attention'")


def _dtype(fields: ConfigFields) -> ModelDtype:
    key = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    name = fields.text(key, "float32")
    if name in HALF_DTYPES:
        return "bfloat16"
    if name != "float32":
        raise CheckpointError(fields.path, f"{key} {name!r} is not supported")
    return "float32"


def _rope(fields: ConfigFields, max_positions: int) -> RopeConfig:
    """Either spelling: ``rope_parameters`` (theta inside) or ``rope_theta`` beside ``rope_scaling``."""
    theta = fields.number("rope_theta", 10_000.0)
    scaling = fields.section("rope_parameters") or fields.section("rope_scaling")
    if scaling is None:
        return RopeConfig(theta)
    theta = scaling.number("rope_theta", theta)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", scaling.number("factor"))
    if kind == "llama3":
        return _llama3_rope(theta, scaling, max_positions)
    fault = f"rope type {kind!r} is not supported, only 'default', 'linear' and 'llama3'"
    raise CheckpointError(fields.path, fault)


def _llama3_rope(theta: float, scaling: ConfigFields, max_positions: int) -> RopeConfig:
    rope = RopeConfig(
        theta,
        "llama3",
        scaling.number("factor"),
        scaling.number("low_freq_factor"),
        scaling.number("high_freq_factor"),
        scaling.integer("original_max_position_embeddings", max_positions),
    )
    if rope.low_frequency_factor >= rope.high_frequency_factor:
        raise CheckpointError(scaling.path, "low_freq_factor must be smaller than high_freq_factor")
    return rope


def _eos_ids(folder: Path, fields: ConfigFields) -> tuple[int, ...]:
    """Every id that ends a sequence, in either file, in rising order."""
    found = _token_ids(fields, "eos_token_id")
    generation = folder / GENERATION_FILE
    if generation.exists():
        found |= _token_ids(ConfigFields(generation, read_json_object(generation)), "eos_token_id")
    return tuple(sorted(found))


def _token_ids(fields: ConfigFields, key: str) -> set[int]:
    value = fields.raw.get(key)
    ids: list[object] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(fields.path, f"{key} is {value!r:.40}, must be token ids")
    return set(cast(list[int], ids))
