"""The service as a process of its own."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from penstock.rpc.channel import open_channel
from penstock.rpc.errors import RpcError
from penstock.rpc.stubs import GenerationStub, ModelStub
from penstock.v1 import ErrorReason, ListModelsRequest, Load, SchedulerState, StreamRequest
from service.fake_scheduler import FakeScheduler, says
from service.harness import request, until

GENERATION = "penstock.v1.GenerationService"
MODELS = "penstock.v1.ModelService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
COMMAND = (sys.executable, "-m", "penstock.service.main")


@asynccontextmanager
async def process_of(scheduler: FakeScheduler, *flags: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A service process and its address, killed if it is still there at the end."""
    reader, writer = os.pipe()
    child = await asyncio.create_subprocess_exec(
        *COMMAND,
        "--grpc-address=127.0.0.1:0",
        f"--schedulers={scheduler.address}",
        f"--ready-fd={writer}",
        *flags,
        pass_fds=(writer,),
    )
    os.close(writer)
    try:
        with os.fdopen(reader) as pipe:
            facts = json.loads(await asyncio.to_thread(pipe.readline))
        assert facts["role"] == "service"
        assert facts["pid"] == child.pid
        yield child, facts["address"]
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def health(channel: grpc.aio.Channel, service: str) -> int:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    status: int = (await check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status
    return status


async def until_health(channel: grpc.aio.Channel, service: str, status: int) -> None:
    async with asyncio.timeout(5):
        while await health(channel, service) != status:
            await asyncio.sleep(0.02)


def test_health_follows_the_scheduler_and_sigterm_drains() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says("x" * 100, end=False), period_s=0.01)
        async with scheduler, process_of(scheduler) as (child, address):
            channel = open_channel(address)
            for service in (GENERATION, ""):
                await until_health(channel, service, SERVING)
            assert await health(channel, MODELS) == SERVING
            scheduler.load = Load(state=SchedulerState.UNRESPONSIVE)
            await until_health(channel, GENERATION, NOT_SERVING)
            await until_health(channel, "", NOT_SERVING)
            assert await health(channel, MODELS) == SERVING
            models = (await ModelStub(channel).list_models(ListModelsRequest())).models
            assert models[0].replicas[0].ready is False
            scheduler.load = Load(state=SchedulerState.SERVING, max_running=8)
            await until_health(channel, GENERATION, SERVING)

            call = GenerationStub(channel).stream(StreamRequest(request(max_tokens=100)))
            assert await call.read() is not None
            child.send_signal(signal.SIGTERM)
            await until_health(channel, GENERATION, NOT_SERVING)
            with pytest.raises(RpcError) as caught:
                await GenerationStub(channel).generate(request())
            assert caught.value.reason == ErrorReason.DRAINING
            assert len([message async for message in call]) > 50
            async with asyncio.timeout(5):
                assert await child.wait() == 0
            await channel.close()

    asyncio.run(scenario())


def test_a_stream_that_is_replaced_is_no_matter_of_health_and_a_scheduler_that_stays_away_is() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says("x", end=False))
        async with scheduler, process_of(scheduler) as (_, address):
            channel = open_channel(address)
            await until_health(channel, GENERATION, SERVING)
            for times in range(2, 5):
                scheduler.cut()
                while len(scheduler.hellos) < times:
                    assert await health(channel, GENERATION) == SERVING
            await scheduler.stop()
            await until_health(channel, GENERATION, NOT_SERVING)
            await scheduler.start()
            await until_health(channel, GENERATION, SERVING)
            await channel.close()

    asyncio.run(scenario())


def test_what_outlives_the_grace_is_cut_off_and_cancelled() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(held=True)
        async with scheduler, process_of(scheduler, "--drain-grace=0.2") as (child, address):
            channel = open_channel(address)
            await until_health(channel, GENERATION, SERVING)
            call = asyncio.ensure_future(GenerationStub(channel).generate(request()))
            await until(lambda: len(scheduler.submits) == 1)
            child.send_signal(signal.SIGINT)
            async with asyncio.timeout(5):
                assert await child.wait() == 0
            with pytest.raises(RpcError) as caught:
                await call
            assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, ErrorReason.DRAINING)
            assert caught.value.retry_after_s
            await until(lambda: len(scheduler.cancels) == 1)
            await channel.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--grpc-address=0.0.0.0:0"], 2, "api_keys"),
        (["--no-such-flag"], 2, "no-such-flag"),
        (["--otlp-endpoint=ftp://x"], 2, "otlp_endpoint"),
        (["--api-keys=a,a"], 2, "api_keys"),
        (["--tls-certificate=/nonexistent", "--tls-key=/nonexistent"], 2, "/nonexistent"),
        (["--grpc-address=203.0.113.1:50999", "--api-keys=k", "--allow-plaintext"], 1, "203.0.113.1:50999"),
    ],
)
def test_a_start_that_fails_is_one_line(flags: list[str], code: int, named: str) -> None:
    done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code
    assert named in done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.startswith(("E0", "E1", "I"))]) == 1
