"""What each token id contributes to the text, tabulated once per tokenizer where that is possible.

Two families cover the causal language models in use. Any other decoder has no table (`UnknownDecoder`),
because there what a token contributes depends on its neighbours.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from tokenizers import Tokenizer as Backend

Piece = TypeVar("Piece")

BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnknownDecoder(Exception):
    """The tokenizer's decoder is none that can be tabulated."""


@dataclass(frozen=True, slots=True)
class ByteLevelPieces:
    """GPT-2's `ByteLevel` decoder: the output is the concatenation of the tokens' bytes, read as UTF-8."""

    shown: tuple[bytes, ...]
    """By id; empty for ids that the tokenizer does not have."""
    plain: tuple[bytes, ...]
    """The same, with special tokens empty."""
    max_token_chars: int

    def join(self, ids: Iterable[int], *, skip_special_tokens: bool) -> bytes:
        """The bytes of `ids`; ids beyond the vocabulary contribute none."""
        table = self.plain if skip_special_tokens else self.shown
        try:
            return b"".join([table[token] for token in ids])
        except IndexError:
            return b"".join([table[token] for token in ids if token < len(table)])


@dataclass(frozen=True, slots=True)
class ByteFallbackPieces:
    """SentencePiece BPE, `Replace…, ByteFallback, Fuse[, Strip]`: texts, and `<0xNN>` for single bytes."""

    shown: tuple[str | int | None, ...]
    """By id: a text, a byte, or None for an id that the tokenizer does not have."""
    plain: tuple[str | int | None, ...]
    """The same, with special tokens None."""
    strip: str
    """The character that is stripped from the start of the whole output."""
    strip_count: int
    max_token_chars: int

    def select(self, ids: Iterable[int], *, skip_special_tokens: bool) -> Iterator[str | int]:
        """The pieces of those `ids` that have one."""
        table = self.plain if skip_special_tokens else self.shown
        for token in ids:
            piece = table[token] if token < len(table) else None
            if piece is not None:
                yield piece


def tabulate(backend: Backend) -> ByteLevelPieces | ByteFallbackPieces:
    """The table of `backend`, made in about 0.3 s for 128k tokens. Raises `UnknownDecoder`."""
    if backend.decoder is None:
        raise UnknownDecoder
    steps = _steps(msgspec.json.decode(backend.decoder.__getstate__()))
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _byte_level(backend)
    return _byte_fallback(backend, steps)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


def _tokens(backend: Backend) -> list[str | None]:
    """Every token's text by id, with None in the holes."""
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for text, token in vocabulary.items():
        tokens[token] = text
    for token, added in backend.get_added_tokens_decoder().items():
        tokens[token] = added.content
    return tokens


def special_ids(backend: Backend) -> frozenset[int]:
    """The ids that decoding skips on request."""
    return frozenset(token for token, added in backend.get_added_tokens_decoder().items() if added.special)


def _without(pieces: Sequence[Piece], ids: frozenset[int], empty: Piece) -> tuple[Piece, ...]:
    return tuple(empty if token in ids else piece for token, piece in enumerate(pieces))


def byte_level_alphabet() -> dict[str, int]:
    """The character by which a byte-level vocabulary writes each byte.

    Printable Latin-1 stands for itself, the other 68 bytes for the characters from U+0100 on, in order
    (GPT-2, 2019).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_level(backend: Backend) -> ByteLevelPieces:
    alphabet = byte_level_alphabet()
    known = frozenset(alphabet)
    to_latin = str.maketrans({char: chr(byte) for char, byte in alphabet.items()})

    def as_bytes(text: str | None) -> bytes:
        """One character outside the alphabet makes the whole token plain text, as in the library."""
        if not text:
            return b""
        return text.translate(to_latin).encode("latin-1") if known.issuperset(text) else text.encode()

    shown = tuple(map(as_bytes, _tokens(backend)))
    longest = max(map(len, shown), default=1)
    return ByteLevelPieces(shown, _without(shown, special_ids(backend), b""), longest)


def _byte_fallback(backend: Backend, steps: list[dict[str, Any]]) -> ByteFallbackPieces:
    replace, strip, strip_count = _read_fallback_steps(steps)

    def as_piece(text: str | None) -> str | int | None:
        if text is None:
            return None
        replaced = replace(text)
        found = BYTE_TOKEN.fullmatch(replaced)
        return int(found[1], 16) if found else replaced

    shown = tuple(map(as_piece, _tokens(backend)))
    longest = max((len(piece) for piece in shown if isinstance(piece, str)), default=1)
    return ByteFallbackPieces(shown, _without(shown, special_ids(backend), None), strip, strip_count, longest)


def _read_fallback_steps(steps: list[dict[str, Any]]) -> tuple[Callable[[str], str], str, int]:
    """The replacement, the stripped character, how many of it. `UnknownDecoder` for any other sequence."""
    kinds = [step["type"] for step in steps]
    replaces = kinds.index("ByteFallback") if "ByteFallback" in kinds else 0
    strip: dict[str, Any] = {"content": " ", "start": 0, "stop": 0}
    if kinds[-1:] == ["Strip"]:
        strip = steps[-1]
    expected = ["Replace"] * replaces + ["ByteFallback", "Fuse"] + ["Strip"] * (kinds[-1:] == ["Strip"])
    patterns = [step["pattern"].get("String") for step in steps[:replaces] if step["type"] == "Replace"]
    if kinds != expected or None in patterns or strip["stop"] != 0:
        raise UnknownDecoder
    pairs = [(pattern, step["content"]) for pattern, step in zip(patterns, steps, strict=False)]

    def replace(text: str) -> str:
        for old, new in pairs:
            text = text.replace(old, new)
        return text

    return replace, strip["content"], strip["start"]
