"""``grpc.health.v1``: a status for each service, asked for by Check and pushed by Watch.

grpcio's own servicer writes to a watcher while it holds the lock of that service, so that one watcher which reads
nothing stops every change; here a change wakes the watchers and returns.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from penstock.rpc import errors
from penstock.rpc.handlers import Context, abort
from penstock.rpc.server import Server
from penstock.v1 import ErrorReason

SERVICE: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
OVERALL = ""
"""The name that asks for the server as a whole."""
_Status = Any
_Response = health_pb2.HealthCheckResponse


class Health:
    """Statuses of a server's services. All calls are made on the server's event loop."""

    def __init__(self, services: Iterable[str] = (), *, max_watchers: int = 256) -> None:
        """``services`` and the server as a whole start as NOT_SERVING."""
        self._statuses: dict[str, _Status] = dict.fromkeys((OVERALL, *services), _Response.NOT_SERVING)
        self._free_watchers = max_watchers
        self._changed = asyncio.Event()
        self._closed = False

    def attach(self, server: Server) -> None:
        """Serve it, and know every service that was added to the server before."""
        for service in server.services:
            self._statuses.setdefault(service, _Response.NOT_SERVING)
        server.add_handler(SERVICE, _handler(self), on_stop=self.close)

    def set(self, service: str, serving: bool) -> None:
        """Say how one service does, OVERALL among them; its watchers are told."""
        status = _Response.SERVING if serving else _Response.NOT_SERVING
        if self._statuses.get(service) != status:
            self._statuses[service] = status
            self._wake()

    def set_all(self, serving: bool) -> None:
        """Say it of every known service and of the server as a whole."""
        for service in tuple(self._statuses):
            self.set(service, serving)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def check(self, request: Any, context: Context) -> Any:
        """The status now; NOT_FOUND for a service that is not known."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return _Response(status=status)

    def close(self) -> None:
        """End: every status becomes NOT_SERVING, watchers hear it and their streams end. A server's stop does it."""
        self.set_all(False)
        self._closed = True
        self._wake()

    async def list(self, request: Any, context: Context) -> Any:
        """Every known status by service."""
        statuses = {service: _Response(status=status) for service, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def watch(self, request: Any, context: Context) -> None:
        """The status now and at every change until the client leaves; a slow reader misses what is outdated."""
        if self._free_watchers <= 0:
            await abort(context, errors.exhausted(ErrorReason.SERVICE_BUSY, "too many watchers", 5.0))
        self._free_watchers -= 1
        try:
            await self._tell(request.service, context)
        finally:
            self._free_watchers += 1

    async def _tell(self, service: str, context: Context) -> None:
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(service, _Response.SERVICE_UNKNOWN)
            if status != told:
                told = status
                await context.write(_Response(status=status))
            elif self._closed:
                return
            else:
                await changed.wait()


def _handler(health: Health) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Check": grpc.unary_unary_rpc_method_handler(
                health.check, health_pb2.HealthCheckRequest.FromString, _Response.SerializeToString
            ),
            "List": grpc.unary_unary_rpc_method_handler(
                health.list, health_pb2.HealthListRequest.FromString, health_pb2.HealthListResponse.SerializeToString
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                health.watch, health_pb2.HealthCheckRequest.FromString, _Response.SerializeToString
            ),
        },
    )
