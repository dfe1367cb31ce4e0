"""One sample's output: token ids in, text out, cut at a stop string with the tokens that count."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from penstock.service.text.detokenize import IncrementalDetokenizer
from penstock.service.text.stop import StopScanner, StopStrings


class Delta(NamedTuple):
    """What one step adds to a sample's output. Summed over a sample, `token_count` is its usage."""

    text: str
    token_count: int
    """How many further tokens, in the order fed, belong to the output."""
    stopped: bool
    """A stop string was found: the output ends here, whatever else is fed."""


class OutputText:
    """Detokenizes and looks for stop strings.

    Without stop strings every token counts as soon as it is fed. With them a token counts once text is
    released that begins in it or behind it; so a token that holds the cut counts, one that lies wholly behind
    it does not, and no token is ever handed out that a later stop string takes back.
    """

    __slots__ = ("_chars", "_detokenizer", "_finished", "_scanner", "_starts")

    def __init__(self, detokenizer: IncrementalDetokenizer, stops: StopStrings | None = None) -> None:
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stops) if stops else None
        self._starts: deque[int] = deque()
        """Of each token not handed out yet: where its text begins, in characters of the output."""
        self._chars = 0
        self._finished = False

    @property
    def stop(self) -> str | None:
        """The stop string that ended the output, if one did."""
        return self._scanner.stop if self._scanner else None

    def feed(self, ids: Sequence[int]) -> Delta:
        """Take the next tokens. Those that arrive after a stop string or `finish` are ignored."""
        if self._finished:
            return self._nothing()
        if self._scanner is None:
            return Delta(self._detokenizer.feed(ids), len(ids), False)
        text, stop = self._scanner.feed(self._decode(ids))
        self._finished = stop is not None
        return Delta(text, self._hand_out(self._scanner.kept_chars), self._finished)

    def finish(self) -> Delta:
        """No token follows: whatever was held back comes out, half a character as U+FFFD."""
        if self._finished:
            return self._nothing()
        self._finished = True
        text = self._detokenizer.flush()
        return Delta(text, 0, False) if self._scanner is None else self._finish(self._scanner, text)

    def _finish(self, scanner: StopScanner, text: str) -> Delta:
        released, stop = scanner.feed(text)
        if stop is not None:
            return Delta(released, self._hand_out(scanner.kept_chars), True)
        count = len(self._starts)
        self._starts.clear()
        return Delta(released + scanner.flush(), count, False)

    def _nothing(self) -> Delta:
        return Delta("", 0, self.stop is not None)

    def _decode(self, ids: Sequence[int]) -> str:
        """Feed token by token, since a cut needs to know whose text it falls into."""
        texts = []
        for token in ids:
            self._starts.append(self._chars)
            text = self._detokenizer.feed((token,))
            self._chars += len(text)
            texts.append(text)
        return "".join(texts)

    def _hand_out(self, kept_chars: int) -> int:
        """Count, and forget, the tokens whose text begins before character `kept_chars`."""
        starts, count = self._starts, 0
        while starts and starts[0] < kept_chars:
            starts.popleft()
            count += 1
        return count
