"""Typed calls for threads: the same shapes as in ``calls``."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic

import grpc

from penstock.rpc import errors
from penstock.rpc.calls import Metadata, Request, Response, decode_response, encode_request
from penstock.rpc.codec import decoder, encoder


class SyncResponseStream(Generic[Response]):
    """Iterate it; ``cancel`` from any thread ends it with RpcError (CANCELLED)."""

    def __init__(self, call: Any, decode: Callable[[bytes], Response]) -> None:
        self.call = call
        """The grpc call underneath: metadata, code, peer."""
        self._decode = decode

    def cancel(self) -> None:
        """End the call. Idempotent."""
        self.call.cancel()

    def __iter__(self) -> Iterator[Response]:
        return self

    def __next__(self) -> Response:
        try:
            data = next(self.call)
        except grpc.RpcError as error:
            raise errors.from_call(error) from error
        return decode_response(self._decode, data)


class SyncUnaryUnary(Generic[Request, Response]):
    """A method with one request and one response."""

    def __init__(
        self, channel: grpc.Channel, path: str, request_type: type[Request], response_type: type[Response]
    ) -> None:
        self._start: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        self._encode = encoder(request_type)
        self._decode = decoder(response_type)

    def __call__(
        self, request: Request, *, timeout: float | None = None, metadata: Metadata = (), wait_for_ready: bool = False
    ) -> Response:
        """Call and wait; ``timeout`` in seconds. Raises RpcError."""
        data = encode_request(self._encode, request)
        try:
            answer = self._start(data, timeout=timeout, metadata=tuple(metadata), wait_for_ready=wait_for_ready)
        except grpc.RpcError as error:
            raise errors.from_call(error) from error
        return decode_response(self._decode, answer)


class SyncUnaryStream(Generic[Request, Response]):
    """A method with one request and a stream of responses."""

    def __init__(
        self, channel: grpc.Channel, path: str, request_type: type[Request], response_type: type[Response]
    ) -> None:
        self._start: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
        self._encode = encoder(request_type)
        self._decode = decoder(response_type)

    def __call__(
        self, request: Request, *, timeout: float | None = None, metadata: Metadata = (), wait_for_ready: bool = False
    ) -> SyncResponseStream[Response]:
        """Start the call; ``timeout`` in seconds. Raises RpcError if the request cannot be encoded."""
        data = encode_request(self._encode, request)
        call = self._start(data, timeout=timeout, metadata=tuple(metadata), wait_for_ready=wait_for_ready)
        return SyncResponseStream(call, self._decode)


class SyncStreamStream(Generic[Request, Response]):
    """A method with streams both ways; grpc reads the requests in a thread of its own."""

    def __init__(
        self, channel: grpc.Channel, path: str, request_type: type[Request], response_type: type[Response]
    ) -> None:
        self._start: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
        self._encode = encoder(request_type)
        self._decode = decoder(response_type)

    def __call__(
        self,
        requests: Iterable[Request],
        *,
        timeout: float | None = None,
        metadata: Metadata = (),
        wait_for_ready: bool = False,
    ) -> SyncResponseStream[Response]:
        """Start the call; ``timeout`` in seconds."""
        data = (self._encode(request) for request in requests)
        call = self._start(data, timeout=timeout, metadata=tuple(metadata), wait_for_ready=wait_for_ready)
        return SyncResponseStream(call, self._decode)
