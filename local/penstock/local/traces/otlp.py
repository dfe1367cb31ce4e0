"""Between OTLP trace messages and plain spans."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2

from penstock.local.traces.spans import Attribute, Kind, Scalar, Span, SpanEvent, Status

_KINDS: tuple[Kind, ...] = ("internal", "internal", "server", "client", "producer", "consumer")
_STATUSES: tuple[Status, ...] = ("unset", "ok", "error")
_TRACE_ID_BYTES = 16
_SPAN_ID_BYTES = 8


def decode(request: ExportTraceServiceRequest) -> Iterator[tuple[Span, int] | None]:
    """Each span with the bytes it took on the wire; None for a span whose ids are not valid."""
    for of_resource in request.resource_spans:
        resource = _attributes(of_resource.resource.attributes)
        resource_bytes = of_resource.resource.ByteSize()
        for of_scope in of_resource.scope_spans:
            for message in of_scope.spans:
                span = _span(message, resource)
                yield None if span is None else (span, message.ByteSize() + resource_bytes)


def encode(spans: Iterable[Span]) -> ExportTraceServiceRequest:
    """The spans as one export request, one ResourceSpans for each run of spans of one process."""
    groups = groupby(spans, key=lambda span: span.resource)
    return ExportTraceServiceRequest(
        resource_spans=[
            trace_pb2.ResourceSpans(
                resource=Resource(attributes=_key_values(resource)),
                scope_spans=[trace_pb2.ScopeSpans(spans=[_message(span) for span in group])],
            )
            for resource, group in groups
        ]
    )


def _span(message: trace_pb2.Span, resource: dict[str, Attribute]) -> Span | None:
    if not (_is_id(message.trace_id, _TRACE_ID_BYTES) and _is_id(message.span_id, _SPAN_ID_BYTES)):
        return None
    if message.parent_span_id and len(message.parent_span_id) != _SPAN_ID_BYTES:
        return None
    pid = resource.get("process.pid")
    return Span(
        trace_id=message.trace_id.hex(),
        span_id=message.span_id.hex(),
        parent_id=message.parent_span_id.hex() if any(message.parent_span_id) else None,
        name=message.name,
        start_ns=message.start_time_unix_nano,
        end_ns=message.end_time_unix_nano,
        service=str(resource.get("service.name", "unknown")),
        pid=pid if isinstance(pid, int) else None,
        kind=_KINDS[message.kind] if 0 <= message.kind < len(_KINDS) else "internal",
        attributes=_attributes(message.attributes),
        events=tuple(
            SpanEvent(name=event.name, unix_ns=event.time_unix_nano, attributes=_attributes(event.attributes))
            for event in message.events
        ),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in message.links),
        status=_STATUSES[message.status.code] if 0 <= message.status.code < len(_STATUSES) else "unset",
        status_message=message.status.message,
        resource=resource,
    )


def _is_id(raw: bytes, length: int) -> bool:
    return len(raw) == length and any(raw)


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Attribute]:
    return {pair.key: _attribute(pair.value) for pair in pairs}


def _attribute(value: AnyValue) -> Attribute:
    if value.WhichOneof("value") == "array_value":
        return [_scalar(element) for element in value.array_value.values]
    return _scalar(value)


def _scalar(value: AnyValue) -> Scalar:
    """A single value; what is nested deeper becomes its JSON text, bytes their hexadecimal digits."""
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "int_value":
            return value.int_value
        case "double_value":
            return value.double_value
        case "bytes_value":
            return value.bytes_value.hex()
        case "kvlist_value":
            return json.dumps(_attributes(value.kvlist_value.values))
        case "array_value":
            return json.dumps([_attribute(element) for element in value.array_value.values])
        case _:
            return ""


def _message(span: Span) -> trace_pb2.Span:
    return trace_pb2.Span(
        trace_id=bytes.fromhex(span.trace_id),
        span_id=bytes.fromhex(span.span_id),
        parent_span_id=bytes.fromhex(span.parent_id or ""),
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Value(f"SPAN_KIND_{span.kind.upper()}"),
        start_time_unix_nano=span.start_ns,
        end_time_unix_nano=span.end_ns,
        attributes=_key_values(span.attributes),
        events=[
            trace_pb2.Span.Event(
                name=event.name, time_unix_nano=event.unix_ns, attributes=_key_values(event.attributes)
            )
            for event in span.events
        ],
        links=[
            trace_pb2.Span.Link(trace_id=bytes.fromhex(trace_id), span_id=bytes.fromhex(span_id))
            for trace_id, span_id in span.links
        ],
        status=trace_pb2.Status(
            code=trace_pb2.Status.StatusCode.Value(f"STATUS_CODE_{span.status.upper()}"),
            message=span.status_message,
        ),
    )


def _key_values(attributes: Mapping[str, Attribute]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_any(value)) for key, value in attributes.items()]


def _any(value: Attribute) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case str():
            return AnyValue(string_value=value)
        case _:
            return AnyValue(array_value=ArrayValue(values=[_any(element) for element in value]))
