from array import array
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.service.text.detokenize import IncrementalDetokenizer
from penstock.service.text.encode import Tokenizer

IDS = st.lists(st.integers(0, 620), max_size=40)  # every vocabulary here is smaller: some ids do not exist
TEXTS = st.text(st.sampled_from("ab T.\n\té中🎉\u200d\ufffd"), max_size=30)
CUTS = st.lists(st.integers(0, 40), max_size=8)
EXACT = ["llama3", "gpt2", "qwen", "unigram"]


def chunked(ids: Sequence[int], cuts: list[int]) -> list[Sequence[int]]:
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [ids[start:end] for start, end in pairwise(edges)]


def joined(detokenizer: IncrementalDetokenizer, chunks: list[Sequence[int]]) -> str:
    return "".join([detokenizer.feed(chunk) for chunk in chunks]) + detokenizer.flush()


def from_bytes(ids: Sequence[int]) -> list[int]:
    """Of the llama2 shape: ids 3…258 are the bytes, in order."""
    return [token - 3 for token in ids if 3 <= token < 259]


def good_runs_only(ids: list[int]) -> list[int]:
    """Replace every run of byte tokens that is not UTF-8 by its length in `a`s."""
    kept: list[int] = []
    run: list[int] = []
    for token in [*ids, -1]:
        if 3 <= token < 259:
            run.append(token)
            continue
        try:
            bytes(from_bytes(run)).decode()
        except UnicodeDecodeError:
            run = [3 + ord("a")] * len(run)
        kept += [*run, token]
        run = []
    return kept[:-1]


@pytest.mark.parametrize("name", EXACT)
@given(ids=IDS, cuts=CUTS, skip=st.booleans())
def test_random_ids(tokenizers: dict[str, Tokenizer], name: str, ids: list[int], cuts: list[int], skip: bool) -> None:
    tokenizer = tokenizers[name]
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    assert joined(detokenizer, chunked(ids, cuts)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", [*EXACT, "llama2"])
@given(text=TEXTS, cuts=CUTS)
def test_text_in_text_out(tokenizers: dict[str, Tokenizer], name: str, text: str, cuts: list[int]) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids)
    assert joined(tokenizer.detokenizer(), chunked(ids, cuts)) == decoded
    if name in ("llama3", "gpt2", "llama2"):  # those that normalize nothing away
        assert decoded == text


@pytest.mark.parametrize("name", ["llama3", "gpt2", "llama2", "unigram"])
@given(prompt=TEXTS, text=TEXTS)
def test_a_continuation_keeps_its_leading_space(
    tokenizers: dict[str, Tokenizer], name: str, prompt: str, text: str
) -> None:
    tokenizer = tokenizers[name]
    before = tokenizer.encode(prompt)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole, start = tokenizer.decode(before + ids), tokenizer.decode(before)
    if not whole.startswith(start):
        return  # the prompt ended in a bad byte run that the continuation extends
    assert joined(tokenizer.detokenizer(before), [ids]) == whole[len(start) :]


