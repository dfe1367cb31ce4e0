"""The link between service and gate breaks in every way; no client sees anything, no id is lost or doubled."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from support.clients import Caller, caller, collect, request, status_at_rest
from support.stack import healthy, scheduler, service, wait_until
from support.tcp_proxy import TcpProxy
from support.tiny_llama import build_tiny_llama

STREAMS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", tokenizer=True)


def work() -> list[list[int]]:
    return [[3 + i, 7, 9] for i in range(STREAMS)]


async def all_streams(stubs: Caller) -> list[list[int]]:
    answers = await asyncio.gather(
        *(collect(stubs, request(prompt, max_tokens=400, ignore_eos=True)) for prompt in work())
    )
    return [ids for ids, _ in answers]


async def reset_and_refuse(proxy: TcpProxy) -> None:
    await asyncio.sleep(1)
    await proxy.refuse()
    await asyncio.sleep(2)
    await proxy.start()


async def silence(proxy: TcpProxy) -> None:
    await asyncio.sleep(1)
    proxy.silence()
    await asyncio.sleep(5)
    proxy.speak()


async def reset_often(proxy: TcpProxy) -> None:
    for _ in range(8):
        await asyncio.sleep(0.7)
        proxy.reset()


@pytest.mark.parametrize("fault", [reset_and_refuse, silence, reset_often])
async def test_no_client_sees_a_fault_of_the_link(model: Path, fault: Callable[[TcpProxy], Awaitable[None]]) -> None:
    settings = {"executor": "simulated", "step_us": 15_000, "plans_in_flight": 2, "max_sequences": 64}
    with scheduler(model, **settings) as gate:
        proxy = TcpProxy(gate.address)
        through = await proxy.start()
        try:
            with service([gate.address]) as direct, service([through]) as faulty:
                for front in (direct, faulty):
                    await asyncio.to_thread(wait_until, lambda address=front.address: healthy(address))
                async with caller(direct.address) as stubs:
                    expected = await all_streams(stubs)
                async with caller(faulty.address) as stubs:
                    streams = asyncio.create_task(all_streams(stubs))
                    await fault(proxy)
                    assert await streams == expected
                assert proxy.connections >= 2
                await status_at_rest(gate.address)
        finally:
            await proxy.stop()


async def test_goaway_every_second(model: Path) -> None:
    """The gate ends every connection after a second (GOAWAY); streams go on over new ones."""
    settings = {"executor": "simulated", "step_us": 15_000, "plans_in_flight": 2, "max_sequences": 64}
    with scheduler(model, **settings, max_connection_age_s=1) as gate, service([gate.address]) as front:
        await asyncio.to_thread(wait_until, lambda: healthy(front.address))
        async with caller(front.address) as stubs:
            answers = await all_streams(stubs)
            assert [len(ids) for ids in answers] == [400] * STREAMS
            assert answers == await all_streams(stubs)
