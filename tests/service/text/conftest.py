"""Small tokenizers of the shapes that models have, trained on the spot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from penstock.service.text.encode import Tokenizer
from penstock.service.text.files import TokenizerFiles

CORPUS = [
    "def feed(self, ids): return self._decode(ids)  # the naïve way",
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "Grüße aus Köln, ça va? Ελληνικά, русский, 中文字符, 日本語",
    "    indented\n\tand tabbed\n\n",
    "🎉👩‍👩‍👧 emoji",
] * 4

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start|>{{ message.role }}<|sep|>\n{{ message.content | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|sep|>\n{% endif %}"
)

CHAT_TOKENS = ["<|start|>", "<|sep|>", "<|end|>"]


def _byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _special(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def llama3() -> tuple[Backend, dict[str, Any]]:
    backend = _byte_level()
    backend.add_special_tokens(_special("<|bos|>", "<|eos|>", *CHAT_TOKENS))
    bos = backend.token_to_id("<|bos|>")
    template = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return backend, {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": TEMPLATE}


def gpt2() -> tuple[Backend, dict[str, Any]]:
    """`add_bos_token` against a post-processor that adds none; tokens that are special by configuration alone."""
    backend = _byte_level()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_tokens(["<|text|>", "<|eos|>"])
    eos = {"content": "<|eos|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return backend, {
        "add_bos_token": True,
        "bos_token": "<|eos|>",
        "eos_token": {"__type": "AddedToken", "special": True, **eos},
        "pad_token": "q",
        "additional_special_tokens": ["<|text|>", "z"],
    }


def qwen() -> tuple[Backend, dict[str, Any]]:
    """No post-processor and no bos; NFC; truncation and padding left in the file."""
    backend = _byte_level()
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(_special("<|eos|>", *CHAT_TOKENS))
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=8, pad_token="<|eos|>", pad_id=backend.token_to_id("<|eos|>"))
    return backend, {"bos_token": None, "pad_token": "<|eos|>", "eos_token": "<|eos|>", "add_bos_token": True}


def llama2() -> tuple[Backend, dict[str, Any]]:
    """SentencePiece BPE with byte fallback, as converted: `▁` in front of the text, stripped when decoded."""
    trained = Backend(models.BPE())
    trained.train_from_iterator(
        ["▁" + text.encode("ascii", "ignore").decode().replace(" ", "▁") for text in CORPUS],
        trainers.BpeTrainer(vocab_size=300, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {text: token for token, text in enumerate(texts)}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(_special("<unk>", "<s>", "</s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def unigram() -> tuple[Backend, dict[str, Any]]:
    """A decoder that has no table: `Metaspace`, whose first token is treated apart."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


SHAPES: dict[str, Callable[[], tuple[Backend, dict[str, Any]]]] = {
    build.__name__: build for build in (llama3, gpt2, qwen, llama2, unigram)
}


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory of every shape, as `transformers` reads it too."""
    directories = {}
    for name, build in SHAPES.items():
        directory = tmp_path_factory.mktemp(name)
        backend, config = build()
        backend.save(str(directory / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        directories[name] = directory
    return directories


@pytest.fixture(scope="session")
def tokenizers(model_dirs: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer(TokenizerFiles.from_directory(path)) for name, path in model_dirs.items()}


@pytest.fixture(scope="session", params=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tokenizer(shape: str, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[shape]


@pytest.fixture(scope="session")
def llama3_tokenizer(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["llama3"]
