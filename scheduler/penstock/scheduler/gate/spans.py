"""The scheduler's part of a trace: one span of the gate for each attempt, and under it what its engine tells.

The engine exports nothing. It sends events with CLOCK_MONOTONIC nanoseconds; here they become spans under the engine's
own resource (its process id), with Unix times. A sampled step becomes one ``engine.step`` span, in the trace of one of
the attempts in it; it links to all of them, and their chunks and decodes link to it.
"""

import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from typing import Final

from opentelemetry.trace import Span, SpanContext, Status, StatusCode

from penstock.scheduler.gate.attempts import Sample
from penstock.scheduler.records import events
from penstock.telemetry.tracing import SpanEmitter, SpanEvent, Tracing, as_context, child_of, parse_traceparent
from penstock.v1 import SampleFailed

LINKED_STEPS: Final = 32
"""A decode links to the latest so many sampled steps."""
CLOCK_STEP_NS: Final = 1_000_000
"""Two clocks that are read one after the other differ by less, unless one of them was set."""

_NAMES: Final = {events.Span.QUEUED: "queue", events.Span.PREFILL: "prefill", events.Span.DECODE: "decode"}
_MOMENTS: Final = {events.Span.FIRST_TOKEN: "first_token", events.Span.PREEMPTED: "preempted"}


class AttemptTrace:
    """The gate's span of an attempt, and what is collected for the spans below it."""

    __slots__ = ("context", "moments", "preemptions", "span", "steps")

    def __init__(self, span: Span) -> None:
        self.span = span
        self.context = span.get_span_context()
        self.moments: list[SpanEvent] = []
        """What happened since the last span of the engine: they are events of the next one."""
        self.steps: deque[SpanContext] = deque(maxlen=LINKED_STEPS)
        """Sampled steps since the last decode."""
        self.preemptions = 0

    def take_moments(self) -> list[SpanEvent]:
        """The moments so far."""
        moments, self.moments = self.moments, []
        return moments

    def take_steps(self) -> list[SpanContext]:
        """The steps so far."""
        steps = list(self.steps)
        self.steps.clear()
        return steps


