"""Typed calls for asyncio: messages in and out, RpcError as the only failure, the grpc call always at hand."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Sequence
from typing import Any, Final, Generic, TypeVar, cast

import betterproto2
import grpc
import grpc.aio

from penstock.rpc import errors
from penstock.rpc.codec import MalformedMessage, UnencodableMessage, decoder, encoder
from penstock.v1 import ErrorReason

Request = TypeVar("Request", bound=betterproto2.Message)
Response = TypeVar("Response", bound=betterproto2.Message)
Result = TypeVar("Result")
Metadata = Sequence[tuple[str, str | bytes]]


def encode_request(encode: Callable[[Request], bytes], request: Request) -> bytes:
    """The request's bytes. Raises RpcError (INVALID_ARGUMENT) for a value that its field cannot carry."""
    try:
        return encode(request)
    except UnencodableMessage as error:
        raise errors.invalid([(error.field, error.description)]) from error


def decode_response(decode: Callable[[bytes], Response], data: bytes) -> Response:
    """The response. Raises RpcError (INTERNAL) when the server sent something else."""
    try:
        return decode(data)
    except MalformedMessage as error:
        raise errors.RpcError(grpc.StatusCode.INTERNAL, ErrorReason.INTERNAL, f"malformed response: {error}") from error


_WRITTEN_TOO_LATE: Final = "Internal error from Core"
"""How grpc.aio says that the call had ended when something was written to it. It says so to whoever reads, too, with
code INTERNAL, whatever the other side's status is (``_StreamRequestMixin._write`` in grpc/aio/_call.py)."""
STATUS_SECONDS: Final = 1.0
"""For the status to come, which made the write fail."""


async def _status_of(call: Any) -> grpc.aio.AioRpcError:
    code, details, trailing = await call.code(), await call.details(), await call.trailing_metadata()
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)


def _at_once(known: Coroutine[Any, Any, Result]) -> Result:
    """What a coroutine returns that has nothing to wait for."""
    try:
        known.send(None)
    except StopIteration as end:
        return cast(Result, end.value)
    raise RuntimeError("it waits")


class AsyncCall:
    """What every call can do."""

    def __init__(self, call: Any) -> None:
        self.call = call
        """The grpc.aio call underneath: metadata, code, peer."""
        self._cancelled_here = False
        self._typed_errors = _TypedErrors(self)

    def cancel(self) -> None:
        """End the call; whoever waits on it gets RpcError (CANCELLED). Idempotent."""
        self._cancelled_here = True
        self.call.cancel()

    def typed(self, error: BaseException) -> errors.RpcError | None:
        """What ``error``, raised by the grpc call, is to our callers; None for what is not the call's."""
        match error:
            case grpc.RpcError():
                return errors.from_call(error)
            case grpc.aio.InternalError():
                # The core refused an operation: metadata that HTTP/2 cannot carry is the usual cause.
                text = "the call could not be made"
                return errors.RpcError(grpc.StatusCode.INTERNAL, ErrorReason.INTERNAL, text)
            case asyncio.InvalidStateError():
                return errors.cancelled("the call has ended")
            case asyncio.CancelledError():
                return self._typed_cancel()
        return None

    def _typed_cancel(self) -> errors.RpcError | None:
        """grpc.aio says CancelledError for a cancelled call as for a cancelled task; only the latter is the task's."""
        task = asyncio.current_task()
        if self._cancelled_here and not (task is not None and task.cancelling()):
            return errors.cancelled()
        self.cancel()
        return None


class _TypedErrors:
    """``with`` around what the grpc call is asked; made once a call, for streams enter it at every message."""

    __slots__ = ("_owner",)

    def __init__(self, owner: AsyncCall) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            typed = self._owner.typed(error)
            if typed is not None:
                raise typed from error


class UnaryCall(AsyncCall, Generic[Response]):
    """Await it for its one response."""

    def __init__(self, call: Any, decode: Callable[[bytes], Response]) -> None:
        super().__init__(call)
        self._decode = decode

    def __await__(self) -> Generator[Any, None, Response]:
        return self._response().__await__()

    async def _response(self) -> Response:
        with self._typed_errors:
            data = await self.call
        return decode_response(self._decode, data)


