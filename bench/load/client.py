"""One client process of a benchmark: many streams over a few connections.

It reads one JSON object (``Job``) from its standard input, connects, writes a line "ready", waits for a line "go", runs
the streams and writes one JSON object: a row for each stream, and the processor time that it took.
"""

import asyncio
import json
import sys
import time
from typing import Any, TypedDict

from penstock.client import AsyncClient, RpcError


class Job(TypedDict):
    """What one client process does."""

    address: str
    connections: int
    """Each goes to one of the service's processes."""
    at_once: int
    """Streams that run at the same time."""
    seconds: float
    """After so long every stream that still runs is cancelled."""
    temperature: float
    requests: list[tuple[list[int], int]]
    """Ids of a prompt, and tokens to make."""


class Stream:
    """What was seen of one stream, times in seconds since the start."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.arrivals: list[float] = []
        self.tokens = 0
        self.ended = False
        self.error = ""

    async def run(self, client: AsyncClient, prompt: list[int], max_tokens: int, job: Job, start: float) -> None:
        """Run it to its end, an error or the end of the time."""
        self.begun = time.perf_counter() - start
        try:
            stream = client.stream(
                prompt, max_tokens=max_tokens, ignore_eos=True, temperature=job["temperature"], timeout_s=None
            )
            async for chunk in stream:
                self.arrivals.append(time.perf_counter() - start)
                self.tokens += len(chunk.token_ids)
            self.ended = True
        except RpcError as error:
            self.error = str(error)

    def row(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: getattr(self, name) for name in ("begun", "arrivals", "tokens", "ended", "error")}


async def run(job: Job) -> dict[str, Any]:
    """Do the job."""
    clients = [AsyncClient(job["address"]) for _ in range(job["connections"])]
    try:
        await asyncio.gather(*(client.models(timeout_s=30) for client in clients))
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return await _timed(job, clients)
    finally:
        for client in clients:
            await client.close()


async def _timed(job: Job, clients: list[AsyncClient]) -> dict[str, Any]:
    places = asyncio.Semaphore(job["at_once"])
    streams = [Stream() for _ in job["requests"]]
    start, busy = time.perf_counter(), time.process_time()

    async def one(number: int) -> None:
        prompt, max_tokens = job["requests"][number]
        async with places:
            await streams[number].run(clients[number % len(clients)], prompt, max_tokens, job, start)

    tasks = [asyncio.create_task(one(number)) for number in range(len(streams))]
    _, late = await asyncio.wait(tasks, timeout=job["seconds"])
    wall, busy = time.perf_counter() - start, time.process_time() - busy
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {"wall": wall, "busy": busy, "streams": [stream.row() for stream in streams]}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.loads(sys.stdin.readline())))))
