"""A grpc.aio server with our limits and manners."""

import os
from collections.abc import Callable, Sequence
from typing import Any

# BindError tells of a taken port in one line; grpc's C core, which reads this when it is loaded, would add its own.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio

from penstock.rpc.handlers import Limit, OnError, handlers

__all__ = ["BindError", "Server", "handlers"]

DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
DEFAULT_MAX_CONCURRENT_CALLS = 4096


class BindError(OSError):
    """The address cannot be listened on; the text is one line that names it."""


class Server:
    """Listens on one address. ``add`` what it serves, ``start`` it once, ``stop`` it once."""

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ServerCredentials | None = None,
        on_error: OnError,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        max_concurrent_calls: int = DEFAULT_MAX_CONCURRENT_CALLS,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        options: Sequence[tuple[str, str | int]] = (),
    ) -> None:
        """``max_concurrent_calls`` counts calls of the added services only; ``options`` override ours."""
        self._address = address
        self._credentials = credentials
        self._on_error = on_error
        self._limit = Limit(max_concurrent_calls)
        self._services: list[str] = []
        self._on_stop: list[Callable[[], None]] = []
        self._server = grpc.aio.server(
            interceptors=list(interceptors),
            options=list((_options(max_message_bytes) | dict(options)).items()),
            # A refusal with details is a call too; this bound is for a flood of those.
            maximum_concurrent_rpcs=2 * max_concurrent_calls + 256,
        )

    @property
    def services(self) -> tuple[str, ...]:
        """Full names of what was added."""
        return tuple(self._services)

    def add(self, service: str, implementation: object) -> None:
        """Serve ``implementation`` (see ``handlers``) as ``service``, such as "penstock.v1.ModelService"."""
        self.add_handler(service, handlers(service, implementation, on_error=self._on_error, admit=self._limit))

    def add_handler(
        self, service: str, handler: grpc.GenericRpcHandler, on_stop: Callable[[], None] | None = None
    ) -> None:
        """Serve a service by a handler of one's own, outside the limit of calls: health, reflection.

        ``on_stop`` is called when the server stops, to end calls that would outlast any grace.
        """
        if on_stop is not None:
            self._on_stop.append(on_stop)
        self._services.append(service)
        self._server.add_generic_rpc_handlers((handler,))

    async def start(self) -> str:
        """Listen; returns the address with the port that was taken. Raises BindError."""
        port = self._bind()
        await self._server.start()
        if self._address.startswith("unix"):
            return self._address
        return f"{self._address.rpartition(':')[0]}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let those in flight end for ``grace_s`` seconds, then cancel them."""
        for end in self._on_stop:
            end()
        await self._server.stop(grace_s)

    def _bind(self) -> int:
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(self._address)
            else:
                port = self._server.add_secure_port(self._address, self._credentials)
        except RuntimeError as error:
            raise BindError(
                f"cannot listen on {self._address}: is the port taken, the address of this host?"
            ) from error
        if port == 0 and not self._address.startswith("unix"):
            raise BindError(f"cannot listen on {self._address}")
        return port


def _options(max_message_bytes: int) -> dict[str, Any]:
    return {
        "grpc.max_receive_message_length": max_message_bytes,
        "grpc.max_send_message_length": -1,
        "grpc.max_metadata_size": 16 * 1024,
        # A taken port is an error, not a second server that gets every other connection.
        "grpc.so_reuseport": 0,
        "grpc.keepalive_time_ms": 20_000,
        "grpc.keepalive_timeout_ms": 5_000,
        "grpc.keepalive_permit_without_calls": 1,
        # Our own clients ping every 20 s; a ping more often than every 5 s is misuse, and the connection is closed.
        "grpc.http2.min_recv_ping_interval_without_data_ms": 5_000,
        "grpc.http2.max_ping_strikes": 3,
    }
