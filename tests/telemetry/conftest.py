"""A real OTLP gRPC collector for the tests, made of OpenTelemetry's own generated code."""

from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Remembers each exported span by name, with its resource's attributes."""

    def __init__(self) -> None:
        self.address = ""
        self.spans: dict[str, Span] = {}
        self.resources: dict[str, dict[str, str | int]] = {}

    def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for of_resource in request.resource_spans:
            resource = {pair.key: value_of(pair) for pair in of_resource.resource.attributes}
            for span in (span for scope in of_resource.scope_spans for span in scope.spans):
                self.spans[span.name] = span
                self.resources[span.name] = resource
        return trace_service_pb2.ExportTraceServiceResponse()


def value_of(pair: KeyValue) -> str | int:
    """The value of a string or integer attribute."""
    return pair.value.string_value or pair.value.int_value


@pytest.fixture
def collector() -> Iterator[Collector]:
    servicer = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(grace=0).wait(timeout=5)
