"""The server's address, its interceptors, and stubs against descriptors."""

import subprocess
import sys
from typing import Any

import grpc
import grpc.aio
import pytest

from penstock import v1
from penstock.rpc import errors, stubs
from penstock.rpc.channel import open_channel
from penstock.rpc.codec import descriptor_of
from penstock.rpc.handlers import refusal, service_descriptor
from penstock.rpc.server import BindError, Server
from penstock.v1 import ErrorReason
from rpc.serving import Serve

FILES = [
    descriptor_of(message).file
    for message in (v1.GenerateRequest, v1.ListModelsRequest, v1.LoadAdapterRequest, v1.ConnectRequest)
]
METHODS = [
    (service.full_name, method.name)
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
]
STUBS: dict[str, tuple[type, type]] = {
    "penstock.v1.GenerationService": (stubs.GenerationStub, stubs.SyncGenerationStub),
    "penstock.v1.ModelService": (stubs.ModelStub, stubs.SyncModelStub),
    "penstock.v1.AdapterService": (stubs.AdapterStub, stubs.SyncAdapterStub),
    "penstock.v1.SchedulerService": (stubs.SchedulerStub, stubs.SyncSchedulerStub),
}
KINDS = {(False, False): stubs.Unary, (False, True): stubs.ServerStreaming, (True, True): stubs.BothStreaming}


def stub_methods(stub: type) -> dict[str, stubs.Method[Any, Any]]:
    found = (value for owner in stub.__mro__ for value in vars(owner).values())
    return {value.name: value for value in found if isinstance(value, stubs.Method)}


@pytest.mark.parametrize(("service", "name"), METHODS)
def test_every_method_has_its_stubs(service: str, name: str) -> None:
    descriptor = service_descriptor(service).methods_by_name[name]
    for stub in STUBS[service]:
        method = stub_methods(stub)[name]
        assert type(method) is KINDS[descriptor.client_streaming, descriptor.server_streaming]
        assert method.request_type.__name__ == descriptor.input_type.name
        assert method.response_type.__name__ == descriptor.output_type.name


def test_stubs_have_no_other_methods() -> None:
    assert {service for service, _ in METHODS} == set(STUBS)
    for service, pair in STUBS.items():
        for stub in pair:
            assert set(stub_methods(stub)) == {name for owner, name in METHODS if owner == service}


async def test_a_taken_port_is_an_error_of_one_line(serve: Serve) -> None:
    async with serve({}) as address:
        second = Server(address, on_error=lambda method, error: None)
        with pytest.raises(BindError, match=f"cannot listen on {address}"):
            await second.start()


async def test_an_address_of_nobody_is_an_error_of_one_line() -> None:
    server = Server("no-such-host.invalid:1", on_error=lambda method, error: None)
    with pytest.raises(BindError, match=r"cannot listen on no-such-host\.invalid:1"):
        await server.start()


async def test_unix_sockets_are_served(tmp_path: Any) -> None:
    server = Server(f"unix:{tmp_path}/s", on_error=lambda method, error: None)
    server.add("penstock.v1.ModelService", object())
    address = await server.start()
    try:
        async with open_channel(address) as channel:
            with pytest.raises(errors.RpcError) as caught:
                await stubs.ModelStub(channel).list_models(v1.ListModelsRequest(), timeout=5)
            assert caught.value.reason is ErrorReason.UNSUPPORTED_METHOD
    finally:
        await server.stop(0)


class Doorman(grpc.aio.ServerInterceptor):
    """Lets nobody in."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        return refusal(errors.unauthenticated(f"no key for {handler_call_details.method}"))


async def test_interceptors_refuse_calls_of_every_shape(serve: Serve) -> None:
    async with (
        serve({"penstock.v1.GenerationService": object()}, interceptors=[Doorman()]) as address,
        open_channel(address) as channel,
    ):
        stub = stubs.GenerationStub(channel)
        for call in (
            stub.generate(v1.GenerateRequest(), timeout=5),
            anext(stub.stream(v1.StreamRequest(), timeout=5)),
            stubs.SchedulerStub(channel).connect(timeout=5).read(),
        ):
            with pytest.raises(errors.RpcError) as caught:
                await call
            assert caught.value.reason is ErrorReason.UNAUTHENTICATED


def test_the_client_path_works_without_server_packages() -> None:
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('grpc_health', 'grpc_reflection', 'grpc_tools')))\n"
        "from penstock.rpc import channel, codec, errors, stubs, tls\n"
        "stubs.SyncModelStub(channel.open_sync_channel('localhost:1')).list_models"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)
