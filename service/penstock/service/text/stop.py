"""Stop strings: found across chunk borders, with no more text held back than could still become one.

The stop string that is *complete first* wins, and of those completed by the same character the longest. So
the result depends on the text alone, not on how it was cut into chunks, and nothing is generated past a
complete stop string.

All strings are searched at once with the automaton of Aho and Corasick (1975): amortised O(1) a character,
and the depth of its state is exactly the length of the longest suffix that could still begin a stop string.
"""

import re
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

ROOT: Final = 0


class Scanned(NamedTuple):
    """What a piece of text released."""

    text: str
    stop: str | None
    """The stop string that ended the output, once it was found."""


class StopStrings:
    """An immutable set of stop strings, shared by all samples of a request.

    With `include_stop` the output ends behind the stop string instead of before it.
    Raises `ValueError` for an empty string. Building costs about a microsecond a character.
    """

    __slots__ = ("depths", "edges", "fallbacks", "first", "include_stop", "matches")

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self.include_stop = include_stop
        self.edges: list[dict[str, int]] = [{}]
        self.depths = [0]
        self.matches: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self.fallbacks = [ROOT] * len(self.edges)
        self._link()
        firsts = "".join(map(re.escape, self.edges[ROOT]))
        self.first = re.compile(f"[{firsts}]") if firsts else None

    def __bool__(self) -> bool:
        return self.first is not None

    def _insert(self, stop: str) -> None:
        state = ROOT
        for char in stop:
            following = self.edges[state].get(char)
            if following is None:
                following = len(self.edges)
                self.edges[state][char] = following
                self.edges.append({})
                self.depths.append(self.depths[state] + 1)
                self.matches.append(None)
            state = following
        self.matches[state] = stop

    def _link(self) -> None:
        """Set, breadth first, each state's fallback: the longest proper suffix of it that is a state too."""
        queue = deque(self.edges[ROOT].values())
        while queue:
            state = queue.popleft()
            for char, child in self.edges[state].items():
                fallback = self.advance(self.fallbacks[state], char)
                self.fallbacks[child] = fallback
                if self.matches[child] is None:
                    self.matches[child] = self.matches[fallback]
                queue.append(child)

    def advance(self, state: int, char: str) -> int:
        """The state after `char`."""
        while (following := self.edges[state].get(char)) is None:
            if state == ROOT:
                return ROOT
            state = self.fallbacks[state]
        return following


class StopScanner:
    """The search in one sample's output. `kept_chars` is the number of characters released so far."""

    __slots__ = ("_held", "_state", "_stops", "kept_chars", "stop")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = ROOT
        self._held = ""
        self.kept_chars = 0
        self.stop: str | None = None

    def feed(self, text: str) -> Scanned:
        """Take the next `text`; what comes after a stop string is dropped."""
        if self.stop is not None:
            return Scanned("", self.stop)
        end, stop = self._search(text)
        whole = self._held + text
        if stop is None:
            return self._release(whole, len(whole) - self._stops.depths[self._state])
        self.stop = stop
        return self._release(whole, len(self._held) + end - (0 if self._stops.include_stop else len(stop)))

    def flush(self) -> str:
        """The output ends here: what was held back did not become a stop string."""
        return self._release(self._held, len(self._held)).text

    def _search(self, text: str) -> tuple[int, str | None]:
        """Run the automaton over `text`: the end of the first stop string to be complete, and that string."""
        stops, state, at = self._stops, self._state, 0
        while at < len(text):
            if state == ROOT:
                found = stops.first.search(text, at) if stops.first else None
                if found is None:
                    break
                at = found.start()
            state = stops.advance(state, text[at])
            at += 1
            if (stop := stops.matches[state]) is not None:
                return at, stop
        self._state = state
        return at, None

    def _release(self, whole: str, cut: int) -> Scanned:
        self._held = whole[cut:] if self.stop is None else ""
        self.kept_chars += cut
        return Scanned(whole[:cut], self.stop)
