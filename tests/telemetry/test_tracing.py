import os
import socket
import subprocess
import sys
import time
from typing import Protocol

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from penstock.telemetry import tracing

UNSAMPLED = SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(0))


class Collector(Protocol):
    address: str
    spans: dict[str, Span]
    resources: dict[str, dict[str, str | int]]


def test_spans_reach_a_collector_with_their_resource(collector: Collector) -> None:
    on = tracing.configure("gate", endpoint=collector.address, service_instance="gate-7")
    with (
        on.tracer("test").start_as_current_span("outer", kind=SpanKind.SERVER) as outer,
        on.tracer("test").start_as_current_span("inner"),
    ):
        pass
    assert on.shutdown(5.0)
    assert collector.spans["inner"].parent_span_id == collector.spans["outer"].span_id
    assert collector.spans["outer"].trace_id.hex() == f"{outer.get_span_context().trace_id:032x}"
    resource = collector.resources["outer"]
    assert resource["service.name"] == "penstock-gate"
    assert resource["service.instance.id"] == "gate-7"
    assert resource["process.pid"] == os.getpid()


def test_emitted_spans_carry_what_they_were_given_under_the_other_process(collector: Collector) -> None:
    on = tracing.configure("gate", endpoint=f"http://{collector.address}")
    engine = on.for_resource("penstock-engine", 4242)
    with on.tracer("test").start_as_current_span("scheduler.request") as request:
        parent = request.get_span_context()
    context = tracing.child_of(parent)
    engine.emit(
        "decode",
        context=context,
        parent=parent,
        start_unix_ns=1_000,
        end_unix_ns=5_000,
        attributes={"tokens": 3},
        events=[("first_token", 2_000, {}), ("preempted", 3_000, {"by": "blocks"})],
        links=[UNSAMPLED],
        kind=SpanKind.INTERNAL,
        status=Status(StatusCode.ERROR, "worker lost"),
    )
    assert on.force_flush(5.0)
    span = collector.spans["decode"]
    on.shutdown(5.0)
    assert span.trace_id == parent.trace_id.to_bytes(16, "big")
    assert span.span_id == context.span_id.to_bytes(8, "big")
    assert span.parent_span_id == parent.span_id.to_bytes(8, "big")
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (1_000, 5_000)
    assert [(event.name, event.time_unix_nano) for event in span.events] == [
        ("first_token", 2_000),
        ("preempted", 3_000),
    ]
    assert span.events[1].attributes[0].value.string_value == "blocks"
    assert span.attributes[0].key == "tokens"
    assert span.attributes[0].value.int_value == 3
    assert span.links[0].span_id == UNSAMPLED.span_id.to_bytes(8, "big")
    assert (span.status.code, span.status.message) == (2, "worker lost")
    assert collector.resources["decode"]["service.name"] == "penstock-engine"
    assert collector.resources["decode"]["process.pid"] == 4242
    assert collector.resources["scheduler.request"]["process.pid"] == os.getpid()


def test_a_span_that_ends_before_it_starts_has_no_duration(collector: Collector) -> None:
    on = tracing.configure("gate", endpoint=collector.address)
    sampled = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    emitter = on.for_resource("penstock-engine", 1)
    emitter.emit("queue", context=sampled, parent=None, start_unix_ns=9, end_unix_ns=4)
    on.shutdown(5.0)
    assert collector.spans["queue"].end_time_unix_nano == 9
    assert collector.spans["queue"].parent_span_id == b""


def test_the_sampled_flag_of_a_parent_is_honoured(collector: Collector) -> None:
    on = tracing.configure("service", endpoint=collector.address, sample_ratio=0.0)
    sampled = SpanContext(5, 6, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    tracer = on.tracer("test")
    tracer.start_span("root").end()
    tracer.start_span("sampled", context=tracing.as_context(sampled)).end()
    refused = tracer.start_span("unsampled", context=tracing.as_context(UNSAMPLED))
    refused.end()
    on.for_resource("penstock-engine", 1).emit(
        "emitted", context=tracing.child_of(UNSAMPLED), parent=UNSAMPLED, start_unix_ns=1, end_unix_ns=2
    )
    on.shutdown(5.0)
    assert set(collector.spans) == {"sampled"}
    assert refused.get_span_context().trace_id == UNSAMPLED.trace_id
    assert not refused.get_span_context().trace_flags.sampled


def test_off_records_nothing_but_lets_the_callers_context_through() -> None:
    off = tracing.configure("service", endpoint=None)
    caller = SpanContext(5, 6, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    with off.tracer("test").start_as_current_span("x", context=tracing.as_context(caller)) as span:
        assert not span.is_recording()
        assert tracing.inject() == (("traceparent", tracing.format_traceparent(caller)),)
    emitter = off.for_resource("penstock-engine", 1)
    emitter.emit("decode", context=caller, parent=None, start_unix_ns=1, end_unix_ns=2)
    assert not off.enabled
    assert not emitter.enabled
    assert off.force_flush()
    assert off.shutdown()


def test_off_loads_neither_sdk_nor_grpc() -> None:
    program = (
        "import sys\n"
        "from penstock.telemetry import tracing\n"
        "tracing.configure('engine', endpoint=None).tracer('x').start_span('y').end()\n"
        "print(sorted(m for m in sys.modules if m == 'grpc' or m.startswith('opentelemetry.sdk')))\n"
    )
    assert _run(program) == "[]\n"


def test_shutdown_keeps_its_deadline_when_the_collector_is_gone() -> None:
    with socket.socket() as silent:  # accepts connections, never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        on = tracing.configure("gate", endpoint=f"127.0.0.1:{silent.getsockname()[1]}")
        on.tracer("test").start_span("lost").end()
        began = time.monotonic()
        assert not on.shutdown(0.3)
        assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("endpoint", ["localhost", "ftp://h:1", "host:port", ":4317", "http://", "a:99999"])
def test_an_endpoint_that_makes_no_sense_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="trace endpoint"):
        tracing.configure("gate", endpoint=endpoint)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="sample_ratio"):
        tracing.configure("gate", endpoint=None, sample_ratio=ratio)


def _run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
