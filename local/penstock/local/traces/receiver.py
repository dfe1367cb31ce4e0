"""A small OTLP gRPC receiver that keeps traces in memory and answers questions about them.

On one loopback port it serves, all with raw bytes that are parsed here:

- `/opentelemetry.proto.collector.trace.v1.TraceService/Export`, the standard OTLP method;
- `/penstock.local.Traces/Get`: an ASCII trace id (empty for the latest complete trace) → that trace as a
  serialized ExportTraceServiceRequest; NOT_FOUND if it is not here;
- `/penstock.local.Traces/List`: anything → JSON, a list of `store.Summary`, the newest first.
"""

import asyncio
import ipaddress
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc
import msgspec
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from penstock.local.traces import otlp
from penstock.local.traces.store import TraceStore

OTLP_SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
QUERY_SERVICE = "penstock.local.Traces"
_LISTED_TRACES = 50
_MAX_EXPORT_BYTES = 4 << 20
_MAX_CONCURRENT_CALLS = 64
_SPANS_PER_TURN = 128
"""After so many spans the event loop gets its turn: the receiver may share it with a supervisor."""

_Context = grpc.aio.ServicerContext[bytes, bytes]


class TraceReceiver:
    """The server; use it as an async context manager, or `start` and `stop` it.

    Malformed payloads are answered INVALID_ARGUMENT, too many calls at once RESOURCE_EXHAUSTED (exporters
    retry).
    """

    def __init__(self, store: TraceStore | None = None) -> None:
        self.store = TraceStore() if store is None else store
        self._server: grpc.aio.Server | None = None
        self._address = ""

    @property
    def address(self) -> str:
        """`host:port` where it listens; empty before `start`."""
        return self._address

    async def start(self, address: str = "127.0.0.1:0") -> None:
        """Listen; port 0 picks a free one. ValueError off loopback, RuntimeError if the port is taken."""
        host, _, _ = address.rpartition(":")
        if host != "localhost" and not ipaddress.ip_address(host.strip("[]")).is_loopback:
            raise ValueError(f"the trace receiver has no authentication: loopback only, not {host}")
        server = grpc.aio.server(
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", _MAX_EXPORT_BYTES)],
            maximum_concurrent_rpcs=_MAX_CONCURRENT_CALLS,
        )
        server.add_generic_rpc_handlers(self._handlers())
        port = server.add_insecure_port(address)
        await server.start()
        self._server, self._address = server, f"{host}:{port}"

    async def stop(self, grace_s: float = 0.5) -> None:
        """Stop listening; calls in progress have `grace_s` to end."""
        if self._server is not None:
            await self._server.stop(grace_s)
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        return (
            grpc.method_handlers_generic_handler(OTLP_SERVICE, {"Export": _unary(self._export)}),
            grpc.method_handlers_generic_handler(QUERY_SERVICE, {"Get": _unary(self._get), "List": _unary(self._list)}),
        )

    async def _export(self, payload: bytes, context: _Context) -> bytes:
        try:
            request = ExportTraceServiceRequest.FromString(payload)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not an ExportTraceServiceRequest")
        rejected = await self._keep(request)
        response = ExportTraceServiceResponse()
        if rejected:
            message = "spans with ids of a wrong length"
            response.partial_success.CopyFrom(ExportTracePartialSuccess(rejected_spans=rejected, error_message=message))
        return response.SerializeToString()

    async def _keep(self, request: ExportTraceServiceRequest) -> int:
        """Store the spans of a request; returns how many had invalid ids."""
        rejected = 0
        for number, decoded in enumerate(otlp.decode(request), start=1):
            if decoded is None:
                rejected += 1
            else:
                self.store.add(*decoded)
            if number % _SPANS_PER_TURN == 0:
                await asyncio.sleep(0)
        return rejected

    async def _get(self, payload: bytes, context: _Context) -> bytes:
        trace_id = payload.decode("ascii", "replace").strip().lower()
        spans = self.store.get(trace_id) if trace_id else self.store.latest()
        if spans is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such trace" if trace_id else "no trace yet")
        return otlp.encode(spans).SerializeToString()

    async def _list(self, payload: bytes, context: _Context) -> bytes:
        return msgspec.json.encode(self.store.recent(_LISTED_TRACES))


def _unary(method: Callable[..., object]) -> "grpc.RpcMethodHandler[bytes, bytes]":
    return grpc.unary_unary_rpc_method_handler(method)
