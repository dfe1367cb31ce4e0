"""The client's span, and the trace that the service is asked to continue."""

import re
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags, Tracer

from penstock.client import AsyncClient, Client, RpcError

PARENT = SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


class Recorded:
    """A tracer and the spans that it has ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = provider.get_tracer("test")

    @property
    def only(self) -> ReadableSpan:
        (span,) = self._exporter.get_finished_spans()
        return span


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def context_of(span: ReadableSpan) -> SpanContext:
    context: SpanContext | None = span.context
    assert context is not None
    return context


def traceparent(span: ReadableSpan) -> str:
    context = context_of(span)
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


def test_the_service_continues_the_span(address: str, service: Any, recorded: Recorded) -> None:
    with Client(address, tracer=recorded.tracer) as client:
        completion = client.generate("x", request_id="r")
    span = recorded.only
    assert (span.name, span.kind, span.parent) == ("penstock.client/Generate", SpanKind.CLIENT, None)
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[13]", service.metadata[0]["traceparent"])
    assert service.metadata[0]["traceparent"][:52] == traceparent(span)[:52]
    assert completion.trace_id == f"{context_of(span).trace_id:032x}"
    assert dict(span.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "penstock.v1.GenerationService",
        "rpc.method": "Generate",
        "penstock.request_id": "r",
        "gen_ai.response.model": "fake",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
    }


async def test_the_span_of_a_stream_is_as_long_as_the_stream(address: str, service: Any, recorded: Recorded) -> None:
    async with AsyncClient(address, tracer=recorded.tracer) as client:
        stream = client.stream("x")
        await anext(stream)
        with pytest.raises(ValueError, match="not enough values"):
            _ = recorded.only
        assert [chunk.text async for chunk in stream] == ["i!", ""]
    span = recorded.only
    assert span.name == "penstock.client/Stream"
    assert [event.name for event in span.events] == ["first_token"]
    assert service.metadata[0]["traceparent"][:52] == traceparent(span)[:52]
    assert stream.trace_id == stream.completion.trace_id == f"{context_of(span).trace_id:032x}"


def test_a_failure_is_on_the_span(address: str, recorded: Recorded) -> None:
    with Client(address, tracer=recorded.tracer) as client, pytest.raises(RpcError):
        client.generate("busy")
    assert recorded.only.status.status_code is StatusCode.ERROR
    assert (recorded.only.attributes or {})["error.type"] == "QUEUE_FULL"


def test_leaving_is_no_failure(address: str, recorded: Recorded) -> None:
    with Client(address, tracer=recorded.tracer) as client, client.stream("slow") as stream:
        next(stream)
    assert recorded.only.status.status_code is StatusCode.UNSET
    assert (recorded.only.attributes or {})["penstock.cancelled"] is True


def test_a_request_that_cannot_be_sent_ends_its_span(recorded: Recorded) -> None:
    with Client("127.0.0.1:1", tracer=recorded.tracer) as client, pytest.raises(RpcError):
        client.stream("x", seed=-1)
    assert recorded.only.status.status_code is StatusCode.ERROR


def test_the_callers_span_is_the_parent(address: str, service: Any, recorded: Recorded) -> None:
    with Client(address, tracer=recorded.tracer) as client, trace.use_span(NonRecordingSpan(PARENT)):
        client.generate("x")
    assert recorded.only.parent == PARENT
    assert service.metadata[0]["traceparent"].startswith(f"00-{0xABC:032x}-")


def test_without_an_sdk_the_callers_trace_still_travels(address: str, service: Any) -> None:
    with Client(address) as client, trace.use_span(NonRecordingSpan(PARENT)):
        completion = client.generate("x")
        client.models()
    assert service.metadata[0]["traceparent"] == f"00-{0xABC:032x}-{0xDEF:016x}-01"
    assert completion.trace_id == f"{0xABC:032x}"


def test_without_any_trace_nothing_is_sent(address: str, service: Any) -> None:
    with Client(address) as client:
        assert client.generate("x").trace_id == ""
    assert "traceparent" not in service.metadata[0]
