from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from penstock.service.text.detokenize import WindowDetokenizer
from penstock.service.text.encode import Tokenizer
from penstock.service.text.files import TokenizerFiles
from penstock.service.text.pieces import ByteFallbackPieces, ByteLevelPieces, byte_level_alphabet, tabulate

WORDS = ["▁", "▁a", "a", "▁▁b", ".", "##ing", "c</w>", "é", "\u0120x", "", "<0x41>", "<0xZZ>", "do n't", "|"]

GEMMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
ODD = {
    "none": None,
    "word_piece": decoders.WordPiece(),
    "bpe": decoders.BPEDecoder(),
    "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
    "replace_only": decoders.Replace("▁", " "),
    "regex": decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.ByteFallback(), decoders.Fuse()]),
    "not_fused": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()]),
}
KNOWN = {
    "byte_level": decoders.ByteLevel(),
    "byte_level_in_sequence": decoders.Sequence([decoders.ByteLevel()]),
    "gemma": decoders.Sequence(GEMMA),
    "two_replaces": decoders.Sequence([decoders.Replace("é", "e▁"), *GEMMA]),
    "strips_two": decoders.Sequence([*GEMMA, decoders.Strip(" ", 2, 0)]),
}


def build(decoder: Any) -> Tokenizer:
    backend = Backend(models.WordLevel({word: token for token, word in enumerate(WORDS)}, unk_token="|"))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("ü▁", special=True)])
    backend.add_tokens(["added é"])
    return Tokenizer(TokenizerFiles({"tokenizer.json": backend.to_str().encode()}))


BUILT = {name: build(decoder) for name, decoder in {**ODD, **KNOWN}.items()}


@pytest.mark.parametrize("name", BUILT)
@given(ids=st.lists(st.integers(0, 20), max_size=20), skip=st.booleans())
def test_every_decoder_streams_what_it_decodes(name: str, ids: list[int], skip: bool) -> None:
    tokenizer = BUILT[name]
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    streamed = "".join([detokenizer.feed((token,)) for token in ids]) + detokenizer.flush()
    assert streamed == tokenizer.decode(ids, skip_special_tokens=skip)


def test_which_decoders_have_a_table() -> None:
    windowed = {name for name, tokenizer in BUILT.items() if isinstance(tokenizer.detokenizer(), WindowDetokenizer)}
    assert windowed == set(ODD)


@pytest.mark.parametrize("decoder", [decoders.Strip(" ", 1, 1), decoders.Fuse(), decoders.ByteFallback()])
def test_other_sequences_have_none(decoder: Any) -> None:
    tokenizer = build(decoders.Sequence([*GEMMA, decoder]))
    assert isinstance(tokenizer.detokenizer(), WindowDetokenizer)
    assert tokenizer.max_token_chars is None


def test_alphabet_is_the_librarys() -> None:
    alphabet = byte_level_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    for char, byte in alphabet.items():
        if byte < 128:
            assert decoders.ByteLevel().decode([char]) == chr(byte)


def test_tables() -> None:
    backend = Backend(models.WordLevel({"a": 0, "é": 2, "\u0120": 3, "a b": 4, "z": 6}, unk_token="a"))
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.decoder = decoders.ByteLevel()
    pieces = tabulate(backend)
    assert isinstance(pieces, ByteLevelPieces)
    assert pieces.shown == (b"a", b"", b"\xe9", b" ", b"a b", b"<s>", b"z")
    assert pieces.plain == (b"a", b"", b"\xe9", b" ", b"a b", b"", b"z")
    assert pieces.max_token_chars == 3
    backend.decoder = decoders.Sequence(GEMMA)
    fallback = tabulate(backend)
    assert isinstance(fallback, ByteFallbackPieces)
    assert fallback.shown == ("a", None, "é", "\u0120", "a b", "<s>", "z")
    assert list(fallback.select([0, 1, 4, 99, 5, 2], skip_special_tokens=True)) == ["a", "a b", "é"]
    assert list(fallback.select([5, 2], skip_special_tokens=False)) == ["<s>", "é"]
