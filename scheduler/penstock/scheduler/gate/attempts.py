"""What the gate knows of every attempt: its samples by handle, and of each the ids that its service may not have."""

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from penstock.v1 import SampleFailed, SampleFinished

if TYPE_CHECKING:
    from penstock.scheduler.gate.sessions import Session
    from penstock.scheduler.gate.spans import AttemptTrace

HANDLES: Final = 1 << 32


class Sample:
    """One sequence. Ids are numbered within its output, those that an earlier attempt delivered included.

    ``ids[0]`` has number ``base``: what came before was acknowledged, or delivered by an earlier attempt. There are
    never more than max_tokens of them, four bytes each.
    """

    __slots__ = (
        "attempt", "base", "cancelled", "end", "end_sent", "handle", "ids", "index", "muted", "outbox", "pending",
        "sent", "started",
    )  # fmt: skip

    def __init__(self, attempt: "Attempt", handle: int, index: int, delivered: int) -> None:
        self.attempt = attempt
        self.outbox = attempt.session.outbox
        """Of its session: here, too, since every token goes through it."""
        self.handle = handle
        self.index = index
        self.base = delivered
        self.ids = array("I")
        self.sent = delivered
        """Number of the first id that was not put on the session's present stream."""
        self.end: SampleFinished | SampleFailed | None = None
        """How it ended; the engine knows it no longer."""
        self.end_sent = False
        """Whether that was put on the session's present stream."""
        self.pending = False
        """Whether the outbox has it on its list; also true while muted or in doubt: then nothing puts it there."""
        self.started = False
        """Whether it has made a token."""
        self.cancelled = False
        """Whether the engine was told to end it."""
        self.muted = False
        """Nobody waits for it: nothing of it is sent any more, and its end makes the gate forget it."""

    @property
    def has_output(self) -> bool:
        """Whether the present stream does not have all of it yet."""
        return self.sent < self.total or (self.end is not None and not self.end_sent)

    @property
    def total(self) -> int:
        """Ids that were made, delivered ones included."""
        return self.base + len(self.ids)

    def mute(self) -> None:
        """Nobody waits for it any more."""
        self.muted = self.pending = True

    def acknowledge(self, offset: int) -> None:
        """The service has all ids below ``offset``; numbers that make no sense are ignored."""
        if self.base < offset <= self.sent:
            del self.ids[: offset - self.base]
            self.base = offset

    def resume(self, offset: int) -> bool:
        """A new stream goes on with id ``offset``. False if that id is not here, or is not yet to be expected."""
        if not self.base <= offset <= self.total:
            return False
        self.sent = offset
        self.end_sent = False
        self.acknowledge(offset)
        return True


class Attempt:
    """What one Submit asked for."""

    __slots__ = (
        "attempt_id", "claimed", "first_handle", "in_doubt", "live", "prompt_tokens", "samples", "session", "started",
        "trace",
    )  # fmt: skip

    def __init__(self, session: "Session", attempt_id: bytes, first_handle: int, prompt_tokens: int) -> None:
        self.session = session
        self.attempt_id = attempt_id
        self.first_handle = first_handle
        self.prompt_tokens = prompt_tokens
        self.samples: list[Sample] = []
        self.live = 0
        """Samples that the engine has not ended."""
        self.started = False
        """Whether one of them has made a token."""
        self.claimed = False
        """Whether the service has shown that it knows the handles."""
        self.in_doubt = False
        """Its Accepted may have been lost: nothing is said of it until its Submit comes again."""
        self.trace: AttemptTrace | None = None

    def doubt(self) -> None:
        """The stream was lost before the service showed that it knows of it."""
        self.in_doubt = True
        for sample in self.samples:
            sample.sent, sample.end_sent, sample.pending = sample.base, False, True

    def confirm(self) -> None:
        """Its Submit came again."""
        self.in_doubt = False
        for sample in self.samples:
            sample.pending = sample.muted


class AttemptTable:
    """All samples of the gate by handle. A handle is unique among all sessions until it is forgotten."""

    def __init__(self) -> None:
        self.samples: dict[int, Sample] = {}
        self._attempts = 0
        self._next_handle = 1

    def __len__(self) -> int:
        """Attempts that are not forgotten."""
        return self._attempts

    def create(
        self, session: "Session", attempt_id: bytes, prompt_tokens: int, samples: Iterable[tuple[int, int]]
    ) -> Attempt:
        """A new attempt with samples of the given (index, number of delivered ids); its handles are consecutive."""
        asked = list(samples)
        first = self._free_range(len(asked))
        attempt = Attempt(session, attempt_id, first, prompt_tokens)
        for handle, (index, delivered) in enumerate(asked, first):
            sample = Sample(attempt, handle, index, delivered)
            attempt.samples.append(sample)
            self.samples[handle] = sample
        attempt.live = len(asked)
        self._attempts += 1
        return attempt

    def _free_range(self, count: int) -> int:
        """The first of so many consecutive handles that nobody has. After 2**32 handles it starts anew."""
        first = self._next_handle
        while True:
            if first + count > HANDLES:
                first = 1
            taken = [handle for handle in range(first, first + count) if handle in self.samples]
            if not taken:
                self._next_handle = first + count
                return first
            first = taken[-1] + 1

    def forget(self, sample: Sample) -> bool:
        """The handle is free again. Whether that was the attempt's last sample."""
        del self.samples[sample.handle]
        attempt = sample.attempt
        attempt.samples.remove(sample)
        if attempt.samples:
            return False
        self._attempts -= 1
        return True

    def live(self) -> Iterator[Sample]:
        """Samples that have not ended."""
        return (sample for sample in list(self.samples.values()) if sample.end is None)
