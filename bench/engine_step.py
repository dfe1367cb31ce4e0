"""What the engine costs per step: plan + encode + absorb + pack, at depth 2, with traffic in every step.

In every step one sequence ends and one arrives (none for a single sequence), all are traced one in eight, stop ids are
checked, blocks of 64 tokens are appended and freed. The device's part is not counted. ``python bench/engine_step.py``
"""

import gc
import random
import time
from collections import deque
from typing import Any

from penstock.executor.simulated import SimulatedDevice, describe
from penstock.executor.step import ModelInfo, ModelSpec, Sampling, encode_plan, pack_u32
from penstock.scheduler.core.planner import Core
from penstock.scheduler.core.policies.fcfs import FirstComeFirstServed
from penstock.scheduler.records import events
from penstock.scheduler.records.commands import Submit, SubmitSample
from record import percentile, save

_PROMPT = 64


class Traffic:
    """A core that is kept at ``count`` sequences."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.count = count
        self.info: ModelInfo = describe(
            ModelSpec(
                path="/nonexistent",
                max_sequences=count + 8,
                max_step_tokens=count + 512,
                max_model_tokens=4096,
                num_blocks=(count + 8) * 20,
                plans_in_flight=2,
            )
        )
        self.core = Core(self.info, FirstComeFirstServed())
        self.device = SimulatedDevice(self.info)
        self.answers: deque[Any] = deque()
        self.handle = 0

    def submit(self, max_tokens: int) -> None:
        """One more request."""
        self.handle += 1
        prompt = pack_u32([self.random.randrange(self.info.vocab_size) for _ in range(_PROMPT)])
        sample = SubmitSample(self.handle, 0, self.handle)
        arrival = time.monotonic_ns()
        traced = self.handle % 8 == 0
        self.core.submit(
            Submit((sample,), prompt, Sampling(), max_tokens, arrival, stop_ids=pack_u32([1]), traced=traced)
        )

    def step(self) -> float:
        """One turn of the engine; its host time in µs."""
        start = time.perf_counter_ns()
        plan = self.core.plan(start)
        assert plan is not None
        encode_plan(plan)
        middle = time.perf_counter_ns()
        self.answers.append(self.device.execute(plan))
        resume = time.perf_counter_ns()
        if len(self.answers) == 2:
            self.core.absorb(self.answers.popleft(), resume)
        record = self.core.take_output()
        if record is not None:
            events.encode(record)
        return (time.perf_counter_ns() - resume + middle - start) / 1000


def measure(count: int, steps: int) -> dict[str, float]:
    """Host time per step with ``count`` decoding sequences, in µs."""
    traffic = Traffic(count)
    for i in range(count):
        traffic.submit(1000 if count == 1 else 16 + (i % 1000))
    for _ in range(16):
        traffic.step()
    gc.collect()
    gc.freeze()
    samples = []
    running = []
    for _ in range(steps):
        load = traffic.core.load(0, 0, 0)
        for _ in range(max(1, count) - load.running - load.waiting):
            traffic.submit(1000)
        samples.append(traffic.step())
        running.append(load.running)
    return {
        "sequences": count,
        "running_mean": sum(running) / steps,
        "steps": steps,
        "median_us": percentile(samples, 0.5),
        "p99_us": percentile(samples, 0.99),
        "max_us": max(samples),
    }


def main() -> None:
    """Measure, print and save."""
    rows = [measure(count, steps) for count, steps in ((1, 900), (256, 3000), (1024, 1500))]
    for row in rows:
        print({name: round(value, 1) for name, value in row.items()})
    save("engine_step", {"bar": "256: median ≤ 250, p99 ≤ 500; 1: ≤ 30; 1,024: ≤ 900 µs", "rows": rows})


if __name__ == "__main__":
    main()