class ResponseStream(AsyncCall, Generic[Response]):
    """Iterate it, or ``read`` it; leaving an iteration early does not end the call, ``cancel`` does."""

    def __init__(self, call: Any, decode: Callable[[bytes], Response]) -> None:
        super().__init__(call)
        self._decode = decode

    async def read(self) -> Response | None:
        """The next response; None at the end. Raises RpcError."""
        with self._typed_errors:
            data = await self.call.read()
        if data is grpc.aio.EOF:
            return None
        return decode_response(self._decode, data)

    def __aiter__(self) -> AsyncIterator[Response]:
        return self

    async def __anext__(self) -> Response:
        response = await self.read()
        if response is None:
            raise StopAsyncIteration
        return response


class MessageStream(ResponseStream[Response], Generic[Request, Response]):
    """A call with streams both ways."""

    def __init__(self, call: Any, encode: Callable[[Request], bytes], decode: Callable[[bytes], Response]) -> None:
        super().__init__(call, decode)
        self._encode = encode
        self._status: grpc.aio.AioRpcError | None = None
        """How the other side ended the call: a write that the end overtakes puts another one in its place."""
        self._ended = asyncio.Event()
        call.add_done_callback(self._keep_status)

    def _keep_status(self, call: Any) -> None:
        status = _at_once(_status_of(call))
        if status.details() != _WRITTEN_TOO_LATE:
            self._status = status
            self._ended.set()

    async def read(self) -> Response | None:
        """The next response; None at the end. Raises RpcError, as the other side ended the call."""
        try:
            return await super().read()
        except errors.RpcError as error:
            if error.message != _WRITTEN_TOO_LATE:
                raise
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATUS_SECONDS):
                await self._ended.wait()
        if self._status is None:
            raise errors.cancelled("the call has ended")
        if self._status.code() is grpc.StatusCode.OK:
            return None
        raise errors.from_call(self._status)

    async def write(self, request: Request) -> None:
        """Send one; returns when flow control lets it go. One at a time. Raises RpcError; :meth:`read` knows why."""
        data = encode_request(self._encode, request)
        try:
            with self._typed_errors:
                await self.call.write(data)
        except errors.RpcError as error:
            if error.message == _WRITTEN_TOO_LATE:
                raise errors.cancelled("the call has ended") from error
            raise

    async def done_writing(self) -> None:
        """Nothing more will be written."""
        with self._typed_errors:
            await self.call.done_writing()


class UnaryUnary(Generic[Request, Response]):
    """A method with one request and one response."""

    def __init__(
        self, channel: grpc.aio.Channel, path: str, request_type: type[Request], response_type: type[Response]
    ) -> None:
        self._start: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        self._encode = encoder(request_type)
        self._decode = decoder(response_type)

    def __call__(
        self, request: Request, *, timeout: float | None = None, metadata: Metadata = (), wait_for_ready: bool = False
    ) -> UnaryCall[Response]:
        """Start the call; ``timeout`` in seconds. Raises RpcError if the request cannot be encoded."""
        data = encode_request(self._encode, request)
        call = self._start(data, timeout=timeout, metadata=tuple(metadata), wait_for_ready=wait_for_ready)
        return UnaryCall(call, self._decode)


class UnaryStream(Generic[Request, Response]):
    """A method with one request and a stream of responses."""

    def __init__(
        self, channel: grpc.aio.Channel, path: str, request_type: type[Request], response_type: type[Response]
    ) -> None:
        self._start: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
        self._encode = encoder(request_type)
        self._decode = decoder(response_type)

    def __call__(
        self, request: Request, *, timeout: float | None = None, metadata: Metadata = (), wait_for_ready: bool = False
    ) -> ResponseStream[Response]:
        """Start the call; ``timeout`` in seconds. Raises RpcError if the request cannot be encoded."""
        data = encode_request(self._encode, request)
        call = self._start(data, timeout=timeout, metadata=tuple(metadata), wait_for_ready=wait_for_ready)
        return ResponseStream(call, self._decode)


class StreamStream(Generic[Request, Response]):
    """A method with streams both ways."""

    def __init__(
        self, channel: grpc.aio.Channel, path: str, request_type: type[Request], response_type: type[Response]
    ) -> None:
        self._start: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
        self._encode = encoder(request_type)
        self._decode = decoder(response_type)

    def __call__(
        self, *, timeout: float | None = None, metadata: Metadata = (), wait_for_ready: bool = False
    ) -> MessageStream[Request, Response]:
        """Start the call; requests are written to it. ``timeout`` in seconds."""
        call = self._start(None, timeout=timeout, metadata=tuple(metadata), wait_for_ready=wait_for_ready)
        return MessageStream(call, self._encode, self._decode)
