"""The spans of a call: below the caller's, and never with text in them."""

import asyncio

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, Tracer

from penstock.rpc.errors import RpcError
from penstock.telemetry.tracing import SpanEmitter, parse_traceparent
from penstock.v1 import StreamRequest
from service.fake_scheduler import FakeScheduler, says
from service.harness import request, serving, stream, until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Recording:
    """A `Tracing` that keeps its spans."""

    enabled = True

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self._provider = TracerProvider(shutdown_on_exit=False)
        self._provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def tracer(self, name: str) -> Tracer:
        return self._provider.get_tracer(name)

    def for_resource(self, service_name: str, pid: int) -> SpanEmitter:
        raise NotImplementedError

    def force_flush(self, timeout_s: float = 5.0) -> bool:
        return True

    def shutdown(self, timeout_s: float = 2.0) -> bool:
        return True

    def span(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.exporter.get_finished_spans() if span.name == name]
        return found


@pytest.fixture
def recording() -> Recording:
    return Recording()


def test_a_stream_s_spans(recording: Recording) -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says("private"))
        async with serving(scheduler, tracing=recording) as running:
            await stream(running, request("secret"), metadata=[("traceparent", PARENT)])
            await until(lambda: len(recording.exporter.get_finished_spans()) == 3)
        server = recording.span("penstock.v1.GenerationService/Stream")
        parent = parse_traceparent(PARENT)
        assert parent is not None
        assert server.parent is not None
        assert server.context is not None
        assert (server.parent.span_id, server.context.trace_id) == (parent.span_id, parent.trace_id)
        assert server.kind is SpanKind.SERVER
        attributes = dict(server.attributes or {})
        assert attributes["gen_ai.request.model"] == "tiny"
        assert attributes["gen_ai.usage.input_tokens"] == 6
        assert attributes["gen_ai.usage.output_tokens"] == 8
        assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
        assert attributes["rpc.grpc.status_code"] == 0
        for name in ("tokenize", "route"):
            child = recording.span(name)
            assert child.parent is not None
            assert child.parent.span_id == server.context.span_id
        submitted = parse_traceparent(scheduler.submits[0].traceparent)
        assert submitted is not None
        assert (submitted.trace_id, submitted.span_id) == (parent.trace_id, server.context.span_id)
        for span in recording.exporter.get_finished_spans():
            assert "secret" not in span.to_json()
            assert "private" not in span.to_json()

    asyncio.run(scenario())


def test_a_failed_call_s_span(recording: Recording) -> None:
    async def scenario() -> None:
        async with serving(FakeScheduler(), tracing=recording) as running:
            with pytest.raises(RpcError):
                await running.generation.generate(request(top_p=0.0))
            await until(lambda: len(recording.exporter.get_finished_spans()) == 2)
        server = recording.span("penstock.v1.GenerationService/Generate")
        assert server.parent is None
        assert dict(server.attributes or {})["rpc.grpc.status_code"] == 3
        assert not server.status.is_ok
        assert server.status.description == "INVALID_REQUEST"
        assert server.events == ()

    asyncio.run(scenario())


@pytest.mark.parametrize(("timeout_s", "code"), [(1.001, 4), (60.0, 1)])
def test_a_call_that_its_caller_ends(recording: Recording, timeout_s: float, code: int) -> None:
    """At its deadline or before it: 4 DEADLINE_EXCEEDED, 1 CANCELLED."""

    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says("x" * 1000), period_s=0.01)
        async with serving(scheduler, tracing=recording) as running:
            call = running.generation.stream(StreamRequest(request(max_tokens=1000)), timeout=timeout_s)
            asyncio.get_running_loop().call_later(1.5, call.cancel)
            with pytest.raises((RpcError, asyncio.CancelledError)):
                async for _ in call:
                    pass
            await until(lambda: len(recording.exporter.get_finished_spans()) == 3)
        server = recording.span("penstock.v1.GenerationService/Stream")
        assert dict(server.attributes or {})["rpc.grpc.status_code"] == code
        assert server.status.description == {4: "DEADLINE", 1: "CANCELLED"}[code]

    asyncio.run(scenario())


def test_without_an_endpoint_the_trace_still_travels() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        async with serving(scheduler) as running:
            await stream(running, request(), metadata=[("traceparent", PARENT)])
            await stream(running, request())
        assert scheduler.submits[0].traceparent == PARENT
        assert scheduler.submits[1].traceparent == ""

    asyncio.run(scenario())
