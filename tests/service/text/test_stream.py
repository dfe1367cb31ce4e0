from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.service.text.detokenize import IncrementalDetokenizer
from penstock.service.text.encode import Tokenizer
from penstock.service.text.stop import StopStrings
from penstock.service.text.stream import Delta, OutputText

WORDS = ["", "a", "b", "ab", "ba", "c", "aab"]


class Spelled:
    """Token `n` is `WORDS[n]`; the text of tokens from 10 on comes out with the next token, as with half characters."""

    def __init__(self) -> None:
        self._late = ""

    def feed(self, ids: Sequence[int]) -> str:
        return "".join(map(self._feed_one, ids))

    def flush(self) -> str:
        text, self._late = self._late, ""
        return text

    def _feed_one(self, token: int) -> str:
        text, late = WORDS[token % 10], token >= 10
        if late:
            text, self._late = self._late, text
            return text
        return self.flush() + text


def spelled() -> IncrementalDetokenizer:
    return Spelled()


def total(deltas: list[Delta]) -> Delta:
    return Delta(
        "".join(delta.text for delta in deltas), sum(delta.token_count for delta in deltas), deltas[-1].stopped
    )


def naive(ids: list[int], stops: list[str], include_stop: bool) -> Delta:
    """The usage of a cut output is the shortest prefix of the tokens that spells the kept text."""
    text = "".join(WORDS[token] for token in ids)
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            kept = text[: end if include_stop else end - len(max(found, key=len))]
            count = next(n for n in range(len(ids) + 1) if len(_spell(ids[:n])) >= len(kept))
            return Delta(kept, count, True)
    return Delta(text, len(ids), False)


def _spell(ids: list[int]) -> str:
    return "".join(WORDS[token] for token in ids)


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=10),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_equals_the_naive_cut(chunks: list[list[int]], stops: list[str], include_stop: bool) -> None:
    output = OutputText(spelled(), StopStrings(stops, include_stop=include_stop))
    deltas = [output.feed(chunk) for chunk in chunks] + [output.finish()]
    ids = [token for chunk in chunks for token in chunk]
    assert total(deltas) == naive(ids, stops, include_stop)


@given(st.lists(st.integers(0, 6) | st.integers(10, 16), max_size=20), st.lists(st.integers(1, 5), max_size=10))
def test_chunking_changes_nothing(ids: list[int], widths: list[int]) -> None:
    stops = StopStrings(["aba", "cc"])
    whole, parts = OutputText(spelled(), stops), OutputText(spelled(), stops)
    deltas, rest = [], ids
    for width in widths:
        deltas.append(parts.feed(rest[:width]))
        rest = rest[width:]
    deltas += [parts.feed(rest), parts.finish()]
    assert total(deltas) == total([whole.feed(ids), whole.finish()])


@given(st.lists(st.integers(0, 6), max_size=20))
def test_tokens_handed_out_are_never_taken_back(ids: list[int]) -> None:
    """After every step, the tokens so far spell at least the text so far."""
    output, text, count = OutputText(spelled(), StopStrings(["abab", "ca"])), "", 0
    for token in ids:
        delta = output.feed((token,))
        text, count = text + delta.text, count + delta.token_count
        assert _spell(ids[:count]).startswith(text)
        assert len(_spell(ids[: max(count - 1, 0)])) <= len(text)


def test_without_stop_strings_all_is_handed_out_at_once() -> None:
    output = OutputText(spelled())
    assert output.feed([1, 0, 12]) == ("a", 3, False)
    assert output.feed([]) == ("", 0, False)
    assert output.finish() == ("b", 0, False)
    assert output.feed([1]) == ("", 0, False)
    assert output.stop is None


def test_what_follows_a_stop_string_is_ignored() -> None:
    output = OutputText(spelled(), StopStrings(["b"]))
    assert output.feed([1, 3, 5, 5]) == ("aa", 2, True)
    assert output.stop == "b"
    assert output.feed([1]) == ("", 0, True)
    assert output.finish() == ("", 0, True)


def test_a_stop_string_at_the_very_start_uses_no_token() -> None:
    output = OutputText(spelled(), StopStrings(["a"]))
    assert output.feed([0, 3]) == ("", 0, True)


def test_a_stop_string_that_the_flush_completes() -> None:
    output = OutputText(spelled(), StopStrings(["cb"]))
    assert output.feed([1, 5, 12]) == ("a", 1, False)
    assert output.finish() == ("", 0, True)
    assert output.stop == "cb"


def test_held_text_comes_out_at_the_end() -> None:
    output = OutputText(spelled(), StopStrings(["abc"]))
    assert output.feed([1, 2, 0]) == ("", 0, False)
    assert output.finish() == ("ab", 3, False)


@pytest.mark.parametrize("width", [1, 2, 100])
def test_with_a_real_tokenizer(llama3_tokenizer: Tokenizer, width: int) -> None:
    ids = llama3_tokenizer.encode("Grüße 🎉\n\nUser: the rest", add_special_tokens=False)
    output = OutputText(llama3_tokenizer.detokenizer([1]), StopStrings(["\n\nUser:"]))
    deltas = [output.feed(ids[at : at + width]) for at in range(0, len(ids), width)]
    text, count, stopped = total(deltas)
    assert (text, stopped) == ("Grüße 🎉", True)
    assert count == len(llama3_tokenizer.encode("Grüße 🎉", add_special_tokens=False))
