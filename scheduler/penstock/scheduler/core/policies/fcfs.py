"""First come, first served."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from penstock.scheduler.core.sequence import Sequence


def _order(sequence: Sequence) -> int:
    return sequence.order


class FirstComeFirstServed:
    """Admits in the order of arrival; a preempted sequence keeps its place. The last to arrive gives way."""

    def __init__(self) -> None:
        self._waiting: list[Sequence] = []

    def push(self, sequence: Sequence, now: int) -> None:
        """See Policy."""
        insort(self._waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """See Policy. Raises ValueError if it does not wait."""
        at = bisect_left(self._waiting, sequence.order, key=_order)
        if at == len(self._waiting) or self._waiting[at] is not sequence:
            raise ValueError(f"sequence {sequence.handle} does not wait")
        del self._waiting[at]

    def next(self, now: int) -> Sequence | None:
        """See Policy."""
        return self._waiting[0] if self._waiting else None

    def victim(self, running: Iterable[Sequence], needy: Sequence) -> Sequence:
        """See Policy."""
        return max(running, key=_order)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)
