"""What a decode step costs on a GPU, and how much of it the GPU idles.

``python bench/device.py steps MODEL``: the device time of a decode step by batch, at one context.
``python bench/device.py idle MODEL``: the share of a steady decode step in which the GPU waits: one minus the time of
bare replays of some steps, by CUDA events, over the wall time of the same steps as the engine plans them, by when their
results arrive; and what it waits in a step that also computes known ids, by a profile.
``python bench/device.py throughput MODEL``: many requests of mixed lengths, without text.

MODEL is a folder with a config.json; weights are drawn. The engine's core and the worker run in this process.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from penstock.executor.step import ModelInfo, ModelSpec, Sampling, StepResult, pack_u32
from penstock.executor.uniproc import UniprocExecutor
from penstock.executor.worker.device.runner import DeviceRunner
from penstock.local.offline.llm import longest_first
from penstock.scheduler.core.planner import Core
from penstock.scheduler.core.policies.fcfs import FirstComeFirstServed
from penstock.scheduler.records.commands import Submit, SubmitSample
from record import save

WAIT_SECONDS = 60.0
SETTLING = 8
"""Steps of a batch before they are compared with replays."""
REPLAYED = 24
"""Steps of a bare replay. They must end within the last page of each sequence: nobody gives it another one."""


class Engine:
    """A core and a worker in this process, plans submitted as early as may be."""

    def __init__(self, spec: ModelSpec) -> None:
        self.executor = UniprocExecutor()
        self.info: ModelInfo = self.executor.start(spec, lambda stage, done, total: None)
        self.core = Core(self.info, FirstComeFirstServed(), traced_step_every=1 << 30)
        self.handle = 0
        self.tokens = 0
        self.results: list[tuple[int, int, StepResult]] = []
        """When each result came, how many known ids its step computed, and the result."""

    def submit(self, prompt: Sequence[int], max_tokens: int, temperature: float) -> None:
        self.handle += 1
        self.core.submit(
            Submit(
                (SubmitSample(self.handle, 0, self.handle),),
                pack_u32(list(prompt)),
                Sampling(temperature=temperature),
                max_tokens,
                time.monotonic_ns(),
                ignore_eos=True,
            )
        )

    def run(self, until: Callable[[], bool]) -> None:
        """Step until ``until`` says so, or there is nothing left to do."""
        core, depth = self.core, self.info.plans_in_flight
        while (core.has_work or core.in_flight) and not until():
            while core.in_flight < depth and core.has_work:
                plan = core.plan(time.monotonic_ns())
                if plan is None:
                    break
                self.executor.submit(plan)
            readable, _, _ = select.select([self.executor.fileno()], [], [], WAIT_SECONDS)
            if not readable:
                raise TimeoutError("no result")
            self._absorb()

    def _absorb(self) -> None:
        for result in self.executor.results():
            now = time.monotonic_ns()
            flight = self.core.absorb(result, now)
            self.results.append((now, flight.prefill_rows if flight else 0, result))
            self.tokens += sum(result.counts)
            if result.failed:
                raise RuntimeError(str(result.failed[0]))
        self.core.take_output()

    def settle(self) -> None:
        """Take in what is in flight, plan no more."""
        while self.core.in_flight:
            select.select([self.executor.fileno()], [], [], WAIT_SECONDS)
            self._absorb()

    @property
    def runner(self) -> DeviceRunner:
        runner = self.executor.runner
        assert isinstance(runner, DeviceRunner)
        return runner


def spec_of(arguments: argparse.Namespace, **changes: Any) -> ModelSpec:
    settings: dict[str, Any] = {
        "path": arguments.model,
        "load_format": "dummy",
        "device": arguments.device,
        "attention_backend": arguments.attention_backend,
        "max_sequences": 256,
        "max_step_tokens": 16_384,
        "max_model_tokens": 4096,
        "plans_in_flight": 2,
    }
    return ModelSpec(**settings | changes)


def prompt_of(source: random.Random, length: int, vocab_size: int) -> list[int]:
    return [source.randrange(min(10_000, vocab_size)) for _ in range(length)]


def decode_batch(engine: Engine, batch: int, context: int, steps: int, temperature: float) -> list[tuple[int, int]]:
    """Wall and device nanoseconds of ``steps`` steps of ``batch`` sequences around ``context`` tokens.

    When it returns, the sequences have ``context + steps // 2 + 10`` tokens and those begun first some more.
    """
    source = random.Random(batch)
    for _ in range(batch):
        engine.submit(prompt_of(source, context - steps // 2, engine.info.vocab_size), 10 * steps + 100, temperature)
    engine.results.clear()
    engine.run(lambda: sum(1 for _, prefill, _ in engine.results[-steps - 8 :] if not prefill) >= steps + 8)
    engine.settle()
    taken = [entry for entry in engine.results if not entry[1]][-steps:]
    walls = [after[0] - before[0] for before, after in pairwise(taken)]
    return list(zip(walls, [entry[2].device_ns for entry in taken[1:]], strict=True))


def finish(engine: Engine) -> None:
    """End all sequences."""
    for handle in range(engine.handle + 1):
        engine.core.cancel(handle, time.monotonic_ns())
    engine.run(lambda: False)
    engine.core.take_output()


def steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """The step table."""
    engine = Engine(spec_of(arguments))
    table = []
    for batch in arguments.batches:
        times = decode_batch(engine, batch, arguments.context, arguments.steps, arguments.temperature)
        finish(engine)
        row = {
            "batch": batch,
            "context": arguments.context,
            "wall_ms": statistics.median(wall for wall, _ in times) / 1e6,
            "device_ms": statistics.median(device for _, device in times) / 1e6,
        }
        print(json.dumps(row), flush=True)
        table.append(row)
    engine.executor.shutdown()
    return {"steps": table, "startup_ms": engine.info.startup_ms, "memory_bytes": engine.info.memory_bytes}


def idle(arguments: argparse.Namespace) -> dict[str, Any]:
    """Idle share of steady decodes, and what steps idle while prompts arrive."""
    engine = Engine(spec_of(arguments))
    rows = []
    for batch in arguments.batches:
        row = {"batch": batch, **compare_with_replay(engine, batch, arguments)}
        print(json.dumps(row), flush=True)
        rows.append(row)
    profiled = profile_mixed(engine, arguments)
    engine.executor.shutdown()
    return {"decode": rows, "profiled": profiled}


def compare_with_replay(engine: Engine, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps replayed bare, and the wall time of the same steps as the engine plans them.

    The same: from one state of the batch, at the same lengths, by the same draws. How long attention takes depends on
    the lengths by more than what is to be measured here. A GPU at its power limit may be throttled for a moment, some
    tenths of a second after the load began: where that falls into the replays, the share is negative and says nothing.
    """
    context = arguments.context + (4 - (arguments.context + SETTLING // 2 + 10)) % engine.info.block_tokens
    decode_batch(engine, batch, context, SETTLING, arguments.temperature)
    engine.runner.replay(batch, REPLAYED)  # so that clocks and power are those of a GPU at work
    bare = engine.runner.replay(batch, REPLAYED)[1:]
    engine.results.clear()
    engine.run(lambda: len(engine.results) >= REPLAYED)
    engine.settle()
    walls = [after[0] - before[0] for before, after in pairwise(engine.results[:REPLAYED])]
    finish(engine)
    return {
        "wall_ms": statistics.fmean(walls) / 1e6,
        "bare_ms": statistics.fmean(bare) / 1e6,
        "idle_share": 1 - sum(bare) / sum(walls),
        "walls_ms": [wall / 1e6 for wall in walls],
        "bares_ms": [step / 1e6 for step in bare],
    }


def arrive_among_decodes(engine: Engine, arguments: argparse.Namespace, prompts: int) -> None:
    """96 sequences decode, and ``prompts`` of 600 tokens have come that no plan has scheduled yet."""
    source = random.Random(5)
    for number in range(96):
        engine.submit(prompt_of(source, 200 + 8 * number, engine.info.vocab_size), 500, arguments.temperature)
    engine.run(lambda: sum(engine.results[-1][2].counts) >= 90)
    for _ in range(prompts):
        engine.submit(prompt_of(source, 600, engine.info.vocab_size), 100, arguments.temperature)
    engine.results.clear()


def profile_mixed(engine: Engine, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time in which there is no kernel and no copy on the device, step by step, while prompts arrive among decodes."""
    arrive_among_decodes(engine, arguments, prompts=64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine.run(lambda: len(engine.results) >= 14)
        engine.settle()
        torch.cuda.synchronize()
    finish(engine)
    named = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type.name == "CUDA"
    )
    if arguments.picture:
        arguments.picture.write_text(picture(named))
    row = {}
    for kind, idles in idle_by_step(named).items():
        row[kind] = {"steps": len(idles), "idle_us": statistics.median(idles), "most_us": max(idles), "each_us": idles}
    print(json.dumps(row), flush=True)
    return row


def idle_by_step(spans: Sequence[tuple[float, float, str]]) -> dict[str, list[float]]:
    """Idle microseconds of steps of each kind, from the end of the step before to the step's own last kernel.

    The first and the last step are left out: of the first the beginning is not known.
    """
    found: dict[str, list[float]] = {"mixed": [], "decode": []}
    idle, last, kind, whole = 0.0, spans[0][0], "decode", False
    for start, end, name in spans:
        idle += max(0.0, start - last)
        last = max(last, end)
        if "prefill_kernel" in name:
            kind = "mixed"
        if name.startswith("finish"):
            if whole:
                found[kind].append(idle)
            idle, kind, whole = 0.0, "decode", True
    return found


KINDS = (
    ("decode_kernel", "decode attention", "#3b76c4"),
    ("prefill_kernel", "prefill attention", "#8a5bb5"),
    ("nvjet", "matrix products", "#3c9a5f"),
    ("product", "matrix products", "#3c9a5f"),
    ("weigh", "sampling", "#b23f57"),
    ("Memcpy", "copies", "#222222"),
    ("", "others", "#b5683a"),
)
"""Part of a kernel's name, what it is, its colour."""


def picture(spans: Sequence[tuple[float, float, str]], width: int = 1400, rows: int = 8) -> str:
    """The device's time as SVG: ``rows`` lines of equal length, one behind the other; white is idle. Times in µs."""
    begin, end = spans[0][0], spans[-1][1]
    line = (end - begin) / rows
    bars = []
    for start, stop, name in spans:
        colour = next(colour for part, _, colour in KINDS if part in name)
        row = int((start - begin) // line)
        left, wide = (start - begin - row * line) / line * width, max(0.05, (stop - start) / line * width)
        bars.append(f'<rect x="{left:.2f}" y="{34 + 30 * row}" width="{wide:.2f}" height="22" fill="{colour}"/>')
    legend = {what: colour for _, what, colour in KINDS}
    words = "".join(
        f'<text x="{10 + 150 * at}" y="20" fill="{colour}">{what}</text>'
        for at, (what, colour) in enumerate(legend.items())
    )
    note = f'<text x="{10 + 150 * len(legend)}" y="20">a line is {line / 1000:.2f} ms</text>'
    size = f'width="{width}" height="{40 + 30 * rows}"'
    style = 'font-family="sans-serif" font-size="13" shape-rendering="crispEdges"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{words}{note}{"".join(bars)}</svg>\n'


def throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    """256 requests, prompts and outputs of 100 to 1024 tokens drawn from seed 0, all at once, the longest begun first.

    So LLM begins them; ``--as-drawn`` begins them in the order in which clients of bench/served_mixed.py do.
    """
    engine = Engine(spec_of(arguments, max_step_tokens=arguments.step_tokens, max_sequences=arguments.sequences))
    random.seed(0)
    prompts = [[random.randint(0, 10_000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    found = []
    for repeat in range(arguments.repeats + 1):
        engine.tokens = 0
        engine.results.clear()
        start = time.perf_counter()
        for number in range(len(lengths)) if arguments.as_drawn else longest_first(lengths):
            engine.submit(prompts[number], lengths[number], arguments.temperature)
        engine.run(lambda: False)
        seconds = time.perf_counter() - start
        assert engine.tokens == sum(lengths)
        device = sum(result.device_ns for _, _, result in engine.results) / 1e9
        row = {
            "warm_up": repeat == 0,
            "seconds": seconds,
            "tokens_s": engine.tokens / seconds,
            "steps": len(engine.results),
            "device_s": device,
            "mixed_device_s": sum(result.device_ns for _, prefill, result in engine.results if prefill) / 1e9,
            "host_ms": statistics.median(result.host_ns for _, _, result in engine.results) / 1e6,
        }
        print(json.dumps(row), flush=True)
        found.append(row)
    engine.executor.shutdown()
    measured = [row["tokens_s"] for row in found if not row["warm_up"]]
    return {
        "as_drawn": arguments.as_drawn,
        "runs": found,
        "median_tokens_s": statistics.median(measured) if measured else None,
    }


PROGRAMS = {"steps": steps, "idle": idle, "throughput": throughput}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("model", help="a folder with config.json")
    parser.add_argument("--name", help="results/NAME.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--attention-backend", default="auto", help="what attends prompts")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32, 64, 96, 128, 192, 256])
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--step-tokens", type=int, default=16_384)
    parser.add_argument("--sequences", type=int, default=256, help="at once, for throughput")
    parser.add_argument("--as-drawn", action="store_true", help="do not begin the longest first, for throughput")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--picture", type=Path, help="where the profile of mixed and decode steps goes, as SVG")
    arguments = parser.parse_args()
    figures = PROGRAMS[arguments.program](arguments)
    if arguments.name:
        save(arguments.name, {"model": arguments.model, **figures})


if __name__ == "__main__":
    main()
