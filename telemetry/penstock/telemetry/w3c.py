"""W3C Trace Context (https://www.w3.org/TR/trace-context/): `traceparent`, `tracestate` in gRPC metadata."""

import random
import re
from collections.abc import Iterable

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

Metadata = Iterable[tuple[str, str | bytes]]

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_KNOWN_FLAGS = TraceFlags.SAMPLED | TraceFlags.RANDOM_TRACE_ID
_MAX_TRACEPARENT_CHARS = 512


def new_span_id() -> int:
    """A random span id, never zero."""
    return random.getrandbits(64) or 1


def child_of(parent: SpanContext) -> SpanContext:
    """A new span's context in the parent's trace, with its flags and state."""
    return SpanContext(
        parent.trace_id,
        new_span_id(),
        is_remote=False,
        trace_flags=parent.trace_flags,
        trace_state=parent.trace_state,
    )


def parse_traceparent(header: str | None) -> SpanContext | None:
    """The span context that a `traceparent` names, or None if it is absent or not valid.

    Strict as the specification has it: lower-case hexadecimal, no zero ids, no version `ff`, nothing behind
    the flags in version `00`; a later version may append fields behind a dash, which are ignored.
    """
    if header is None or len(header) > _MAX_TRACEPARENT_CHARS:
        return None
    match = _TRACEPARENT.fullmatch(header)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    context = SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(flags, 16) & _KNOWN_FLAGS),
    )
    return context if context.is_valid else None


def format_traceparent(context: SpanContext) -> str:
    """The `traceparent` (version `00`) of a span. Raises ValueError if an id is zero or out of range."""
    if not context.is_valid:
        raise ValueError("an invalid span context has no traceparent")
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & _KNOWN_FLAGS:02x}"


def extract(metadata: Metadata) -> SpanContext | None:
    """The remote parent named in a call's metadata; None if it is absent, invalid or given twice."""
    pairs = [(name.lower(), _text(value)) for name, value in metadata]
    parents = [value for name, value in pairs if name == "traceparent"]
    parent = parse_traceparent(parents[0]) if len(parents) == 1 else None
    states = [value for name, value in pairs if name == "tracestate"]
    if parent is None or not states:
        return parent
    return SpanContext(
        parent.trace_id,
        parent.span_id,
        is_remote=True,
        trace_flags=parent.trace_flags,
        trace_state=TraceState.from_header(states),
    )


def inject(metadata: Metadata = (), span: SpanContext | None = None) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata with the trace context of `span` (default: the current span) in place of any it had.

    Without a valid span the metadata is returned as it is.
    """
    context = trace.get_current_span().get_span_context() if span is None else span
    if not context.is_valid:
        return tuple(metadata)
    kept = [(name, value) for name, value in metadata if name.lower() not in ("traceparent", "tracestate")]
    kept.append(("traceparent", format_traceparent(context)))
    if context.trace_state:
        kept.append(("tracestate", context.trace_state.to_header()))
    return tuple(kept)


def as_context(parent: SpanContext | None) -> Context:
    """A context for `tracer.start_span(context=…)`: children of `parent`, or a root where it is None."""
    return Context() if parent is None else trace.set_span_in_context(NonRecordingSpan(parent), Context())


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
