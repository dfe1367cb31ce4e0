"""The process that computes is killed, again and again: streams pause and go on, and nothing is lost."""

import asyncio
from pathlib import Path

import psutil
import pytest

from penstock.v1 import FinishReason, GenerateRequest, GetStatusResponse, SchedulerState
from support.clients import caller, collect, request, status, status_at_rest
from support.stack import Stack, stack, wait_until
from support.tiny_llama import TinyLlama, build_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyLlama(max_position_embeddings=2048)
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", shape=shape, tokenizer=True)


def worker_of(roles: Stack) -> psutil.Process:
    (worker,) = roles.engine.children()
    return worker


def requests() -> list[GenerateRequest]:
    """Greedy and seeded ones, of all lengths; at float32 their tokens do not depend on what happens to others."""
    greedy = [request([5 + number, 7, 9], max_tokens=40 * number + 200, ignore_eos=True) for number in range(6)]
    seeded = [request([3, 8], max_tokens=500, temperature=0.9, seed=number, ignore_eos=True) for number in range(6)]
    return greedy + seeded


async def test_streams_go_on_when_the_worker_is_killed(model: Path) -> None:
    with stack(model, executor="multiprocess", device="cpu", max_sequences=8, threads=1) as roles:
        async with caller(roles.address) as stubs:
            undisturbed = [await collect(stubs, one) for one in requests()]
            streams = [asyncio.create_task(collect(stubs, one)) for one in requests()]
            for pause in (0.5, 0.2, 2.0):  # while it works, while it starts, while it works again
                await asyncio.sleep(pause)
                before = worker_of(roles)
                before.kill()
                await asyncio.to_thread(wait_until, lambda pid=before.pid: _another(roles, pid), 30.0, "another worker")
            disturbed = await asyncio.gather(*streams)
            assert disturbed == undisturbed
            assert all(reason is FinishReason.LENGTH for _, reason in disturbed)
            seen = await status_at_rest(roles.scheduler.address)
            assert seen.load is not None
            assert seen.load.free_blocks == seen.load.total_blocks


async def test_the_gate_says_that_it_recovers(model: Path) -> None:
    with stack(model, executor="multiprocess", device="cpu", threads=1) as roles:
        worker_of(roles).kill()
        states = set[SchedulerState]()
        async with asyncio.timeout(30):
            while states != {SchedulerState.RECOVERING, SchedulerState.SERVING}:
                state = _state_of(await status(roles.scheduler.address))
                if state is SchedulerState.RECOVERING or states:
                    states.add(state)
                await asyncio.sleep(0.02)
        async with caller(roles.address) as stubs:
            ids, _ = await collect(stubs, request([5, 6], max_tokens=9, ignore_eos=True))
        assert len(ids) == 9


async def test_the_worker_ends_with_its_engine(model: Path) -> None:
    with stack(model, executor="multiprocess", device="cpu", threads=1) as roles:
        worker = worker_of(roles)
        roles.engine.kill()
        await asyncio.to_thread(worker.wait, 10)


def _state_of(seen: GetStatusResponse) -> SchedulerState:
    return seen.load.state if seen.load is not None else SchedulerState.UNSPECIFIED


def _another(roles: Stack, pid: int) -> bool:
    workers = roles.engine.children()
    return len(workers) == 1 and workers[0].pid != pid and workers[0].status() != psutil.STATUS_ZOMBIE
