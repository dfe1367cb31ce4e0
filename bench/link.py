"""The link between service and gate at 100,000 tokens a second: 256 samples, one id each, every 2.5 ms.

The gate is a real scheduler's with the simulated engine; the service's side is its link alone, in a process of its own:
every message is decoded and every id is with its attempt at once, but nobody is woken for it (``served.py`` has the
whole service). What each side costs is its processor time over the wall.
``python bench/link.py [--seconds 8]``
"""

import argparse
import asyncio
import multiprocessing
import secrets
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from record import save

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from penstock.local import embedded
from penstock.rpc.channel import open_channel
from penstock.service.attempts import Attempt
from penstock.service.catalogue import Tokenizers
from penstock.service.columns import pack_u32
from penstock.service.link import Link, LinkSettings
from penstock.v1 import CancelReason, Submit, SubmitSample, SubmitSampling
from support.stack import scheduler

SAMPLES = 256
STEP_US = 2500


def _submit(link: Link, tokens: int) -> Attempt:
    attempt = Attempt(
        Submit(
            attempt_id=secrets.token_bytes(16),
            prompt_ids=pack_u32(range(16)),
            prompt_tokens=16,
            samples=[SubmitSample(seed=1)],
            sampling=SubmitSampling(top_p=1.0, repetition_penalty=1.0, max_tokens=tokens, ignore_eos=True),
        )
    )
    link.submit(attempt)
    return attempt


async def _run(link: Link, tokens: int) -> int:
    """All attempts, to their end; how many ids came."""
    attempts = [_submit(link, tokens) for _ in range(SAMPLES)]
    while not all(attempt.complete for attempt in attempts):
        await asyncio.sleep(0.05)
    taken = sum([len(await attempt.take()) for attempt in attempts])
    for attempt in attempts:
        link.release(attempt, CancelReason.CLIENT)
    return taken


async def _serve_link(address: str, tokens: int, pipe: Connection) -> None:
    link = Link(
        address,
        service_id="bench",
        tokenizers=Tokenizers(),
        settings=LinkSettings(),
        open_channel=open_channel,
        on_change=lambda: None,
    )
    running = asyncio.create_task(link.run())
    while not link.usable:
        await asyncio.sleep(0.05)
    own = psutil.Process()
    for count in (8, tokens):
        pipe.send("begin")
        before, start = sum(own.cpu_times()[:2]), time.perf_counter()
        taken = await _run(link, count)
        wall = time.perf_counter() - start
        pipe.send((taken, wall, sum(own.cpu_times()[:2]) - before))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def link_process(address: str, tokens: int, pipe: Connection) -> None:
    """The service's side."""
    asyncio.run(_serve_link(address, tokens, pipe))


def receive(pipe: Connection) -> Any:
    """What the other process says within a minute; it ends the benchmark by saying nothing."""
    if not pipe.poll(60):
        raise TimeoutError("the link's process says nothing")
    return pipe.recv()


def measure(seconds: float) -> dict[str, Any]:
    """Both sides' shares of a core."""
    tokens = min(int(seconds * 1e6 / STEP_US), 1900)
    context = multiprocessing.get_context("spawn")
    settings = {"executor": "simulated", "step_us": STEP_US, "plans_in_flight": 2, "log_level": "warning"}
    sizes = {"max_sequences": SAMPLES, "max_step_tokens": 8192, "block_tokens": 64, "num_blocks": SAMPLES * 32}
    with scheduler(embedded.path(), **settings, **sizes) as role:
        gate = psutil.Process(role.pid)
        ours, theirs = context.Pipe()
        process = context.Process(target=link_process, args=(role.address, tokens, theirs))
        process.start()
        for _ in range(2):
            receive(ours)
            before = sum(gate.cpu_times()[:2])
            taken, wall, service_cpu = receive(ours)
            gate_cpu = sum(gate.cpu_times()[:2]) - before
        process.join(10)
    return {
        "tokens": taken,
        "tokens_per_s": taken / wall,
        "gate_core_share": gate_cpu / wall,
        "service_core_share": service_cpu / wall,
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5)
    figures = measure(parser.parse_args().seconds)
    print(figures)
    save("link", {"bar": "100,000 tokens/s as 256 × one id at ≤ 0.3 of a core each side", **figures})


if __name__ == "__main__":
    main()
