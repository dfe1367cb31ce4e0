"""`penstock bench throughput | latency`: measured on this machine, beside the floor of the same work."""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from penstock.config import ConfigError, load
from penstock.executor.executor import ExecutorError
from penstock.executor.models.errors import CheckpointError
from penstock.local.measure.ceilings import Ceilings, measure_apart
from penstock.local.measure.floor import Cost
from penstock.local.offline.llm import LLM
from penstock.local.offline.params import SamplingParams

_MAX_ID: Final = 10_000
_HELP: Final = """\
usage: penstock bench throughput|latency MODEL_DIR [settings]

  throughput   many requests of mixed lengths, all at once: tokens a second
  latency      one batch: time to the first token, time per output token

penstock bench throughput --help lists the settings."""

Count = Annotated[int, Meta(ge=1)]


class BenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    model_dir: Annotated[Path, Meta(description="A model folder; with --load-format dummy its config.json will do.")]
    requests: Annotated[Count, Meta(description="Requests, all at once.")] = 256
    prompt_tokens: Annotated[str, Meta(description="N, or LOW-HIGH: drawn evenly.")] = "100-1024"
    output_tokens: Annotated[str, Meta(description="N, or LOW-HIGH: drawn evenly.")] = "100-1024"
    temperature: Annotated[float, Meta(ge=0, description="0 is greedy.")] = 0.6
    seed: Annotated[int, Meta(ge=0, description="Of the work.")] = 0
    repeats: Annotated[Count, Meta(description="Measured runs, after one that warms up; the median counts.")] = 3
    executor: Annotated[
        Literal["auto", "uniproc", "multiprocess"], Meta(description="auto: multiprocess if there is a GPU.")
    ] = "auto"
    device: Annotated[str, Meta(description="auto, cpu, cuda or cuda:N.")] = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Meta(description="auto: the checkpoint's.")] = "auto"
    load_format: Annotated[
        Literal["safetensors", "dummy"], Meta(description="dummy: weights are drawn instead of read.")
    ] = "safetensors"
    attention_backend: Annotated[
        Literal["auto", "triton", "flash_attn"], Meta(description="What attends prompts on a GPU.")
    ] = "auto"
    max_sequences: Annotated[Count | None, Meta(description="None: 64 on a CPU, 256 on a GPU.")] = None
    max_step_tokens: Annotated[Count | None, Meta(description="None: 512 on a CPU, 16384 on a GPU.")] = None
    max_model_tokens: Annotated[Count | None, Meta(description="None: the model's own.")] = None
    json: Annotated[Path | None, Meta(description="Where the whole result goes.")] = None
    progress: Annotated[bool, Meta(description="Show how far it is.")] = True


class LatencyConfig(BenchConfig, frozen=True, kw_only=True):
    """The same, of one short request unless told otherwise."""

    requests: Annotated[Count, Meta(description="Sequences of the batch.")] = 1
    prompt_tokens: Annotated[str, Meta(description="N, or LOW-HIGH: drawn evenly.")] = "128"
    output_tokens: Annotated[str, Meta(description="N, or LOW-HIGH: drawn evenly.")] = "256"


