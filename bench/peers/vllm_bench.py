"""vLLM on the work that Penstock is measured by, and the ceilings of the GPU beside it.

``run.sh`` starts it, one process a part: ``vllm_bench.py ceilings|t1|t2|t3|t4|served OUT``. Every figure is one JSON
object, printed and added to OUT/peers.jsonl.

- ceilings: bytes a second of a copy and of reading weights, and matrix products a second.
- t1, t2: `workload.mixed`, 256 requests of mixed lengths at once, without text; Qwen3-0.6B and Llama-3.1-8B.
- t3: one request alone, 128 tokens in and 256 out, without text; Qwen3-0.6B.
- t4: the same with Llama-3.1-8B, then 32 prompts of 8,192 tokens, one token out.
- served: vLLM's own server and load, 512 tokens in and 128 out, at several rates; Llama-3.1-8B.

The prefix cache is on, as it comes, and emptied before each run. What it must not do is in ``normal_weights``.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import workload
from workload import Work

sys.path.pop(0)  # what vLLM looks for, such as `kernels`, is not ours

MODELS = Path("/tmp/models")
TEMPERATURE = 0.6
REPEATS = 3
STREAMS = 7
"""Of one request alone, one after another."""
PORT = 8123
SERVER_UP_S = 240.0
RATES = (("inf", 200), ("inf", 1000), ("20", 500), ("40", 800))
"""Requests a second, and how many requests; the first warms up."""


def vllm() -> Any:
    """The package; only those parts import it that use it in this process."""
    return importlib.import_module("vllm")


class Figures:
    """Where figures go."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "peers.jsonl"

    def add(self, figure: str, **values: Any) -> None:
        """Print one and keep it."""
        line = json.dumps({"figure": figure, **values})
        print("FIGURE", line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


def ceilings(figures: Figures) -> None:
    """What the machine can do at most, by the libraries that torch has."""
    figures.add("machine", gpu=_smi("name,driver_version,power.limit"), torch=torch.__version__, cpus=os.cpu_count())
    _copy(figures)
    _read_weights(figures)
    _product(figures, 8192, 8192, 8192)
    _product(figures, 16_384, 4096, 28_672)  # the first matrix of Llama-3.1-8B's MLP, in a long prefill
    figures.add("after it", gpu=_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu"))


def _copy(figures: Figures) -> None:
    source = _matrix(1 << 17, 1 << 14)
    target = torch.empty_like(source)
    ms = _median_ms(lambda: target.copy_(source))
    figures.add("copy", ms=ms, tb_per_s=2 * source.nbytes / ms / 1e9)


def _read_weights(figures: Figures) -> None:
    weight, vector = _matrix(65_536, 16_384), _matrix(16_384)
    ms = _median_ms(lambda: torch.mv(weight, vector))
    figures.add("matrix times vector", ms=ms, tb_per_s=weight.nbytes / ms / 1e9)


def _product(figures: Figures, rows: int, inner: int, columns: int) -> None:
    left, right = _matrix(rows, inner), _matrix(columns, inner)
    ms = _median_ms(lambda: left @ right.T, warmup=200, rep=600)
    figures.add("matrix product", shape=[rows, inner, columns], ms=ms, tflops=2 * rows * inner * columns / ms / 1e9)


def _matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _median_ms(work: Callable[[], object], warmup: int = 50, rep: int = 200) -> float:
    """Milliseconds; `warmup` and `rep` are milliseconds, too."""
    from triton.testing import do_bench

    return float(do_bench(work, warmup=warmup, rep=rep, return_mode="median"))


def _smi(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()


def t1(figures: Figures) -> None:
    """256 requests of mixed lengths, Qwen3-0.6B."""
    _offline(figures, "qwen3-0.6b", max_model_len=4096)


def t2(figures: Figures) -> None:
    """256 requests of mixed lengths, Llama-3.1-8B."""
    _offline(figures, "llama-3.1-8b", max_model_len=8448)


def t3(figures: Figures) -> None:
    """One stream, Qwen3-0.6B."""
    _one_stream(figures, _engine(figures, "qwen3-0.6b", max_model_len=4096), "qwen3-0.6b")


def t4(figures: Figures) -> None:
    """One stream and long prompts, Llama-3.1-8B."""
    name = "llama-3.1-8b"
    engine = _engine(figures, name, max_model_len=8448)
    _one_stream(figures, engine, name)
    for repeat in range(REPEATS + 1):
        work = workload.uniform(32, 8192, 1, vocab_size=models.CONFIGS[name]["vocab_size"], seed=500 + repeat)
        seconds, _ = _generate(engine, work)
        tokens = sum(len(request.prompt) for request in work)
        figures.add(
            "long prompts", model=name, warm_up=not repeat, seconds=seconds, prompt_tokens_per_s=tokens / seconds
        )


def _offline(figures: Figures, model: str, max_model_len: int) -> None:
    engine = _engine(figures, model, max_model_len)
    work = workload.mixed()
    for repeat in range(REPEATS):
        seconds, tokens = _generate(engine, work)
        if tokens != sum(request.max_tokens for request in work):
            raise AssertionError(f"{tokens} tokens instead of {sum(request.max_tokens for request in work)}")
        figures.add("mixed", model=model, repeat=repeat, seconds=seconds, tokens=tokens, tokens_per_s=tokens / seconds)


def _one_stream(figures: Figures, engine: Any, model: str) -> None:
    """Milliseconds to the first token and between tokens: what 256 tokens take longer than one."""
    vocab_size = models.CONFIGS[model]["vocab_size"]
    first: list[float] = []
    whole: list[float] = []
    for repeat in range(STREAMS):
        for tokens, seconds in ((256, whole), (1, first)):
            work = workload.uniform(1, 128, tokens, vocab_size=vocab_size, seed=1000 * tokens + repeat)
            seconds.append(_generate(engine, work)[0])
    paces = [1e3 * (long - short) / 255 for long, short in zip(whole, first, strict=True)]
    figures.add(
        "one stream",
        model=model,
        first_token_ms=1e3 * statistics.median(first),
        token_ms=statistics.median(paces),
        first_tokens_ms=[1e3 * seconds for seconds in first],
        tokens_ms=paces,
    )


def _engine(figures: Figures, model: str, max_model_len: int) -> Any:
    """An engine that has seen a few requests."""
    begun = time.perf_counter()
    engine = vllm().LLM(
        model=str(models.write(model, MODELS)),
        load_format="dummy",
        gpu_memory_utilization=0.9,
        disable_log_stats=True,
        max_model_len=max_model_len,
    )
    figures.add("engine", model=model, seconds=time.perf_counter() - begun, **_settings(engine))
    _generate(engine, workload.uniform(64, 200, 24, vocab_size=models.CONFIGS[model]["vocab_size"], seed=7))
    return engine


def _settings(engine: Any) -> dict[str, Any]:
    """What decides its speed."""
    config = engine.llm_engine.vllm_config
    return {
        "one_process": _one_process(),
        "async_scheduling": config.scheduler_config.async_scheduling,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "block_size": config.cache_config.block_size,
        "num_gpu_blocks": config.cache_config.num_gpu_blocks,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
    }


def _one_process() -> bool:
    return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"


def _generate(engine: Any, work: list[Work]) -> tuple[float, int]:
    """Seconds of one call with all requests, and the tokens that were made."""
    _forget_prefixes(engine)
    prompts = [{"prompt_token_ids": request.prompt} for request in work]
    sampling = [
        vllm().SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=request.max_tokens, detokenize=False)
        for request in work
    ]
    begun = time.perf_counter()
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - begun
    return seconds, sum(len(output.outputs[0].token_ids) for output in outputs)


def _forget_prefixes(engine: Any) -> None:
    """Empty the prefix cache; refused while the last blocks are being freed. Raises RuntimeError after 2 s."""
    for _ in range(200):
        if engine.reset_prefix_cache():
            return
        if _one_process():
            engine.llm_engine.step()  # nothing else drains the last batch
        time.sleep(0.01)
    raise RuntimeError("the prefix cache cannot be emptied")


def served(figures: Figures) -> None:
    """vLLM's server under vLLM's load."""
    model = models.write("llama-3.1-8b", MODELS)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    settings = ["--load-format", "dummy", "--max-model-len", "8448", "--gpu-memory-utilization", "0.9"]
    where = ["--host", "127.0.0.1", "--port", str(PORT), "--served-model-name", "m"]
    begun = time.perf_counter()
    server = subprocess.Popen([*command, "serve", str(model), *settings, *where])
    try:
        _until_up(server, begun + SERVER_UP_S)
        figures.add("server", seconds=time.perf_counter() - begun)
        for number, (rate, requests) in enumerate(RATES):
            _load(figures, [*command, "bench", "serve"], model, number, rate, requests)
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _until_up(server: "subprocess.Popen[bytes]", deadline: float) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            if server.poll() is not None or time.perf_counter() > deadline:
                raise
            time.sleep(0.5)


def _load(figures: Figures, command: list[str], model: Path, number: int, rate: str, requests: int) -> None:
    saved = Path(f"/tmp/served-{number}.json")
    about = ["--backend", "openai", "--base-url", f"http://127.0.0.1:{PORT}", "--endpoint", "/v1/completions"]
    work = ["--dataset-name", "random", "--random-input-len", "512", "--random-output-len", "128", "--ignore-eos"]
    how = ["--num-prompts", str(requests), "--request-rate", rate, "--seed", str(11 + number), "--disable-tqdm"]
    report = ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99", "--save-result"]
    path = ["--result-dir", str(saved.parent), "--result-filename", saved.name]
    named = ["--model", "m", "--tokenizer", str(model), "--temperature", str(TEMPERATURE)]
    subprocess.run([*command, *about, *named, *work, *how, *report, *path], check=True)
    result = json.loads(saved.read_text())
    kept = {name: value for name, value in result.items() if not isinstance(value, list | dict) and name != "date"}
    figures.add("served" if number else "served, warming up", rate=rate, requests=requests, **kept)


PARTS = {"ceilings": ceilings, "t1": t1, "t2": t2, "t3": t3, "t4": t4, "served": served}


def main() -> None:
    """Run one part."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    PARTS[name](Figures(folder))


if __name__ == "__main__":
    main()