class Spans:
    """Makes all spans of a gate. Without an endpoint it costs nothing."""

    def __init__(self, tracing: Tracing, samples: Mapping[int, Sample]) -> None:
        self._tracing = tracing
        self._tracer = tracing.tracer("penstock.scheduler.gate")
        self._samples = samples
        self._engine: SpanEmitter = tracing.for_resource("penstock-engine", 0)
        self._offset = 0

    def engine_started(self, pid: int) -> None:
        """The engine's spans belong to that process."""
        self._engine = self._tracing.for_resource("penstock-engine", pid)

    def begin(self, traceparent: str, arrival_ns: int, attributes: Mapping[str, str | int]) -> AttemptTrace | None:
        """The span of an attempt whose caller's trace is sampled; None for any other.

        It begins with the attempt's arrival (CLOCK_MONOTONIC), as the engine's first span of it does.
        """
        parent = parse_traceparent(traceparent) if self._tracing.enabled else None
        if parent is None or not parent.trace_flags.sampled:
            return None
        span = self._tracer.start_span(
            "scheduler.request",
            context=as_context(parent),
            attributes=dict(attributes),
            start_time=arrival_ns + self._unix_offset(),
        )
        return AttemptTrace(span) if span.is_recording() else None

    def end(self, trace: AttemptTrace, sample: Sample) -> None:
        """The attempt's last sample has ended."""
        span = trace.span
        span.set_attribute("penstock.preemptions", trace.preemptions)
        span.set_attribute("penstock.output_tokens", sample.total)
        if isinstance(sample.end, SampleFailed):
            failure = sample.end.failure
            span.set_status(Status(StatusCode.ERROR, failure.reason.name if failure is not None else None))
        span.end(time.monotonic_ns() + self._unix_offset())

    def take(self, step: events.Step) -> None:
        """Export what a record tells; it comes before the ends of the same record are handled."""
        if not self._engine.enabled:
            return
        offset = self._unix_offset()
        steps = self._place_steps(step.steps)
        for event in _moments_first(step.spans):
            self._take_event(event, steps, offset)
        for told in step.steps:
            if told.step in steps:
                self._emit_step(told, steps[told.step], offset)

    def _unix_offset(self) -> int:
        """Unix time minus CLOCK_MONOTONIC; the same for all records, so that what is one moment stays one."""
        now = time.time_ns() - time.monotonic_ns()
        if abs(now - self._offset) > CLOCK_STEP_NS:
            self._offset = now
        return self._offset

    def _trace_of(self, handle: int) -> AttemptTrace | None:
        sample = self._samples.get(handle)
        return None if sample is None else sample.attempt.trace

    def _traces_of(self, told: events.StepSpan) -> list[AttemptTrace]:
        handles = memoryview(told.handles).cast("I")
        return [trace for handle in handles if (trace := self._trace_of(handle)) is not None]

    def _place_steps(self, told: tuple[events.StepSpan, ...]) -> dict[int, tuple[SpanContext, SpanContext]]:
        """For each step its span and that span's parent; the attempts take turns in being the parent."""
        placed = {}
        for step in told:
            traces = self._traces_of(step)
            if not traces:
                continue
            parent = traces[step.step % len(traces)].context
            placed[step.step] = (child_of(parent), parent)
            for trace in traces:
                trace.steps.append(placed[step.step][0])
        return placed

    def _take_event(
        self, event: events.SpanEvent, steps: Mapping[int, tuple[SpanContext, SpanContext]], offset: int
    ) -> None:
        trace = self._trace_of(event.handle)
        if trace is None:
            return
        kind = events.Span(event.kind)
        if kind in _MOMENTS:
            trace.preemptions += kind is events.Span.PREEMPTED
            trace.moments.append(_moment(event, offset))
        else:
            self._emit(event, kind, trace, steps, offset)

    def _emit(
        self,
        event: events.SpanEvent,
        kind: events.Span,
        trace: AttemptTrace,
        steps: Mapping[int, tuple[SpanContext, SpanContext]],
        offset: int,
    ) -> None:
        links = [steps[event.step][0]] if event.step in steps and kind is events.Span.PREFILL else []
        if kind is events.Span.DECODE:
            links = trace.take_steps()
        self._engine.emit(
            _NAMES[kind],
            context=child_of(trace.context),
            parent=trace.context,
            start_unix_ns=event.start_ns + offset,
            end_unix_ns=event.end_ns + offset,
            attributes=_attributes(event, kind),
            events=trace.take_moments(),
            links=links,
        )

    def _emit_step(self, told: events.StepSpan, place: tuple[SpanContext, SpanContext], offset: int) -> None:
        context, parent = place
        self._engine.emit(
            "engine.step",
            context=context,
            parent=parent,
            start_unix_ns=told.start_ns + offset,
            end_unix_ns=told.end_ns + offset,
            attributes={
                "penstock.step": told.step,
                "penstock.plan_us": told.plan_ns // 1000,
                "penstock.launch_us": told.launch_ns // 1000,
                "penstock.device_us": told.device_ns // 1000,
                "penstock.repeat": told.repeat,
                "penstock.decode_rows": told.decode_rows,
                "penstock.prefill_rows": told.prefill_rows,
                "penstock.sequences": told.sequences,
                "penstock.waiting": told.waiting,
            },
            links=[trace.context for trace in self._traces_of(told)],
        )


def _moments_first(spans: tuple[events.SpanEvent, ...]) -> list[events.SpanEvent]:
    """The spans in order, but a preemption before the decode that it ended: it is an event of that."""
    ordered = list(spans)
    for at, (first, second) in enumerate(pairwise(spans)):
        same = first.handle == second.handle
        if same and first.kind == events.Span.DECODE and second.kind == events.Span.PREEMPTED:
            ordered[at], ordered[at + 1] = second, first
    return ordered


def _attributes(event: events.SpanEvent, kind: events.Span) -> dict[str, int]:
    attributes = {"penstock.step": event.step} if event.step else {}
    if kind is not events.Span.QUEUED:
        attributes["penstock.tokens"] = event.number
    return attributes


def _moment(event: events.SpanEvent, offset: int) -> SpanEvent:
    """An event of a span. What is preempted computes its tokens again: the only mode there is."""
    about: dict[str, str | int] = {}
    if event.kind == events.Span.PREEMPTED:
        about = {"by": event.cause, "mode": "recompute", "cost": event.number}
    elif event.step:
        about = {"penstock.step": event.step}
    return _MOMENTS[events.Span(event.kind)], event.start_ns + offset, about
