import asyncio
import io
import time
from collections.abc import Awaitable, Callable

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.trace import SpanKind

from penstock.local.traces import otlp, query
from penstock.local.traces.receiver import TraceReceiver
from penstock.local.traces.spans import Span, SpanEvent
from penstock.local.traces.store import TraceStore
from penstock.telemetry import tracing

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
NOW = 1_700_000_000_000_000_000


def with_receiver(test: Callable[[TraceReceiver], Awaitable[None]], store: TraceStore | None = None) -> None:
    async def main() -> None:
        async with asyncio.timeout(20), TraceReceiver(store) as receiver:
            await test(receiver)

    asyncio.run(main())


async def export(receiver: TraceReceiver, payload: bytes) -> ExportTraceServiceResponse:
    async with grpc.aio.insecure_channel(receiver.address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(EXPORT)
        answer = await call(payload, timeout=5)
    return ExportTraceServiceResponse.FromString(answer)


def one_span(trace: int = 1, parent: str | None = None) -> Span:
    return Span(
        trace_id=f"{trace:032x}",
        span_id=f"{7:016x}",
        parent_id=parent,
        name="Stream",
        start_ns=NOW,
        end_ns=NOW + 5,
        service="penstock-service",
        pid=12,
        kind="server",
        attributes={"s": "x", "b": True, "i": -3, "f": 0.5, "list": ["a", "b"]},
        events=(SpanEvent(name="first_token", unix_ns=NOW + 1, attributes={"n": 1}),),
        links=((f"{2:032x}", f"{3:016x}"),),
        status="error",
        status_message="no",
        resource={"service.name": "penstock-service", "process.pid": 12, "zone": "z"},
    )


def test_what_is_exported_can_be_fetched() -> None:
    async def test(receiver: TraceReceiver) -> None:
        spans = [one_span(), one_span(2)]
        response = await export(receiver, otlp.encode(spans).SerializeToString())
        assert response.partial_success.rejected_spans == 0
        for trace_id, expected in ((f"{1:032X}", spans[0]), (f"{2:032x}", spans[1]), ("", spans[1])):
            assert await asyncio.to_thread(query.fetch, receiver.address, trace_id) == (expected,)
        newest, older = await asyncio.to_thread(query.recent, receiver.address)
        assert (newest.trace_id, older.trace_id) == (spans[1].trace_id, spans[0].trace_id)
        assert (newest.root, newest.spans, newest.complete) == ("Stream", 1, True)

    with_receiver(test)


def test_a_role_and_the_engine_it_speaks_for_arrive_as_one_tree() -> None:
    async def test(receiver: TraceReceiver) -> None:
        gate = tracing.configure("gate", endpoint=receiver.address)
        engine = gate.for_resource("penstock-engine", 4242)
        with gate.tracer("t").start_as_current_span("scheduler.request", kind=SpanKind.SERVER) as request:
            parent = request.get_span_context()
            queue, now = tracing.child_of(parent), time.time_ns()
            engine.emit("queue", context=queue, parent=parent, start_unix_ns=now, end_unix_ns=now + 9)
        assert await asyncio.to_thread(gate.shutdown, 5.0)
        spans = {span.name: span for span in await asyncio.to_thread(query.fetch, receiver.address)}
        assert spans["queue"].parent_id == spans["scheduler.request"].span_id
        assert (spans["queue"].service, spans["queue"].pid) == ("penstock-engine", 4242)
        assert spans["scheduler.request"].service == "penstock-gate"

    with_receiver(test)


def test_malformed_payloads_harm_nobody() -> None:
    async def test(receiver: TraceReceiver) -> None:
        good = otlp.encode([one_span()]).SerializeToString()
        for bad in (b"\xff\xff\xff", good[:-3], b"\x0a\x05garbage"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await export(receiver, bad)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(receiver.store) == 0
        await export(receiver, good)
        assert len(receiver.store) == 1

    with_receiver(test)


def test_spans_with_wrong_ids_are_rejected_and_counted() -> None:
    async def test(receiver: TraceReceiver) -> None:
        request = otlp.encode([one_span(), one_span(2), one_span(3), one_span(4)])
        spans = request.resource_spans[0].scope_spans[0].spans
        spans[0].trace_id = b"short"
        spans[1].span_id = bytes(8)
        spans[2].parent_span_id = b"odd"
        response = await export(receiver, request.SerializeToString())
        assert response.partial_success.rejected_spans == 3
        assert [summary.trace_id for summary in receiver.store.recent(9)] == [f"{4:032x}"]

    with_receiver(test)


def test_any_attribute_value_is_read() -> None:
    deep = AnyValue(kvlist_value=KeyValueList(values=[KeyValue(key="k", value=AnyValue(array_value=ArrayValue()))]))
    message = trace_pb2.Span(
        trace_id=b"t" * 16,
        span_id=b"s" * 8,
        kind=99,  # type: ignore[arg-type]
        attributes=[
            KeyValue(key="bytes", value=AnyValue(bytes_value=b"\x01\xff")),
            KeyValue(key="nothing", value=AnyValue()),
            KeyValue(key="deep", value=deep),
            KeyValue(key="list", value=AnyValue(array_value=ArrayValue(values=[deep]))),
        ],
    )
    scope = trace_pb2.ScopeSpans(spans=[message])
    request = ExportTraceServiceRequest(resource_spans=[trace_pb2.ResourceSpans(scope_spans=[scope])])
    (decoded,) = otlp.decode(request)
    assert decoded is not None
    assert decoded[0].attributes == {
        "bytes": "01ff",
        "nothing": "",
        "deep": '{"k": []}',
        "list": ['{"k": []}'],
    }
    assert (decoded[0].kind, decoded[0].service, decoded[0].pid) == ("internal", "unknown", None)


def test_questions_about_what_is_not_there() -> None:
    async def test(receiver: TraceReceiver) -> None:
        for trace_id in ("", "ab", "\xff", "f" * 32):
            with pytest.raises(query.TraceNotFound):
                await asyncio.to_thread(query.fetch, receiver.address, trace_id)
        assert await asyncio.to_thread(query.recent, receiver.address) == []

    with_receiver(test)


def test_a_receiver_that_is_gone_is_said_to_be() -> None:
    async def test(receiver: TraceReceiver) -> None:
        await receiver.stop()
        with pytest.raises(query.ReceiverUnavailable, match=receiver.address):
            await asyncio.to_thread(query.fetch, receiver.address, timeout_s=2.0)

    with_receiver(test)


def test_wait_for_sees_spans_that_come_later() -> None:
    async def test(receiver: TraceReceiver) -> None:
        def ask(timeout_s: float) -> tuple[Span, ...]:
            trace_id = one_span().trace_id
            return query.wait_for(receiver.address, trace_id, lambda spans: len(spans) == 2, timeout_s=timeout_s)

        with pytest.raises(query.TraceNotFound):
            await asyncio.to_thread(ask, 0.1)
        receiver.store.add(one_span(), 1)
        assert len(await asyncio.to_thread(ask, 0.1)) == 1
        waiting = asyncio.create_task(asyncio.to_thread(ask, 10.0))
        await asyncio.sleep(0.1)
        await export(receiver, otlp.encode([second_span()]).SerializeToString())
        assert len(await waiting) == 2

    with_receiver(test)


def second_span() -> Span:
    return Span(
        trace_id=f"{1:032x}",
        span_id=f"{8:016x}",
        parent_id=f"{7:016x}",
        name="route",
        start_ns=NOW,
        end_ns=NOW,
        resource={"service.name": "penstock-gate"},
    )


def test_show_draws_in_plain_text_for_a_file() -> None:
    async def test(receiver: TraceReceiver) -> None:
        receiver.store.add(one_span(), 1)
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        await asyncio.to_thread(query.show, receiver.address, "", out)
        out.seek(0)
        drawn = out.read()
        assert "Stream" in drawn
        assert "service 12" in drawn
        assert "\x1b" not in drawn

    with_receiver(test)


def test_an_export_of_many_spans_keeps_the_bounds() -> None:
    async def test(receiver: TraceReceiver) -> None:
        payload = otlp.encode([one_span(n) for n in range(1, 1001)]).SerializeToString()
        await export(receiver, payload)
        assert len(receiver.store) == 100
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await export(receiver, payload * 40)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    with_receiver(test, TraceStore(max_traces=100))


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "10.0.0.1:0", "example.org:0", ":0"])
def test_it_binds_to_loopback_only(address: str) -> None:
    with pytest.raises(ValueError, match=r"loopback|address"):
        asyncio.run(TraceReceiver().start(address))
