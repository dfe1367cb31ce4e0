"""A thousand streams are cancelled at random moments, and nothing is left of them."""

import asyncio
import contextlib
import gc
import random
from pathlib import Path

import psutil
import pytest

from penstock.rpc.errors import RpcError
from penstock.v1 import StreamRequest
from support.clients import Caller, caller, collect, request, status, until
from support.stack import stack
from support.tiny_llama import build_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", tokenizer=True)


def open_files(process: psutil.Process) -> dict[int, str]:
    """File descriptors and what they are."""
    found = {}
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found[int(entry.name)] = str(entry.readlink())
    return found


async def cancelled_stream(stubs: Caller, rng: random.Random) -> None:
    stream = stubs.generation.stream(StreamRequest(request=request([rng.randrange(300)] * 30, max_tokens=400)))
    stop_after, delay = rng.randint(0, 30), rng.choice([0, 0, 0.001, 0.02, 0.1])
    try:
        while stop_after > 0:
            response = await stream.read()
            if response is None:
                return
            stop_after -= len(response.token_ids)
        await asyncio.sleep(delay)
    except RpcError as error:
        raise AssertionError(f"failed before it was cancelled: {error}") from error
    finally:
        stream.cancel()


async def test_a_thousand_cancelled_streams_leave_nothing(model: Path) -> None:
    settings = {"executor": "simulated", "step_us": 2000, "plans_in_flight": 2, "max_sequences": 32}
    rng = random.Random(5)
    with stack(model, **settings, max_waiting=2000) as roles:
        processes = [psutil.Process(roles.service.pid), psutil.Process(roles.scheduler.pid), roles.engine]
        async with caller(roles.address) as stubs:
            await collect(stubs, request([5] * 30, max_tokens=20))
            fds = [open_files(process) for process in processes]
            threads = [process.num_threads() for process in processes]
            for _ in range(10):
                await asyncio.gather(*(cancelled_stream(stubs, rng) for _ in range(100)))

            async def at_rest() -> bool:
                seen = await status(roles.scheduler.address)
                load = seen.load
                assert load is not None
                return (load.waiting, load.running, seen.attempts, load.free_blocks) == (0, 0, 0, load.total_blocks)

            await until(at_rest, what="every attempt, sequence and block is given back")
            ids, _ = await collect(stubs, request([5] * 30, max_tokens=20))
            assert len(ids) == 20

        async def as_before() -> bool:
            gc.collect()  # grpc.aio keeps a closed channel's socket until its calls are collected: those of `status`
            return all(len(open_files(p)) <= len(before) + 2 for p, before in zip(processes, fds, strict=True))

        try:
            await until(as_before)
        except TimeoutError:
            more = {p.name(): open_files(p).items() - before.items() for p, before in zip(processes, fds, strict=True)}
            raise AssertionError(f"files are left open: {more}") from None
        assert all(p.num_threads() <= before + 2 for p, before in zip(processes, threads, strict=True))
