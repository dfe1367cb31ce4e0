"""What only shows with real processes: restarts, drains, engines that stand still, readers that do not read."""

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from penstock.rpc.errors import RpcError
from penstock.v1 import ErrorReason, FinishReason, GenerateRequest, StreamRequest
from support.clients import Caller, caller, collect, request, status, status_at_rest
from support.stack import healthy, scheduler, service, stack, wait_until
from support.tcp_proxy import TcpProxy
from support.tiny_llama import TinyLlama, build_tiny_llama

SIMULATED: dict[str, Any] = {"executor": "simulated", "plans_in_flight": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyLlama(max_position_embeddings=65_536)
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", shape=shape, tokenizer=True)


def long(number: int, max_tokens: int) -> GenerateRequest:
    return request([5 + number, 7], max_tokens=max_tokens, ignore_eos=True)


async def begun(stubs: Caller, generate: GenerateRequest) -> tuple[Any, list[int]]:
    """A stream and its first ids."""
    stream = stubs.generation.stream(StreamRequest(request=generate), timeout=60)
    first = await stream.read()
    assert first is not None
    return stream, list(first.token_ids)


async def rest_of(stream: Any, ids: list[int]) -> list[int]:
    async for response in stream:
        ids += response.token_ids
    return ids


async def test_a_scheduler_that_is_killed_and_comes_back(model: Path) -> None:
    """What it ran ends with UNAVAILABLE, soon; what comes after that is served by its next life."""
    with scheduler(model, **SIMULATED, step_us=10_000) as first, service([first.address]) as front:
        await asyncio.to_thread(wait_until, lambda: healthy(front.address))
        async with caller(front.address) as stubs:
            streams = [await begun(stubs, long(number, 30_000)) for number in range(8)]
            first.process.kill()
            first.process.wait(10)
            with scheduler(model, **SIMULATED, grpc_address=first.address) as second:
                for stream, ids in streams:
                    with pytest.raises(RpcError) as caught:
                        await rest_of(stream, ids)
                    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
                    assert caught.value.reason == ErrorReason.SCHEDULER_LOST
                    assert caught.value.retry_after_s
                await asyncio.to_thread(wait_until, lambda: healthy(front.address))
                ids, reason = await collect(stubs, long(0, 300))
                assert (len(ids), reason) == (300, FinishReason.LENGTH)
                await status_at_rest(second.address)


async def test_a_drain_finishes_streams_although_the_link_breaks(model: Path) -> None:
    with scheduler(model, **SIMULATED, step_us=5000) as gate:
        proxy = TcpProxy(gate.address)
        through = await proxy.start()
        try:
            with service([through]) as front:
                await asyncio.to_thread(wait_until, lambda: healthy(front.address))
                async with caller(front.address) as stubs:
                    expected = [await collect(stubs, long(number, 400)) for number in range(2)]
                    streams = [await begun(stubs, long(number % 2, 400)) for number in range(8)]
                    gate.process.send_signal(signal.SIGTERM)
                    for _ in range(4):
                        await asyncio.sleep(0.4)
                        proxy.reset()
                    for number, (stream, ids) in enumerate(streams):
                        assert await rest_of(stream, ids) == expected[number % 2][0]
                assert await asyncio.to_thread(gate.process.wait, 10) == 0
        finally:
            await proxy.stop()


async def test_a_service_that_drains_finishes_its_streams(model: Path) -> None:
    with stack(model, **SIMULATED, step_us=5000) as roles:
        async with caller(roles.address) as stubs:
            streams = [await begun(stubs, long(number, 300)) for number in range(8)]
            roles.service.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            with pytest.raises(RpcError) as caught:
                await collect(stubs, long(0, 5))
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
            assert caught.value.retry_after_s
            for stream, ids in streams:
                assert len(await rest_of(stream, ids)) == 300
        assert await asyncio.to_thread(roles.service.process.wait, 10) == 0
        assert (await status(roles.scheduler.address)).attempts == 0, "nothing is kept for who has gone in order"


async def test_nobody_is_sent_to_an_engine_that_stands_still(model: Path) -> None:
    with stack(model, **SIMULATED, step_us=5000) as roles:
        async with caller(roles.address) as stubs:
            stream, ids = await begun(stubs, long(0, 800))
            roles.engine.send_signal(signal.SIGSTOP)
            try:
                early = asyncio.create_task(collect(stubs, long(1, 5)))
                await asyncio.to_thread(wait_until, lambda: not healthy(roles.address))
                began = time.monotonic()
                with pytest.raises(RpcError) as caught:
                    await collect(stubs, long(2, 5))
                assert time.monotonic() - began < 0.5
                assert caught.value.code is grpc.StatusCode.UNAVAILABLE
                assert caught.value.reason == ErrorReason.NO_SCHEDULER
                assert caught.value.retry_after_s
            finally:
                roles.engine.send_signal(signal.SIGCONT)
            assert len(await rest_of(stream, ids)) == 800
            assert len((await early)[0]) == 5
        await status_at_rest(roles.scheduler.address)


async def test_a_reader_that_reads_nothing_costs_its_ids_and_slows_nobody(model: Path) -> None:
    """40,000 tokens wait as four bytes each, and come in few large messages."""
    tokens = 40_000
    with stack(model, **SIMULATED, step_us=0) as roles:
        processes = [psutil.Process(roles.service.pid), psutil.Process(roles.scheduler.pid)]
        async with caller(roles.address) as stubs:
            await collect(stubs, long(1, 2000))
            before = [process.memory_info().rss for process in processes]
            slow, ids = await begun(stubs, long(0, tokens))
            neighbour = await asyncio.gather(*(collect(stubs, long(number, 2000)) for number in range(1, 5)))
            assert [len(one) for one, _ in neighbour] == [2000] * 4
            await status_at_rest(roles.scheduler.address)
            after = [process.memory_info().rss for process in processes]
            for old, new in zip(before, after, strict=True):
                assert new - old < 24 << 20
            messages = 1
            async for response in slow:
                ids += response.token_ids
                messages += 1
            assert len(ids) == tokens
            assert messages < tokens / 4
