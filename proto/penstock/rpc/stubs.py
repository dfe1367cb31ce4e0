"""Typed stubs of every service of ``penstock.v1``, for asyncio and for threads.

The methods of a service stand once, as descriptors; which kind of call one gives follows from the kind of stub.
A test compares them with the services' descriptors.
"""

from typing import ClassVar, Generic, overload

import grpc
import grpc.aio

from penstock import v1
from penstock.rpc.calls import Request, Response, StreamStream, UnaryStream, UnaryUnary
from penstock.rpc.sync_calls import SyncStreamStream, SyncUnaryStream, SyncUnaryUnary


class AsyncStub:
    """A service on an asyncio channel. The channel stays its owner's."""

    service: ClassVar[str]

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel


class SyncStub:
    """A service on a channel for threads. The channel stays its owner's."""

    service: ClassVar[str]

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel


class Method(Generic[Request, Response]):
    """One method; its attribute's name in snake_case is the method's name in the proto file."""

    def __init__(self, request_type: type[Request], response_type: type[Response]) -> None:
        self.request_type = request_type
        self.response_type = response_type
        self.attribute = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute = name

    @property
    def name(self) -> str:
        """As the proto file has it."""
        return "".join(part.capitalize() for part in self.attribute.split("_"))

    def path(self, stub: AsyncStub | SyncStub) -> str:
        """As HTTP/2 has it."""
        return f"/{stub.service}/{self.name}"


class Unary(Method[Request, Response]):
    """One request, one response."""

    @overload
    def __get__(self, stub: AsyncStub, owner: object = None) -> UnaryUnary[Request, Response]: ...
    @overload
    def __get__(self, stub: SyncStub, owner: object = None) -> SyncUnaryUnary[Request, Response]: ...
    def __get__(
        self, stub: AsyncStub | SyncStub, owner: object = None
    ) -> UnaryUnary[Request, Response] | SyncUnaryUnary[Request, Response]:
        method: UnaryUnary[Request, Response] | SyncUnaryUnary[Request, Response]
        if isinstance(stub, AsyncStub):
            method = UnaryUnary(stub.channel, self.path(stub), self.request_type, self.response_type)
        else:
            method = SyncUnaryUnary(stub.channel, self.path(stub), self.request_type, self.response_type)
        vars(stub)[self.attribute] = method  # found there from now on
        return method


class ServerStreaming(Method[Request, Response]):
    """One request, a stream of responses."""

    @overload
    def __get__(self, stub: AsyncStub, owner: object = None) -> UnaryStream[Request, Response]: ...
    @overload
    def __get__(self, stub: SyncStub, owner: object = None) -> SyncUnaryStream[Request, Response]: ...
    def __get__(
        self, stub: AsyncStub | SyncStub, owner: object = None
    ) -> UnaryStream[Request, Response] | SyncUnaryStream[Request, Response]:
        method: UnaryStream[Request, Response] | SyncUnaryStream[Request, Response]
        if isinstance(stub, AsyncStub):
            method = UnaryStream(stub.channel, self.path(stub), self.request_type, self.response_type)
        else:
            method = SyncUnaryStream(stub.channel, self.path(stub), self.request_type, self.response_type)
        vars(stub)[self.attribute] = method
        return method


class BothStreaming(Method[Request, Response]):
    """Streams both ways."""

    @overload
    def __get__(self, stub: AsyncStub, owner: object = None) -> StreamStream[Request, Response]: ...
    @overload
    def __get__(self, stub: SyncStub, owner: object = None) -> SyncStreamStream[Request, Response]: ...
    def __get__(
        self, stub: AsyncStub | SyncStub, owner: object = None
    ) -> StreamStream[Request, Response] | SyncStreamStream[Request, Response]:
        method: StreamStream[Request, Response] | SyncStreamStream[Request, Response]
        if isinstance(stub, AsyncStub):
            method = StreamStream(stub.channel, self.path(stub), self.request_type, self.response_type)
        else:
            method = SyncStreamStream(stub.channel, self.path(stub), self.request_type, self.response_type)
        vars(stub)[self.attribute] = method
        return method


class _Generation:
    service: ClassVar[str] = "penstock.v1.GenerationService"
    generate = Unary(v1.GenerateRequest, v1.GenerateResponse)
    stream = ServerStreaming(v1.StreamRequest, v1.StreamResponse)


class _Model:
    service: ClassVar[str] = "penstock.v1.ModelService"
    list_models = Unary(v1.ListModelsRequest, v1.ListModelsResponse)
    get_model = Unary(v1.GetModelRequest, v1.GetModelResponse)
    tokenize = Unary(v1.TokenizeRequest, v1.TokenizeResponse)
    detokenize = Unary(v1.DetokenizeRequest, v1.DetokenizeResponse)


class _Adapter:
    service: ClassVar[str] = "penstock.v1.AdapterService"
    load_adapter = Unary(v1.LoadAdapterRequest, v1.LoadAdapterResponse)
    unload_adapter = Unary(v1.UnloadAdapterRequest, v1.UnloadAdapterResponse)
    list_adapters = Unary(v1.ListAdaptersRequest, v1.ListAdaptersResponse)


class _Scheduler:
    service: ClassVar[str] = "penstock.v1.SchedulerService"
    connect = BothStreaming(v1.ConnectRequest, v1.ConnectResponse)
    get_status = Unary(v1.GetStatusRequest, v1.GetStatusResponse)
    drain = Unary(v1.DrainRequest, v1.DrainResponse)
    get_tokenizer = ServerStreaming(v1.GetTokenizerRequest, v1.GetTokenizerResponse)
    load_adapter = Unary(v1.SchedulerServiceLoadAdapterRequest, v1.SchedulerServiceLoadAdapterResponse)
    unload_adapter = Unary(v1.SchedulerServiceUnloadAdapterRequest, v1.SchedulerServiceUnloadAdapterResponse)


class GenerationStub(_Generation, AsyncStub):
    """GenerationService."""


class SyncGenerationStub(_Generation, SyncStub):
    """GenerationService."""


class ModelStub(_Model, AsyncStub):
    """ModelService."""


class SyncModelStub(_Model, SyncStub):
    """ModelService."""


class AdapterStub(_Adapter, AsyncStub):
    """AdapterService."""


class SyncAdapterStub(_Adapter, SyncStub):
    """AdapterService."""


class SchedulerStub(_Scheduler, AsyncStub):
    """SchedulerService."""


class SyncSchedulerStub(_Scheduler, SyncStub):
    """SchedulerService."""
