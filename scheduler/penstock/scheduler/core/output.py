"""What the core has to tell the gate since it was last asked."""

from array import array

from penstock.scheduler.core.sequence import Sequence
from penstock.scheduler.records.events import Finish, Finished, Span, SpanEvent, Step, StepSpan


class Output:
    """Columns of new tokens, ends and span events; ``take`` packs them into one record."""

    __slots__ = ("counts", "finished", "handles", "ids", "offsets", "spans", "steps")

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.handles = array("I")
        self.offsets = array("I")
        self.counts = bytearray()
        self.ids = array("I")
        self.finished: list[Finished] = []
        self.spans: list[SpanEvent] = []
        self.steps: list[StepSpan] = []

    def __bool__(self) -> bool:
        return bool(self.handles or self.finished or self.spans or self.steps)

    def end(self, sequence: Sequence, reason: Finish, now: int, detail: str) -> None:
        """A sequence ended."""
        self.finished.append(
            Finished(
                sequence.handle,
                int(reason),
                sequence.output_tokens,
                sequence.arrival_ns,
                sequence.started_ns,
                sequence.first_token_ns,
                now,
                0,
                sequence.preemptions,
                detail,
            )
        )

    def span(
        self, kind: Span, sequence: Sequence, start: int, end: int, number: int = 0, step: int = 0, cause: str = ""
    ) -> None:
        """Something happened to a traced sequence."""
        self.spans.append(SpanEvent(int(kind), sequence.handle, start, end, number, step, cause))

    def take(self) -> Step:
        """Everything so far, as one record."""
        record = Step(
            self.handles.tobytes(),
            self.offsets.tobytes(),
            bytes(self.counts),
            self.ids.tobytes(),
            tuple(self.finished),
            tuple(self.spans),
            tuple(self.steps),
        )
        self._clear()
        return record
