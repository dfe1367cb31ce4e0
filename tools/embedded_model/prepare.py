"""The build folder: the tokenizer, and the corpus as streams of token ids ready to train on."""

import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from embedded_model.corpus import Document, Split, digest, of_split, read_documents
from embedded_model.dialogues import dialogues, snippets
from embedded_model.ngram import Alphabet, Ints, kneser_ney_bits, unigram_bits
from embedded_model.records import write_record
from embedded_model.tokenizer import (
    BEGIN,
    encode_files,
    encode_rendered,
    id_of,
    render,
    render_snippet,
    save_tokenizer,
    train_tokenizer,
)

ORDER = 5
BYTES = Alphabet(size=258, begin=257)
END_OF_FILE = 256


def prepare(stdlib: Path, build: Path, *, vocab_size: int, context: int, seed: int) -> None:
    """Fills `build` with the tokenizer, `<stream>.bin` (uint16 ids) and `corpus.json`."""
    build.mkdir(parents=True, exist_ok=True)
    documents = read_documents(stdlib)
    train = of_split(documents, Split.TRAIN)
    tokenizer = train_tokenizer((document.text for document in train), vocab_size)
    save_tokenizer(tokenizer, build, context)
    tokens = {
        "library": _write_files(build, "library", tokenizer, [d for d in train if not d.is_test]),
        "tests": _write_files(build, "tests", tokenizer, [d for d in train if d.is_test]),
        "chat": _write_rendered(build, "chat", tokenizer, map(render, dialogues(train, seed))),
        "snippets": _write_rendered(build, "snippets", tokenizer, map(render_snippet, snippets(train, seed))),
        "validation": _write_files(build, "validation", tokenizer, of_split(documents, Split.VALIDATION)),
        "held_out": _write_files(build, "held_out", tokenizer, of_split(documents, Split.HELD_OUT)),
    }
    facts = {
        "python": platform.python_version(),
        "sha256": digest(documents),
        "files": _per_split(documents, len),
        "bytes": _per_split(documents, lambda some: sum(document.size_bytes for document in some)),
        "tokens": tokens,
        "vocab_size": vocab_size,
        "seed": seed,
    }
    write_record(build / "corpus.json", facts)


def measure_ngrams(stdlib: Path, build: Path) -> None:
    """Writes `ngrams.json`: held-out bits per byte of unigram and 5-gram models of bytes and of tokens."""
    documents = read_documents(stdlib)
    train, held_out = of_split(documents, Split.TRAIN), of_split(documents, Split.HELD_OUT)
    size_bytes = sum(document.size_bytes for document in held_out)
    tokenizer = Tokenizer.from_file(str(build / "tokenizer.json"))
    tokens = Alphabet(tokenizer.get_vocab_size(), id_of(tokenizer, BEGIN))
    units: dict[str, tuple[Alphabet, Callable[[Sequence[Document]], list[Ints]]]] = {
        "byte": (BYTES, _as_bytes),
        "token": (tokens, lambda some: _as_tokens(tokenizer, some)),
    }
    figures = {}
    for unit, (alphabet, symbols) in units.items():
        seen, unseen = symbols(train), symbols(held_out)
        figures[f"{unit}_unigram"] = unigram_bits(seen, unseen, alphabet) / size_bytes
        figures[f"{unit}_5gram"] = kneser_ney_bits(seen, unseen, ORDER, alphabet) / size_bytes
    write_record(build / "ngrams.json", figures)


def _per_split(documents: Sequence[Document], measure: Callable[[Sequence[Document]], int]) -> dict[str, int]:
    return {split.value: measure(of_split(documents, split)) for split in Split}


def _write_files(build: Path, name: str, tokenizer: Tokenizer, documents: Sequence[Document]) -> int:
    return _write_stream(build, name, encode_files(tokenizer, [document.text for document in documents]))


def _write_rendered(build: Path, name: str, tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    return _write_stream(build, name, encode_rendered(tokenizer, list(texts)))


def _write_stream(build: Path, name: str, pieces: Sequence[npt.NDArray[np.uint16]]) -> int:
    stream = np.concatenate(pieces)
    stream.tofile(build / f"{name}.bin")
    return len(stream)


def _as_bytes(documents: Sequence[Document]) -> list[Ints]:
    ended = (document.text.encode() for document in documents)
    return [np.append(np.frombuffer(text, np.uint8).astype(np.int64), END_OF_FILE) for text in ended]


def _as_tokens(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Ints]:
    encoded = encode_files(tokenizer, [document.text for document in documents])
    return [ids[1:].astype(np.int64) for ids in encoded]
