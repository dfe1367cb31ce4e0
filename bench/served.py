"""Tokens per second through the whole path: client, service, gate and engine, 64 streams, one token a message.

The engine is the simulated one, paced: a step takes as long as 64 streams at the wished rate allow, so that nobody can
send two tokens in one message by being late unless the path itself cannot follow. Text is detokenized for real with the
embedded model's tokenizer, and every request is traced (service, gate, engine and client export to a receiver).
``python bench/served.py [--rates 5000,10000] [--seconds 8] [--cores 2]``
"""

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from record import percentile, save

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from penstock.client import AsyncClient
from penstock.local import embedded
from penstock.local.traces.receiver import TraceReceiver
from penstock.telemetry import tracing
from support.stack import Stack, stack

STREAMS = 64


async def one_stream(client: AsyncClient, number: int, tokens: int, gaps: list[float]) -> tuple[int, int, str]:
    """Tokens, messages and trace id of one stream."""
    made, messages, last = 0, 0, 0.0
    stream = client.stream([5 + number] * 16, max_tokens=tokens, ignore_eos=True, timeout_s=120)
    async for chunk in stream:
        made += len(chunk.token_ids)
        messages += 1
        now = time.perf_counter()
        if last:
            gaps.append(now - last)
        last = now
    return made, messages, stream.completion.trace_id


def cpu_seconds(roles: Stack) -> dict[str, float]:
    """Processor time of every process, the client's among them."""
    processes = {
        "client": psutil.Process(),
        "service": psutil.Process(roles.service.pid),
        "gate": psutil.Process(roles.scheduler.pid),
        "engine": roles.engine,
    }
    return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}


async def measure(rate: int, seconds: float, cores: int) -> dict[str, Any]:
    """64 streams at ``rate`` tokens a second in all."""
    os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[:cores]))
    step_us = STREAMS * 1_000_000 // rate
    tokens = min(int(rate * seconds / STREAMS), 1900)
    gaps: list[float] = []
    async with TraceReceiver() as receiver:
        telemetry = tracing.configure("client", endpoint=receiver.address)
        with stack(
            embedded.path(),
            otlp_endpoint=receiver.address,
            executor="simulated",
            step_us=step_us,
            plans_in_flight=2,
            max_sequences=STREAMS,
        ) as roles:
            async with AsyncClient(roles.address, tracer=telemetry.tracer("penstock.client")) as client:
                await asyncio.gather(*(one_stream(client, i, 8, []) for i in range(STREAMS)))
                before, start = cpu_seconds(roles), time.perf_counter()
                answers = await asyncio.gather(*(one_stream(client, i, tokens, gaps) for i in range(STREAMS)))
                wall = time.perf_counter() - start
                after = cpu_seconds(roles)
        await asyncio.to_thread(telemetry.shutdown)
    made = sum(answer[0] for answer in answers)
    messages = sum(answer[1] for answer in answers)
    return {
        "asked_tokens_per_s": rate,
        "step_us": step_us,
        "tokens_per_s": made / wall,
        "tokens": made,
        "tokens_per_message": made / messages,
        "gap_ms_p50": percentile(gaps, 0.5) * 1000,
        "gap_ms_p99": percentile(gaps, 0.99) * 1000,
        "core_share": {name: (after[name] - before[name]) / wall for name in before},
    }


def main() -> None:
    """Measure each rate, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", default="5000,7500,10000")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    rows = []
    for rate in options.rates.split(","):
        rows.append(asyncio.run(measure(int(rate), options.seconds, options.cores)))
        print(rows[-1])
    save("served", {"bar": "≥ 5,000 tokens/s on 2 cores, aim 10,000", "streams": STREAMS, "rows": rows})


if __name__ == "__main__":
    main()
