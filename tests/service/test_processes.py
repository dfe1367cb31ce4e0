"""Several service processes on one port, as real processes."""

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import psutil
import pytest

from penstock.rpc.calls import ResponseStream
from penstock.rpc.channel import open_channel
from penstock.rpc.errors import RpcError
from penstock.rpc.server import BindError
from penstock.rpc.stubs import GenerationStub
from penstock.service.processes import MAX_DEATHS, reserve_port
from penstock.v1 import StreamRequest, StreamResponse
from service.fake_scheduler import FakeScheduler, says
from service.harness import request, until
from service.test_process import COMMAND, process_of

CLIENTS = 32
"""The kernel chooses by a hash of both ends: all go to the same of two processes once in 2³¹ runs."""


@asynccontextmanager
async def several(scheduler: FakeScheduler, *flags: str) -> AsyncIterator[tuple[psutil.Process, str]]:
    """The parent of two service processes, and their address."""
    async with process_of(scheduler, "--service-processes=2", *flags) as (child, address):
        parent = psutil.Process(child.pid)
        try:
            yield parent, address
        finally:
            workers = parent.children() if parent.is_running() else []
            for worker in workers:
                worker.kill()


def connections(worker: psutil.Process, address: str) -> int:
    port = int(address.rpartition(":")[2])
    return sum(one.status == "ESTABLISHED" and one.laddr.port == port for one in worker.net_connections())


def test_connections_are_spread_and_a_death_takes_only_its_own_streams() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says("x" * 400, end=False), period_s=0.01)
        async with scheduler, several(scheduler) as (parent, address):
            workers = parent.children()
            assert len(workers) == 2
            assert len({hello.service_id for hello in scheduler.hellos}) == 2
            channels = [open_channel(address) for _ in range(CLIENTS)]
            calls = [GenerationStub(channel).stream(StreamRequest(request(max_tokens=400))) for channel in channels]
            for call in calls:
                assert await call.read() is not None
            held = [connections(worker, address) for worker in workers]
            assert sum(held) == CLIENTS
            assert min(held) > 0

            workers[0].kill()
            ends = await asyncio.gather(*(drained(call) for call in calls))
            assert ends.count(grpc.StatusCode.UNAVAILABLE) == held[0]
            assert ends.count(grpc.StatusCode.OK) == held[1]

            await until(lambda: len(parent.children()) == 2 and len(scheduler.hellos) >= 3)
            assert workers[1] in parent.children()
            fresh = [open_channel(address) for _ in range(8)]
            for channel in fresh:
                await GenerationStub(channel).generate(request(max_tokens=1), timeout=5)
            for channel in (*channels, *fresh):
                await channel.close()

    asyncio.run(scenario())


async def drained(call: ResponseStream[StreamResponse]) -> grpc.StatusCode:
    """How a stream ended."""
    try:
        async for _ in call:
            pass
    except RpcError as error:
        return error.code
    return grpc.StatusCode.OK


def test_sigterm_drains_all_of_them() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler(answer=says("x" * 100, end=False), period_s=0.01)
        async with scheduler, process_of(scheduler, "--service-processes=2") as (child, address):
            channels = [open_channel(address) for _ in range(CLIENTS)]
            calls = [GenerationStub(channel).stream(StreamRequest(request(max_tokens=100))) for channel in channels]
            for call in calls:
                assert await call.read() is not None
            workers = psutil.Process(child.pid).children()
            child.send_signal(signal.SIGTERM)
            assert set(await asyncio.gather(*(drained(call) for call in calls))) == {grpc.StatusCode.OK}
            async with asyncio.timeout(5):
                assert await child.wait() == 0
            assert not any(worker.is_running() for worker in workers)
            for channel in channels:
                await channel.close()

    asyncio.run(scenario())


def test_too_many_deaths_end_the_service() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        async with scheduler, several(scheduler) as (parent, _):
            survivor = parent.children()[1]
            killed: set[int] = {survivor.pid}
            for _ in range(MAX_DEATHS + 1):
                await until(lambda: any(one.pid not in killed for one in parent.children()))
                victim = next(one for one in parent.children() if one.pid not in killed)
                killed.add(victim.pid)
                victim.kill()
            assert await asyncio.to_thread(parent.wait, 10) in (1, None)  # None: the other wait for it came first
            await until(lambda: not survivor.is_running())

    asyncio.run(scenario())


def test_the_processes_end_with_their_parent() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        async with scheduler, several(scheduler) as (parent, _):
            workers = parent.children()
            parent.kill()
            await until(lambda: not any(worker.is_running() for worker in workers))

    asyncio.run(scenario())


@pytest.mark.parametrize("shares", [False, True])
def test_a_port_in_use_is_refused(shares: bool) -> None:
    with socket.socket() as other:
        if shares:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(BindError, match=taken):
            reserve_port(taken)


def test_a_reserved_port_is_kept_from_others_and_given_back() -> None:
    with reserve_port("127.0.0.1:0") as holder:
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        with pytest.raises(BindError):
            reserve_port(address)
    reserve_port(address).close()


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--grpc-address=unix:/tmp/penstock-test"], 2, "Unix socket"),
        (["--service-processes=0"], 2, "service-processes"),
        (["--api-keys=a,a"], 2, "api_keys"),
        (["--grpc-address=203.0.113.1:50999", "--api-keys=k", "--allow-plaintext"], 1, "203.0.113.1:50999"),
    ],
)
def test_a_start_that_fails_is_one_line(flags: list[str], code: int, named: str) -> None:
    several = [] if any("processes" in flag for flag in flags) else ["--service-processes=3"]
    done = subprocess.run([*COMMAND, *several, *flags], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


def test_keys_of_callers_are_on_no_command_line() -> None:
    async def scenario() -> None:
        environment = {**os.environ, "PENSTOCK_API_KEYS": "hidden-key"}
        scheduler = FakeScheduler()
        async with scheduler:
            read_end, write_end = os.pipe()
            own = [f"--schedulers={scheduler.address}", "--grpc-address=127.0.0.1:0", f"--ready-fd={write_end}"]
            child = await asyncio.create_subprocess_exec(
                *(*COMMAND, "--service-processes=2", *own), env=environment, pass_fds=(write_end,)
            )
            os.close(write_end)
            with os.fdopen(read_end) as pipe:
                address = json.loads(await asyncio.to_thread(pipe.readline))["address"]
            family = [child.pid, *(one.pid for one in psutil.Process(child.pid).children())]
            assert len(family) == 3
            assert not any("hidden-key" in " ".join(psutil.Process(pid).cmdline()) for pid in family)
            channel = open_channel(address)
            with pytest.raises(RpcError) as caught:
                await GenerationStub(channel).generate(request(), timeout=5)
            assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
            metadata = (("authorization", "Bearer hidden-key"),)
            await GenerationStub(channel).generate(request(max_tokens=1), timeout=5, metadata=metadata)
            await channel.close()
            child.terminate()
            async with asyncio.timeout(10):
                assert await child.wait() == 0

    asyncio.run(scenario())
