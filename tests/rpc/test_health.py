"""grpc.health.v1 as load balancers use it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from penstock.rpc.channel import open_channel
from penstock.rpc.health import OVERALL, Health
from penstock.rpc.server import Server

MODEL = "penstock.v1.ModelService"
STATUS = health_pb2.HealthCheckResponse


@asynccontextmanager
async def serving(health: Health) -> AsyncIterator[tuple[Server, Any]]:
    server = Server("127.0.0.1:0", on_error=lambda method, error: None)
    server.add(MODEL, object())
    health.attach(server)
    address = await server.start()
    try:
        async with open_channel(address) as channel:
            yield server, health_pb2_grpc.HealthStub(channel)
    finally:
        await server.stop(0)


def request(service: str) -> Any:
    return health_pb2.HealthCheckRequest(service=service)


async def status(watch: Any) -> Any:
    async with asyncio.timeout(5):
        return (await watch.read()).status


async def test_check_tells_each_service() -> None:
    health = Health()
    async with serving(health) as (_, stub):
        for service in (OVERALL, MODEL):
            assert (await stub.Check(request(service), timeout=5)).status == STATUS.NOT_SERVING
        health.set(MODEL, True)
        assert (await stub.Check(request(MODEL), timeout=5)).status == STATUS.SERVING
        assert (await stub.Check(request(OVERALL), timeout=5)).status == STATUS.NOT_SERVING
        health.set_all(True)
        assert (await stub.Check(request(OVERALL), timeout=5)).status == STATUS.SERVING
        listed = await stub.List(health_pb2.HealthListRequest(), timeout=5)
        assert {name: one.status for name, one in listed.statuses.items()} == {
            "": STATUS.SERVING,
            MODEL: STATUS.SERVING,
        }


async def test_check_of_an_unknown_service_is_not_found() -> None:
    async with serving(Health()) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(request("nobody"), timeout=5)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watch_pushes_every_change() -> None:
    health = Health()
    async with serving(health) as (_, stub):
        watch = stub.Watch(request(MODEL), timeout=20)
        unknown = stub.Watch(request("later"), timeout=20)
        assert await status(watch) == STATUS.NOT_SERVING
        assert await status(unknown) == STATUS.SERVICE_UNKNOWN
        for serving_now in (True, False, True):
            health.set(MODEL, serving_now)
            assert await status(watch) == (STATUS.SERVING if serving_now else STATUS.NOT_SERVING)
        health.set("later", True)
        assert await status(unknown) == STATUS.SERVING
        # Neither the other service's change nor a repeated status is told.
        health.set(MODEL, True)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await watch.read()


async def test_a_watcher_more_than_allowed_is_refused_and_leavers_make_room() -> None:
    async with serving(Health(max_watchers=1)) as (_, stub):
        first = stub.Watch(request(MODEL), timeout=20)
        await status(first)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Watch(request(MODEL), timeout=5).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        for after_s in (0.05, 0.2, 1.0, 3.0):
            if await admitted(stub, after_s):
                return
        pytest.fail("the place of the one that left stayed taken")


async def admitted(stub: Any, after_s: float) -> bool:
    await asyncio.sleep(after_s)
    try:
        await stub.Watch(request(MODEL), timeout=5).read()
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_a_stop_tells_watchers_and_does_not_wait_for_them() -> None:
    health = Health()
    async with serving(health) as (server, stub):
        health.set_all(True)
        watch = stub.Watch(request(OVERALL), timeout=20)
        assert await status(watch) == STATUS.SERVING
        async with asyncio.timeout(5):
            await server.stop(60)
        assert await status(watch) == STATUS.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