def test_leading_space_by_example(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama2"]
    ids = tokenizer.encode("quick", add_special_tokens=False)
    assert joined(tokenizer.detokenizer(tokenizer.encode("The")), [ids]) == " quick"
    assert joined(tokenizer.detokenizer(tokenizer.encode("")), [ids]) == "quick"  # only <s> stands before it


@given(ids=st.lists(st.integers(0, 340), max_size=40).map(good_runs_only), cuts=CUTS, skip=st.booleans())
def test_byte_fallback_random_ids(
    tokenizers: dict[str, Tokenizer], ids: list[int], cuts: list[int], skip: bool
) -> None:
    tokenizer = tokenizers["llama2"]
    if skip:  # a skipped token between two runs makes one run of them
        ids = good_runs_only([token for token in ids if token not in tokenizer.special_ids and token < 320])
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    assert joined(detokenizer, chunked(ids, cuts)) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(data=st.binary(max_size=12), cuts=CUTS)
def test_byte_fallback_bad_runs(tokenizers: dict[str, Tokenizer], data: bytes, cuts: list[int]) -> None:
    """Good characters stand, and every byte that is part of none is one U+FFFD."""
    tokenizer = tokenizers["llama2"]
    ids = [3 + byte for byte in data]
    expected, rest = "", data
    while rest:
        width = next((n for n in range(1, 5) if _is_character(rest[:n])), 0)
        expected += rest[:width].decode() if width else "\ufffd"
        rest = rest[max(width, 1) :]
    detokenizer = tokenizer.detokenizer(tokenizer.encode("x"))
    assert joined(detokenizer, chunked(ids, cuts)) == expected


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("name", ["llama3", "llama2"])
@given(ids=IDS)
def test_never_half_a_character(tokenizers: dict[str, Tokenizer], name: str, ids: list[int]) -> None:
    """After an emoji is begun nothing comes out until it is whole, or known to be broken."""
    tokenizer = tokenizers[name]
    emoji = "🎉".encode()
    pieces = tokenizer.encode("🎉", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer(tokenizer.encode("x"))
    detokenizer.feed(ids)
    detokenizer.flush()
    texts = [detokenizer.feed((token,)) for token in pieces[-len(emoji) :]]
    assert "".join(texts).endswith("🎉")
    assert texts[-1].endswith("🎉")
    assert "\ufffd" not in "".join(texts)


@pytest.mark.parametrize("name", ["llama3", "gpt2", "qwen", "llama2"])
def test_end_in_the_middle_of_a_character(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("x🎉", add_special_tokens=False)[:-1]
    detokenizer = tokenizer.detokenizer()
    streamed = detokenizer.feed(ids)
    assert streamed == "x"
    assert streamed + detokenizer.flush() == tokenizer.decode(ids)
    assert detokenizer.flush() == ""


def test_prompt_that_ends_in_half_a_character_is_continued(llama3_tokenizer: Tokenizer) -> None:
    ids = llama3_tokenizer.encode("ab龘")  # in no token: three bytes
    assert joined(llama3_tokenizer.detokenizer(ids[:-1]), [ids[-1:]]) == "龘"
    assert joined(llama3_tokenizer.detokenizer(ids), [ids[-1:]]) == "\ufffd"


def test_unknown_and_huge_ids_have_no_text(tokenizer: Tokenizer) -> None:
    ids = array("I", [tokenizer.vocab_size, 2**32 - 1, *tokenizer.encode("ab", add_special_tokens=False), 10**6])
    assert joined(tokenizer.detokenizer(), [ids]).strip() == "ab"


@given(ids=IDS, cuts=CUTS, skip=st.booleans())
def test_window_equals_table(tokenizers: dict[str, Tokenizer], ids: list[int], cuts: list[int], skip: bool) -> None:
    """The general method on a tokenizer that has a table, for text (bad bytes it may lump together)."""
    tokenizer = tokenizers["llama3"]
    if "\ufffd" in tokenizer.decode(ids, skip_special_tokens=skip):
        ids = list(tokenizer.encode("plain 🎉中é text<|end|>"))
    window = tokenizer.window_detokenizer(skip_special_tokens=skip)
    assert joined(window, chunked(ids, cuts)) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_window_stays_short(tokenizers: dict[str, Tokenizer]) -> None:
    """The cost a token must not grow with the output, whatever the tokens are."""
    tokenizer = tokenizers["llama3"]
    widths: list[int] = []
    window = tokenizer.window_detokenizer()
    decode = window._decode

    def watched(ids: Sequence[int]) -> str:
        widths.append(len(ids))
        return decode(ids)

    window._decode = watched
    broken = tokenizer.encode("🎉", add_special_tokens=False)[-1]
    for token in [broken] * 200 + list(tokenizer.special_ids) * 50 + list(tokenizer.encode("word " * 100)):
        window.feed((token,))
    assert max(widths) <= 8
