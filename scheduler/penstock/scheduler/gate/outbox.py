"""What is to be said to one service process: tokens and ends of its samples, and short answers.

Tokens wait in their samples, not here: what is not taken yet merges, and is bounded by each sample's max_tokens. The
list of samples that have something to say is bounded by their number.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from penstock.scheduler.gate.attempts import Sample
from penstock.v1 import ConnectResponse, Outputs, SampleFailed, SampleFinished

MAX_IDS: Final = 1 << 16
"""A message of outputs is closed after the sample that reaches this many: 256 KiB."""
MAX_ANSWERS: Final = 1024
"""Answers that may wait before nothing more is read from the service."""


class Outbox:
    """Of one session; it outlives the session's streams. ``on_output`` is called when there is something to take."""

    __slots__ = ("_answers", "_samples", "on_output", "urgent")

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._answers: deque[ConnectResponse] = deque()
        self.urgent = False
        """Whether a first token or an end is among what waits."""
        self.on_output: Callable[[], None] = nobody_listens

    def add(self, sample: Sample) -> None:
        """The sample, which is not ``pending`` yet, has new tokens or its end; ``on_output`` is left to the caller."""
        sample.pending = True
        self._samples.append(sample)

    def say(self, answer: ConnectResponse) -> None:
        """Answer something; answers go first, in order."""
        self._answers.append(answer)
        self.on_output()

    def clear(self) -> None:
        """The stream is gone: nobody listens, and what waited is forgotten. What is added now waits for another."""
        self.on_output = nobody_listens
        self._answers.clear()
        for sample in self._samples:
            sample.pending = sample.muted
        self._samples = []
        self.urgent = False

    def add_all(self, samples: Iterable[Sample]) -> None:
        """Those of the samples that have something to say, at once."""
        for sample in samples:
            if not sample.pending and sample.has_output:
                self.add(sample)
                self.urgent = True
        self.on_output()

    @property
    def crowded(self) -> bool:
        """Whether so many answers wait that nothing more should be asked."""
        return len(self._answers) >= MAX_ANSWERS

    @property
    def has_output(self) -> bool:
        """Whether a sample has something to say."""
        return bool(self._samples)

    @property
    def empty(self) -> bool:
        """Whether everything was taken."""
        return not self._samples and not self._answers

    def take_answer(self) -> ConnectResponse | None:
        """The oldest answer."""
        return self._answers.popleft() if self._answers else None

    def take_outputs(self) -> Outputs | None:
        """All new tokens and ends, or the first of very many, in columns; None if nobody wants what there was."""
        handles, offsets, counts, ids = array("I"), array("I"), array("I"), array("I")
        ends: list[Sample] = []
        taken = 0
        for sample in self._samples:
            taken += 1
            if sample.muted:
                continue
            sample.pending = False
            sent, base, made = sample.sent, sample.base, sample.ids
            count = base + len(made) - sent
            if count:
                handles.append(sample.handle)
                offsets.append(sent)
                counts.append(count)
                if count == 1:
                    ids.append(made[-1])
                else:
                    ids.extend(made[sent - base :])
                sample.sent = sent + count
            if sample.end is not None:
                ends.append(sample)
            if len(ids) >= MAX_IDS:
                break
        self._taken(taken)
        if not handles and not ends:
            return None
        outputs = Outputs(handles.tobytes(), offsets.tobytes(), counts.tobytes(), ids.tobytes())
        _add_ends(outputs, ends)
        return outputs

    def _taken(self, count: int) -> None:
        """The first samples were taken; what is left is as urgent as it was."""
        if count == len(self._samples):
            self._samples = []
            self.urgent = False
        else:
            del self._samples[:count]


def _add_ends(outputs: Outputs, samples: Iterable[Sample]) -> None:
    for sample in samples:
        if isinstance(sample.end, SampleFinished):
            outputs.finished.append(sample.end)
        elif isinstance(sample.end, SampleFailed):
            outputs.failed.append(sample.end)
        sample.end_sent = True


def nobody_listens() -> None:
    """There is no stream."""
