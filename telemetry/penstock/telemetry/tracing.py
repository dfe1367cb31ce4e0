"""Traces for every role: out by OTLP over gRPC when an endpoint is configured, free of cost when not.

A role's main calls `configure` once, hands the `Tracing` to whatever makes spans, and shuts it down at the
end. Spans are per request, chunk or sampled step, never per token. The engine exports nothing itself: the
gate emits the engine's spans from its events, under the engine's own resource (`Tracing.for_resource`).
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from opentelemetry.trace import Link, NoOpTracer, SpanContext, SpanKind, Status, Tracer

from penstock.telemetry.w3c import (
    Metadata,
    as_context,
    child_of,
    extract,
    format_traceparent,
    inject,
    new_span_id,
    parse_traceparent,
)

__all__ = [
    "AttributeValue",
    "Attributes",
    "Metadata",
    "SpanEmitter",
    "SpanEvent",
    "Tracing",
    "as_context",
    "child_of",
    "configure",
    "extract",
    "format_traceparent",
    "inject",
    "new_span_id",
    "parse_traceparent",
]

AttributeValue = str | bool | int | float | Sequence[str] | Sequence[int]
Attributes = Mapping[str, AttributeValue]
SpanEvent = tuple[str, int, Attributes]
"""Name, Unix time in nanoseconds, attributes."""


class SpanEmitter(Protocol):
    """Exports finished spans measured elsewhere, under the resource of the process that did the work."""

    @property
    def enabled(self) -> bool:
        """Whether emitted spans go anywhere; lets a caller skip the work of preparing them."""
        ...

    def emit(
        self,
        name: str,
        *,
        context: SpanContext,
        parent: SpanContext | None,
        start_unix_ns: int,
        end_unix_ns: int,
        attributes: Attributes | None = None,
        events: Sequence[SpanEvent] = (),
        links: Sequence[Link | SpanContext] = (),
        kind: SpanKind = SpanKind.INTERNAL,
        status: Status | None = None,
    ) -> None:
        """Queue one finished span; it never blocks. A context that is not sampled is ignored.

        `context` carries the span's own ids (`child_of(parent)` makes fresh ones). An end before the start,
        which clocks of two processes can produce, is exported as a span without duration.
        """
        ...


class Tracing(Protocol):
    """This process's way out for spans."""

    @property
    def enabled(self) -> bool:
        """Whether an endpoint is configured."""
        ...

    def tracer(self, name: str) -> Tracer:
        """The tracer of the instrumented part `name`. Spans belong to this process's resource."""
        ...

    def for_resource(self, service_name: str, pid: int) -> SpanEmitter:
        """An emitter of spans that another process measured. Keep it: each call describes a new resource."""
        ...

    def force_flush(self, timeout_s: float = 5.0) -> bool:
        """Send what is queued; blocks. False if that took longer than `timeout_s`."""
        ...

    def shutdown(self, timeout_s: float = 2.0) -> bool:
        """Send what is queued and stop; blocks at most about `timeout_s`. False if spans were left behind."""
        ...


class _EmitNothing:
    enabled = False

    def emit(
        self,
        name: str,
        *,
        context: SpanContext,
        parent: SpanContext | None,
        start_unix_ns: int,
        end_unix_ns: int,
        attributes: Attributes | None = None,
        events: Sequence[SpanEvent] = (),
        links: Sequence[Link | SpanContext] = (),
        kind: SpanKind = SpanKind.INTERNAL,
        status: Status | None = None,
    ) -> None:
        return


class _TracingOff:
    """No endpoint: spans are not recorded, but a caller's trace context still travels on."""

    enabled = False

    def tracer(self, name: str) -> Tracer:
        return NoOpTracer()

    def for_resource(self, service_name: str, pid: int) -> SpanEmitter:
        return _EmitNothing()

    def force_flush(self, timeout_s: float = 5.0) -> bool:
        return True

    def shutdown(self, timeout_s: float = 2.0) -> bool:
        return True


def configure(
    role: str, *, endpoint: str | None, sample_ratio: float = 1.0, service_instance: str | None = None
) -> Tracing:
    """The tracing of this process, whose `service.name` becomes `penstock-{role}`.

    `endpoint` is `host:port` or a URL; plaintext for `http://` and on loopback, TLS otherwise; None or ""
    turns tracing off. `sample_ratio` (0 to 1) decides for new traces only: the flag of a parent is
    honoured. Raises ValueError for a ratio or an endpoint that makes no sense.
    """
    if not 0.0 <= sample_ratio <= 1.0:
        raise ValueError(f"sample_ratio must be between 0 and 1, not {sample_ratio}")
    if not endpoint:
        return _TracingOff()
    from penstock.telemetry.otlp import OtlpTracing  # the SDK and its exporter load only here

    return OtlpTracing(f"penstock-{role}", endpoint, sample_ratio, service_instance)
