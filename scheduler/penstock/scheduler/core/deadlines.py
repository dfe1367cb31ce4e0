"""When sequences are to be ended."""

import heapq
from collections.abc import Iterator, Mapping
from typing import Final

from penstock.scheduler.core.sequence import Sequence

_SLACK: Final = 64


class Deadlines:
    """A heap of moments. Those of sequences that have ended are swept out, so that it stays as small as what lives."""

    __slots__ = ("_heap", "_sequences")

    def __init__(self, sequences: Mapping[int, Sequence]) -> None:
        """``sequences``: those that live, by handle."""
        self._sequences = sequences
        self._heap: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence that has a deadline."""
        if len(self._heap) > 2 * len(self._sequences) + _SLACK:
            self._heap = [entry for entry in self._heap if self._lives(entry)]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (sequence.deadline_ns, sequence.order, sequence.handle))

    def passed(self, now: int) -> Iterator[Sequence]:
        """Those that live and whose deadline has passed; each is forgotten as it is given."""
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if self._lives(entry):
                yield self._sequences[entry[2]]

    def within(self, span_ns: int, now: int) -> bool:
        """Whether a deadline passes within that time: also one of a sequence that has ended, until it has passed."""
        return bool(self._heap) and self._heap[0][0] < now + span_ns

    def _lives(self, entry: tuple[int, int, int]) -> bool:
        """A handle may be used again: the number of the arrival tells."""
        sequence = self._sequences.get(entry[2])
        return sequence is not None and sequence.order == entry[1]