def main(argv: Sequence[str]) -> int:
    """Measure and print. Raises ConfigError."""
    kinds = {"throughput": throughput, "latency": latency}
    if not argv or argv[0] not in kinds:
        print(_HELP)
        return 0 if argv and argv[0] in ("--help", "-h") else 2
    kind, *rest = argv
    prog = f"penstock bench {kind}"
    settings = BenchConfig if kind == "throughput" else LatencyConfig
    config = load(settings, rest, os.environ, prog=prog, description=_HELP, positional="model_dir")
    try:
        prompts, outputs = draw_work(config)
        ceilings = measure_apart(config.device)
        with _start(config) as llm:
            cost = Cost.of_folder(config.model_dir, llm.engine.info.dtype)
            figures = kinds[kind](llm, config, prompts, outputs, cost, ceilings)
            result = _result(kind, config, llm, ceilings, figures)
    except (ExecutorError, CheckpointError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if config.json is not None:
        config.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {config.json}")
    return 0


def _start(config: BenchConfig) -> LLM:
    return LLM(
        config.model_dir,
        executor=config.executor,
        device=config.device,
        dtype=config.dtype,
        load_format=config.load_format,
        attention_backend=config.attention_backend,
        max_sequences=config.max_sequences,
        max_step_tokens=config.max_step_tokens,
        max_model_tokens=config.max_model_tokens,
        progress=config.progress,
    )


def draw_work(config: BenchConfig) -> tuple[list[list[int]], list[int]]:
    """Prompts and numbers of output tokens, in the order in which nano-vllm's benchmark draws them.

    Raises ConfigError for a range that is none.
    """
    low, high = _range("prompt_tokens", config.prompt_tokens)
    least, most = _range("output_tokens", config.output_tokens)
    source = random.Random(config.seed)
    prompts = [[source.randint(0, _MAX_ID) for _ in range(source.randint(low, high))] for _ in range(config.requests)]
    return prompts, [source.randint(least, most) for _ in range(config.requests)]


def _range(name: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        numbers = int(low), int(high or low)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is neither N nor LOW-HIGH") from None
    if not 1 <= numbers[0] <= numbers[1]:
        raise ConfigError(f"{name}: {text!r} is not a range of at least 1")
    return numbers


Figures = dict[str, Any]


def throughput(
    llm: LLM, config: BenchConfig, prompts: list[list[int]], outputs: list[int], cost: Cost, ceilings: Ceilings
) -> Figures:
    """All requests at once, several times over."""
    prompts = _within(prompts, outputs, llm)
    params = [SamplingParams(temperature=config.temperature, max_tokens=most, ignore_eos=True) for most in outputs]
    samples = []
    for number in range(config.repeats + 1):
        begun = time.perf_counter()
        made = llm.generate(prompts, params, progress=config.progress)
        seconds = time.perf_counter() - begun
        tokens = sum(len(output.outputs[0].token_ids) for output in made)
        faults = [output.outputs[0].error for output in made if output.outputs[0].finish_reason == "error"]
        if faults:
            raise RuntimeError(f"{len(faults)} requests failed, the first: {faults[0]}")
        samples.append({"warm_up": number == 0, "seconds": seconds, "tokens": tokens, "tokens_s": tokens / seconds})
    median = statistics.median(sample["tokens_s"] for sample in samples[1:])
    floor = sum(outputs) / cost.work_s([len(prompt) for prompt in prompts], outputs, ceilings)
    share = f"floor of the work {floor:,.0f}: {median / floor:.0%}"
    print(f"{median:,.0f} output tokens/s (median of {config.repeats}); {share}")
    return {"tokens_s": median, "floor_tokens_s": floor, "share_of_floor": median / floor, "samples": samples}


def latency(
    llm: LLM, config: BenchConfig, prompts: list[list[int]], outputs: list[int], cost: Cost, ceilings: Ceilings
) -> Figures:
    """One batch, token by token, as the host sees them."""
    prompts = _within(prompts, outputs, llm)
    runs = [_latency_run(llm, config, prompts, outputs, number) for number in range(config.repeats + 1)][1:]
    gaps = sorted(gap for run in runs for gap in run["gaps_ms"])
    lengths = [len(prompt) for prompt in prompts]
    middle = [length + most // 2 for length, most in zip(lengths, outputs, strict=True)]
    figures = {
        "ttft_ms": statistics.median(run["ttft_ms"] for run in runs),
        "floor_ttft_ms": 1000 * max(cost.prefill_s(lengths, ceilings), cost.step_s([], ceilings)),
        "tpot_ms": statistics.median(run["tpot_ms"] for run in runs),
        "floor_tpot_ms": 1000 * cost.step_s(middle, ceilings),
        "gap_ms": {f"p{share}": gaps[min(len(gaps) - 1, len(gaps) * share // 100)] for share in (50, 90, 99)},
        "samples": [{name: run[name] for name in ("ttft_ms", "tpot_ms")} for run in runs],
    }
    print(f"first token {figures['ttft_ms']:.2f} ms (floor {figures['floor_ttft_ms']:.2f})")
    print(f"each further token {figures['tpot_ms']:.3f} ms (floor {figures['floor_tpot_ms']:.3f})")
    print("between tokens " + ", ".join(f"{name} {gap:.3f} ms" for name, gap in figures["gap_ms"].items()))
    return figures


def _latency_run(llm: LLM, config: BenchConfig, prompts: list[list[int]], outputs: list[int], number: int) -> Figures:
    engine = llm.engine
    begun = time.perf_counter()
    requests = [
        engine.add_request(
            f"latency-{number}-{index}",
            prompt,
            SamplingParams(temperature=config.temperature, max_tokens=most, ignore_eos=True),
        )
        for index, (prompt, most) in enumerate(zip(prompts, outputs, strict=True))
    ]
    moments = []
    while engine.has_unfinished_requests:
        if engine.turn():
            moments.append(time.perf_counter())
    first = max(request.first_token_s or 0.0 for request in requests)
    steps = max(1, max(outputs) - 1)
    return {
        "ttft_ms": 1000 * first,
        "tpot_ms": 1000 * (moments[-1] - begun - first) / steps,
        "gaps_ms": [1000 * (after - before) for before, after in pairwise(moments)] or [0.0],
    }


def _within(prompts: list[list[int]], outputs: list[int], llm: LLM) -> list[list[int]]:
    """The same prompts for a vocabulary that is smaller than the ids that were drawn.

    Raises ConfigError for work that the model has no room for: it would be cut, and the figures with it.
    """
    longest = max(len(prompt) + most for prompt, most in zip(prompts, outputs, strict=True))
    if longest > llm.engine.info.max_model_tokens:
        room = llm.engine.info.max_model_tokens
        raise ConfigError(f"prompt_tokens and output_tokens: {longest} together, the model has room for {room}")
    size = llm.engine.info.vocab_size
    return prompts if size > _MAX_ID else [[token % size for token in prompt] for prompt in prompts]


def _result(kind: str, config: BenchConfig, llm: LLM, ceilings: Ceilings, figures: Figures) -> Figures:
    info = llm.engine.info
    return {
        "benchmark": kind,
        "settings": {name: str(getattr(config, name)) for name in config.__struct_fields__},
        "hardware": {"device": ceilings.device, "driver": ceilings.driver, "cpu": _cpu(), "cores": os.cpu_count()},
        "versions": {
            "penstock": metadata.version("penstock") if _installed() else None,
            "python": platform.python_version(),
            "torch": ceilings.torch_version,
            "triton": ceilings.triton_version,
        },
        "commit": _commit(),
        "ceilings": msgspec.to_builtins(ceilings),
        "model": {"dtype": info.dtype, "parameters": info.parameters, "weight_bytes": info.weight_bytes},
        "attention_backends": info.attention_backends,
        "startup_ms": info.startup_ms,
        "memory_bytes": info.memory_bytes,
        **figures,
    }


def _installed() -> bool:
    try:
        metadata.version("penstock")
    except metadata.PackageNotFoundError:
        return False
    return True


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    """Of the checkout; a copy of one is told by ``PENSTOCK_COMMIT``."""
    if told := os.environ.get("PENSTOCK_COMMIT"):
        return told
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
