import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.service.text.stop import StopScanner, StopStrings

# Few letters, so that stop strings overlap, and characters that mean something in a regular expression.
LETTERS = st.sampled_from("abé]^-")
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=6), max_size=5)
CHUNKS = st.lists(st.text(LETTERS, max_size=8), max_size=12)


def naive(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """Character by character: the first stop string that the text so far ends with, the longest of them."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def could_become_a_stop(suffix: str, stops: list[str]) -> bool:
    return any(len(suffix) < len(stop) and stop.startswith(suffix) for stop in stops)


@given(STOPS, CHUNKS, st.booleans())
@example(["abab", "bb"], ["ab", "ab"], False)
@example(["abc", "b"], ["a", "b"], False)
@example(["bab", "ab"], ["b", "ab"], False)
def test_equals_the_naive_search(stops: list[str], chunks: list[str], include_stop: bool) -> None:
    scanner = StopScanner(StopStrings(stops, include_stop=include_stop))
    released = "".join(scanner.feed(chunk).text for chunk in chunks) + scanner.flush()
    assert (released, scanner.stop) == naive("".join(chunks), stops, include_stop)
    assert scanner.kept_chars == len(released)


@given(STOPS, CHUNKS)
def test_holds_back_no_more_than_needed(stops: list[str], chunks: list[str]) -> None:
    scanner, fed, released = StopScanner(StopStrings(stops)), "", ""
    for chunk in chunks:
        fed += chunk
        released += scanner.feed(chunk).text
        if scanner.stop is not None:
            return
        held = fed[len(released) :]
        assert not held or could_become_a_stop(held, stops)
        assert not any(could_become_a_stop(fed[at:], stops) for at in range(len(released)))


def test_a_stop_string_across_chunks() -> None:
    scanner = StopScanner(StopStrings(["\nUser:"]))
    assert scanner.feed("Hello\nUs") == ("Hello", None)
    assert scanner.feed("ed\nUser") == ("\nUsed", None)
    assert scanner.feed(": again") == ("", "\nUser:")
    assert scanner.feed("more") == ("", "\nUser:")
    assert scanner.flush() == ""
    assert scanner.kept_chars == len("Hello\nUsed")


def test_one_set_serves_many_scanners() -> None:
    stops = StopStrings(["end"])
    one, other = StopScanner(stops), StopScanner(stops)
    assert one.feed("en").text == ""
    assert other.feed("d").text == "d"
    assert one.feed("d").stop == "end"
    assert other.stop is None


def test_nothing_to_look_for() -> None:
    assert not StopStrings([])
    assert StopScanner(StopStrings([])).feed("text") == ("text", None)


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopStrings(["a", ""])


def test_hostile_stop_strings_cost_linear_work() -> None:
    """`a…ab` against `a…a` is quadratic for a search that tries every suffix: here, 2 · 10⁵ steps at most."""
    steps = 0

    class Counting(StopStrings):
        def advance(self, state: int, char: str) -> int:
            nonlocal steps
            steps += 1
            return super().advance(state, char)

    stops = Counting(["a" * length + "b" for length in range(1, 200, 20)])
    steps = 0
    scanner = StopScanner(stops)
    for _ in range(10_000):
        scanner.feed("a")
    assert steps == 10_000
    assert scanner.feed("b").stop == "a" * 181 + "b"


def test_random_text_with_random_cuts() -> None:
    source = random.Random(7)
    text = "".join(source.choices("abc \n", k=5000)) + "STOP here" + "tail"
    scanner, at, released = StopScanner(StopStrings(["STOP here", "STOP there", "\n\n\n\n\n\n"])), 0, ""
    while at < len(text):
        width = source.randint(1, 9)
        released += scanner.feed(text[at : at + width]).text
        at += width
    assert released == text[:5000]
