"""From a service's descriptor and an object with coroutines to a grpc handler.

Handlers take raw bytes and decode inside: a deserializer that raises would end the call with an UNKNOWN that names
nothing. Whatever goes wrong, a client gets a status with details, and never the text of an unexpected exception.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from typing import Any, Never

import betterproto2
import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from penstock import v1
from penstock.rpc import errors
from penstock.rpc.codec import MAX_REQUEST_PARTS, MalformedMessage, decoder, descriptor_of, encoder

Context = grpc.aio.ServicerContext[Any, Any]
OnError = Callable[[str, BaseException], None]
"""Called once for each unexpected exception, with the method's full name."""
Admit = Callable[[], AbstractContextManager[None]]
"""Entered around each call; raises RpcError to refuse it."""


def service_descriptor(service: str) -> ServiceDescriptor:
    """The descriptor of a service of ``penstock.v1`` by its full name. Raises KeyError."""
    return descriptor_of(v1.GenerateRequest).file.pool.FindServiceByName(service)


def handlers(
    service: str, implementation: object, *, on_error: OnError, admit: Admit = nullcontext
) -> grpc.GenericRpcHandler:
    """Serve ``implementation`` as ``service``.

    Method ``GetModel`` is the coroutine, or async generator if it streams responses, ``get_model(request, context)``;
    ``request`` is an AsyncIterator where requests are streamed. A method that the implementation lacks answers
    UNIMPLEMENTED. RpcError becomes its status; any other exception goes to ``on_error`` and becomes INTERNAL.
    """
    methods = {m.name: _handler(m, implementation, on_error, admit) for m in service_descriptor(service).methods}
    return grpc.method_handlers_generic_handler(service, methods)


def refusal(error: errors.RpcError) -> "grpc.RpcMethodHandler[Any, Any]":
    """A handler for interceptors to return: whatever is called, it answers with ``error``.

    It is one of streams both ways, which fits every method on the wire and alone waits for no request.
    """

    async def refuse(_: object, context: Context) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


async def abort(context: Context, error: errors.RpcError) -> Never:
    """End the call with the error's status and details. Always raises."""
    code, details, metadata = errors.trailers(error)
    await context.abort(code, details, metadata)


def _handler(
    method: MethodDescriptor, implementation: object, on_error: OnError, admit: Admit
) -> "grpc.RpcMethodHandler[Any, Any]":
    call = _Call(method, implementation, on_error, admit)
    match method.client_streaming, method.server_streaming:
        case False, False:
            return grpc.unary_unary_rpc_method_handler(call.unary_unary)
        case False, True:
            return grpc.unary_stream_rpc_method_handler(call.unary_stream)
        case True, False:
            return grpc.stream_unary_rpc_method_handler(call.stream_unary)
        case _:
            return grpc.stream_stream_rpc_method_handler(call.stream_stream)


class _Call:
    """How one method is called, in its four possible shapes."""

    def __init__(self, method: MethodDescriptor, implementation: object, on_error: OnError, admit: Admit) -> None:
        self._name = method.full_name
        self._decode = decoder(_message_type(method.input_type.name), max_parts=MAX_REQUEST_PARTS)
        self._encode: Callable[[Any], bytes] = encoder(_message_type(method.output_type.name))
        self._function = getattr(implementation, _snake_case(method.name), None)
        self._on_error = on_error
        self._admit = admit

    async def unary_unary(self, data: bytes, context: Context) -> Any:
        return await self._guarded(self._respond(lambda: self._one(data), context), context)

    async def stream_unary(self, data: AsyncIterator[bytes], context: Context) -> Any:
        return await self._guarded(self._respond(lambda: self._many(data), context), context)

    async def unary_stream(self, data: bytes, context: Context) -> None:
        await self._guarded(self._stream(lambda: self._one(data), context), context)

    async def stream_stream(self, data: AsyncIterator[bytes], context: Context) -> None:
        await self._guarded(self._stream(lambda: self._many(data), context), context)

    async def _respond(self, request: Callable[[], Any], context: Context) -> bytes:
        with self._admit():
            return self._encode(await self._implemented(request(), context))

    async def _stream(self, request: Callable[[], Any], context: Context) -> None:
        with self._admit():
            async with aclosing(self._implemented(request(), context)) as responses:
                async for response in responses:
                    await context.write(self._encode(response))

    def _implemented(self, request: Any, context: Context) -> Any:
        if self._function is None:
            raise errors.unsupported_method(self._name)
        return self._function(request, context)

    def _one(self, data: bytes) -> betterproto2.Message:
        try:
            return self._decode(data)
        except MalformedMessage as error:
            raise errors.malformed(str(error)) from error

    async def _many(self, messages: AsyncIterator[bytes]) -> AsyncIterator[betterproto2.Message]:
        async for data in messages:
            yield self._one(data)

    async def _guarded(self, work: Any, context: Context) -> Any:
        """Await ``work``; what it raises becomes the call's status."""
        try:
            return await work
        except errors.RpcError as error:
            failure = error
        except grpc.aio.AbortError:
            raise
        except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            if context.done() or context.cancelled():
                return None  # written to a client that had just left
            failure = self._unexpected(error)
        except Exception as error:  # noqa: BLE001  # nothing of it may reach the client; the hook has it
            failure = self._unexpected(error)
        return await abort(context, failure)

    def _unexpected(self, error: Exception) -> errors.RpcError:
        self._on_error(self._name, error)
        return errors.internal()


class Limit:
    """At most so many calls at once; the next is refused with RESOURCE_EXHAUSTED."""

    def __init__(self, calls: int, retry_after_s: float = 0.5) -> None:
        self._free = calls
        self._retry_after_s = retry_after_s

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self._free <= 0:
            raise errors.exhausted(v1.ErrorReason.SERVICE_BUSY, "too many calls at once", self._retry_after_s)
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


def _message_type(name: str) -> type[betterproto2.Message]:
    messages: Mapping[str, Any] = vars(v1)
    message_type: type[betterproto2.Message] = messages[name]
    return message_type


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
