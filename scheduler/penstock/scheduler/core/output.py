"""What the core has to tell the gate since it was last asked."""

from array import array

from penstock.executor.step import StepResult, pack_u32
from penstock.scheduler.core.flight import Flight
from penstock.scheduler.core.sequence import Sequence
from penstock.scheduler.records.events import Finish, Finished, Span, SpanEvent, Step, StepSpan


class Output:
    """Columns of new tokens, ends and span events; ``take`` packs them into one record."""

    __slots__ = ("_traced_step_every", "counts", "finished", "handles", "ids", "offsets", "spans", "steps")

    def __init__(self, traced_step_every: int) -> None:
        """One step in so many is told, if a traced sequence is in it, and each in which one computes known ids."""
        self._traced_step_every = traced_step_every
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

    def refuse(self, handle: int, arrival_ns: int, now: int, why: str) -> None:
        """A sequence failed that never was one."""
        self.finished.append(Finished(handle, int(Finish.FAILED), 0, arrival_ns, 0, 0, now, 0, 0, why))

    def step(self, flight: Flight, result: StepResult, waiting: int, now: int) -> None:
        """A step's result came. Who ended before it is forgotten, and not told of."""
        chunks = [(sequence, rows) for sequence, rows in flight.chunks if sequence.traced and sequence.lives]
        for sequence, rows in chunks:
            self.span(Span.PREFILL, sequence, flight.submitted_ns, now, rows, flight.number)
        if flight.number % self._traced_step_every and not chunks:
            return
        traced = [sequence.handle for sequence in flight.members if sequence.traced and sequence.lives]
        if traced:
            self.steps.append(
                StepSpan(
                    flight.number,
                    flight.submitted_ns,
                    now,
                    flight.plan_ns,
                    result.device_ns,
                    flight.decodes,
                    flight.prefill_rows,
                    len(flight.members),
                    waiting,
                    pack_u32(traced),
                    result.host_ns,
                    flight.repeat,
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
