"""``config.json`` of a checkpoint folder, read into typed values. Plain data: loads no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
LAYER_KINDS = ("full_attention", "sliding_attention")
DEFAULT_WINDOW = 4096
DEFAULT_FULL_LAYERS = 28
"""Of ``sliding_window`` and of ``max_window_layers``, in any family that reads them."""


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
    """Most tokens of a sequence: what the model was trained for, and no more than ``window``."""
    window: int | None
    """Tokens that the layers which do not see the whole past attend over, the newest included; None: all layers see
    all of it. A sequence that is no longer than the window is all that such a layer would see, so that full attention,
    the only kind there is here, computes the same."""
    norm_eps: float
    rope: RopeConfig
    tied_head: bool
    qkv_bias: bool
    output_bias: bool
    """Of the attention block's output product."""
    mlp_bias: bool
    eos_ids: tuple[int, ...]
    dtype: ModelDtype
    """bfloat16 for any 16-bit checkpoint."""


@dataclass(frozen=True, slots=True)
class FamilyDefaults:
    """How a family reads ``config.json``: values of keys that are absent, and which keys it asks at all.

    As the configuration classes of ``transformers`` have it, against which this is tested.
    """

    max_positions: int
    head_dim: int | None = None
    """None: the share of a head in the hidden size."""
    kv_heads: int | None = None
    """None: as many as there are query heads, which an explicit null means in any family."""
    eos_id: int | None = None
    """If ``generation_config.json`` names none either."""
    attention_bias: Literal["key", "qkv", "none"] = "none"
    """The key of that name is asked, for all four products; or queries, keys and values have biases, or nothing has,
    whatever the key says."""
    mlp_bias: bool = False
    """Whether the key of that name is asked."""
    windows: Literal["none", "all", "upper"] = "none"
    """Which layers have the window ``sliding_window``: all; or, if ``use_sliding_window``, those that ``layer_types``
    names, else those from ``max_window_layers`` on."""


FAMILY_DEFAULTS = {
    "LlamaForCausalLM": FamilyDefaults(2048, eos_id=2, attention_bias="key", mlp_bias=True),
    "MistralForCausalLM": FamilyDefaults(131_072, kv_heads=8, eos_id=2, windows="all"),
    "Qwen2ForCausalLM": FamilyDefaults(32_768, kv_heads=32, attention_bias="qkv", windows="upper"),
    "Qwen3ForCausalLM": FamilyDefaults(32_768, head_dim=128, kv_heads=32, attention_bias="key", windows="upper"),
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
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(path, f"hidden_act {activation!r} is not supported, only 'silu'")
    eos_ids = _eos_ids(folder, fields, FAMILY_DEFAULTS[architecture].eos_id)
    config = _model_config(architecture, fields, eos_ids)
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

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer, positive unless ``least`` says otherwise."""
        value = self._get(key, int, default)
        if value < least:
            raise CheckpointError(self.path, f"{key} is {value}, must be at least {least}")
        return value

    def is_null(self, key: str) -> bool:
        """Whether the key is there, and null."""
        return key in self.raw and self.raw[key] is None

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
    layers = fields.integer("num_hidden_layers")
    trained = fields.integer("max_position_embeddings", defaults.max_positions)
    window = _window(architecture, fields, layers)
    kv_heads = heads if fields.is_null("num_key_value_heads") else defaults.kv_heads or heads
    all_biases = defaults.attention_bias == "key" and fields.flag("attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", kv_heads),
        head_dim=fields.integer("head_dim", defaults.head_dim or max(hidden // heads, 1)),
        max_positions=min(trained, window or trained),
        window=window,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, trained),
        tied_head=fields.flag("tie_word_embeddings", False),
        qkv_bias=all_biases or defaults.attention_bias == "qkv",
        output_bias=all_biases,
        mlp_bias=defaults.mlp_bias and fields.flag("mlp_bias", False),
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


def _window(architecture: str, fields: ConfigFields, layers: int) -> int | None:
    """The window of the layers that have one; None if no layer has.

    Raises CheckpointError for layers that attend in a way that is unknown, or in a window whose size is not told.
    """
    which = FAMILY_DEFAULTS[architecture].windows
    used = which == "all" or fields.flag("use_sliding_window", False)
    if used and which == "none":
        raise CheckpointError(fields.path, f"use_sliding_window is true, {architecture} has no sliding windows")
    kinds = _layer_kinds(fields, LAYER_KINDS[:1] if which == "none" else LAYER_KINDS, layers)
    if not used or fields.is_null("sliding_window"):
        if kinds is not None and "sliding_attention" in kinds:
            fault = "layer_types has 'sliding_attention', and there is no sliding_window in use"
            raise CheckpointError(fields.path, fault)
        return None
    window = fields.integer("sliding_window", DEFAULT_WINDOW)
    if which == "all":
        return window
    if kinds is None:
        full = fields.integer("max_window_layers", DEFAULT_FULL_LAYERS, least=0)
        return window if full < layers else None
    return window if "sliding_attention" in kinds else None


def _layer_kinds(fields: ConfigFields, supported: Sequence[str], layers: int) -> list[str] | None:
    """What ``layer_types`` says of each layer; None if it is absent."""
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or any(kind not in supported for kind in kinds):
        names = " and ".join(map(repr, supported))
        raise CheckpointError(fields.path, f"layer_types {kinds!r:.60} are not supported, only {names}")
    if len(kinds) != layers:
        raise CheckpointError(fields.path, f"layer_types has {len(kinds)} entries, num_hidden_layers is {layers}")
    return kinds


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


def _eos_ids(folder: Path, fields: ConfigFields, default: int | None) -> tuple[int, ...]:
    """Every id that ends a sequence, in either file, in rising order; ``default`` if neither has the key."""
    found = _token_ids(fields, "eos_token_id")
    generation = folder / GENERATION_FILE
    if generation.exists():
        found |= _token_ids(ConfigFields(generation, read_json_object(generation)), "eos_token_id")
    if not found and default is not None and "eos_token_id" not in fields.raw:
        return (default,)
    return tuple(sorted(found))


def _token_ids(fields: ConfigFields, key: str) -> set[int]:
    value = fields.raw.get(key)
    ids: list[object] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(fields.path, f"{key} is {value!r:.40}, must be token ids")
    return set(cast(list[int], ids))
