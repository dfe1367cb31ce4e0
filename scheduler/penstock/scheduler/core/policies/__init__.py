"""Policies: who is admitted next, and who gives way. One file each, behind one protocol."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from penstock.scheduler.core.sequence import Sequence


class Policy(Protocol):
    """Orders the waiting sequences and chooses victims. Deterministic; ``now`` is the core's injected time in ns."""

    def push(self, sequence: Sequence, now: int) -> None:
        """A sequence waits: it is new, or was preempted."""
        ...

    def remove(self, sequence: Sequence) -> None:
        """A waiting sequence is admitted, or has ended."""
        ...

    def next(self, now: int) -> Sequence | None:
        """The sequence to admit next; None if none waits."""
        ...

    def victim(self, running: Iterable[Sequence], needy: Sequence) -> Sequence:
        """Which running sequence gives its blocks up for ``needy``, which runs too: itself if nobody ranks below it."""
        ...

    def __len__(self) -> int:
        """How many wait."""
        ...

    def __iter__(self) -> Iterator[Sequence]:
        """Those that wait, in any order."""
        ...
