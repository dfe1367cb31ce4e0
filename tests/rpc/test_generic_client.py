"""A client that knows nothing of us: buf curl learns the services by reflection and calls them."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from penstock import v1
from penstock.rpc import errors, reflection
from penstock.rpc.channel import open_channel
from penstock.rpc.health import Health
from penstock.rpc.server import Server

BUF = Path(sys.executable).with_name("buf")


class Generation:
    """Two words for every prompt."""

    async def generate(self, request: v1.GenerateRequest, context: Any) -> v1.GenerateResponse:
        if not request.text:
            raise errors.invalid([("text", "is empty")])
        choice = v1.Choice(text=f"{request.text} there", token_ids=[5, 6], finish_reason=v1.FinishReason.LENGTH)
        return v1.GenerateResponse(choices=[choice])

    async def stream(self, request: v1.StreamRequest, context: Any) -> AsyncIterator[v1.StreamResponse]:
        assert request.request is not None
        for word in (request.request.text or "").split():
            yield v1.StreamResponse(text=word, token_ids=[len(word)])


class Models:
    """One model."""

    async def list_models(self, request: v1.ListModelsRequest, context: Any) -> v1.ListModelsResponse:
        return v1.ListModelsResponse(models=[v1.Model(name="tiny")])


@asynccontextmanager
async def running() -> AsyncIterator[str]:
    server = Server("127.0.0.1:0", on_error=lambda method, error: None)
    server.add("penstock.v1.GenerationService", Generation())
    server.add("penstock.v1.ModelService", Models())
    health = Health()
    health.attach(server)
    health.set_all(True)
    reflection.enable(server)
    address = await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


async def buf_curl(address: str, path: str, *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments, f"http://{address}{path}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def messages(text: str) -> list[Any]:
    """JSON documents, one after another."""
    decoder, found, rest = json.JSONDecoder(), [], text.strip()
    while rest:
        document, end = decoder.raw_decode(rest)
        found.append(document)
        rest = rest[end:].strip()
    return found


@pytest.mark.parametrize("protocol", ["grpc-v1", "grpc-v1alpha"])
async def test_services_and_methods_are_listed(protocol: str) -> None:
    async with running() as address:
        code, services, err = await buf_curl(address, "", "--list-services", "--reflect-protocol", protocol)
        assert code == 0, err
        code, methods, err = await buf_curl(address, "", "--list-methods", "--reflect-protocol", protocol)
        assert code == 0, err
    assert set(services.split()) == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "penstock.v1.GenerationService",
        "penstock.v1.ModelService",
    }
    assert {"penstock.v1.GenerationService/Stream", "penstock.v1.ModelService/Tokenize"} <= set(methods.split())


async def test_methods_of_every_shape_are_called() -> None:
    async with running() as address:
        code, out, err = await buf_curl(address, "/penstock.v1.GenerationService/Generate", "-d", '{"text": "hello"}')
        assert code == 0, err
        choice = {"text": "hello there", "tokenIds": [5, 6], "finishReason": "FINISH_REASON_LENGTH"}
        assert messages(out) == [{"choices": [choice]}]
        data = '{"request": {"text": "one three"}}'
        code, out, err = await buf_curl(address, "/penstock.v1.GenerationService/Stream", "-d", data)
        assert code == 0, err
        assert messages(out) == [{"text": "one", "tokenIds": [3]}, {"text": "three", "tokenIds": [5]}]
        code, out, err = await buf_curl(address, "/grpc.health.v1.Health/Check", "-d", "{}")
        assert code == 0, err
        assert messages(out) == [{"status": "SERVING"}]


async def test_errors_are_readable() -> None:
    async with running() as address:
        code, _, err = await buf_curl(address, "/penstock.v1.GenerationService/Generate", "-d", "{}")
        assert code != 0
        told = json.loads(err)
        assert (told["code"], told["message"]) == ("invalid_argument", "text: is empty")
        assert {detail["type"] for detail in told["details"]} == {"google.rpc.ErrorInfo", "google.rpc.BadRequest"}
        code, _, err = await buf_curl(address, "/penstock.v1.ModelService/GetModel", "-d", "{}")
        assert (code != 0, json.loads(err)["code"]) == (True, "unimplemented")


async def test_reflection_refuses_what_is_not_there() -> None:
    async with running() as address, open_channel(address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=5)
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.Such"))
        answer = await call.read()
        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
        call.cancel()
