"""One stream alone: 128 prompt tokens, 256 output tokens, offline and through every role, in the same run.

Offline is ``LLM``; served is a client in this process, one service process, gate, engine and worker, each of its own,
as ``penstock serve`` starts them. Text is detokenized for real in both. Times are medians over ``--repeats`` after two
that warm up; the pace is from the first token to the last.

    python bench/one_stream.py --model llama-3.1-8b --set load_format=dummy
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import models
from record import percentile, save
from served_mixed import _until_ready

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from penstock.client import Client
from penstock.local import LLM, SamplingParams
from support.stack import scheduler, service

PROMPT, OUTPUT = 128, 256
WARM_UPS = 2

Arrival = tuple[float, int]
"""Seconds since the request began, and the tokens that came."""


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b", help="a name of models.CONFIGS, or a folder")
    parser.add_argument("--executor", default="multiprocess")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the model")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--name", default="one_stream", help="of the file in bench/results")
    options = parser.parse_args()
    settings: dict[str, Any] = {"max_model_tokens": 4096, "max_sequences": 256}
    settings |= {key: int(value) if value.isdigit() else value for key, value in (p.split("=", 1) for p in options.set)}
    with tempfile.TemporaryDirectory() as folder:
        model = models.write(options.model, Path(folder)) if options.model in models.CONFIGS else Path(options.model)
        figures = {
            "offline": offline(model, options, settings),
            "served": served(model, options, settings),
        }
    figures["served_share"] = {
        key: figures["served"][key] / figures["offline"][key] for key in ("first_token_ms", "token_ms")
    }
    print(json.dumps(figures, indent=1))
    save(options.name, {"model": options.model, "settings": settings, "repeats": options.repeats, **figures})


def offline(model: Path, options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Step by step, as :class:`LLMEngine` does."""
    with LLM(model, executor=options.executor, progress=False, **settings) as llm:
        engine = llm.engine

        def once(number: int) -> list[Arrival]:
            params = SamplingParams(temperature=options.temperature, max_tokens=OUTPUT, ignore_eos=True, seed=number)
            begun, arrivals, known = time.perf_counter(), [], 0
            output = engine.add_request(str(number), prompt_of(number), params).outputs[0]
            while engine.has_unfinished_requests:
                engine.step()
                if len(output.token_ids) > known:
                    arrivals.append((time.perf_counter() - begun, len(output.token_ids) - known))
                    known = len(output.token_ids)
            return arrivals

        return repeated(once, options.repeats)


def served(model: Path, options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Through the public service, one message after the other."""
    roles = {"executor": options.executor, "log_level": "warning"}
    with (
        scheduler(model, **roles, **settings) as gate,
        service([gate.address], service_processes=1, log_level="warning") as front,
    ):
        _until_ready(front.address)
        with Client(front.address, timeout_s=120) as client:

            def once(number: int) -> list[Arrival]:
                begun, arrivals = time.perf_counter(), []
                stream = client.stream(
                    prompt_of(number),
                    max_tokens=OUTPUT,
                    temperature=options.temperature,
                    ignore_eos=True,
                    seed=number,
                )
                for chunk in stream:
                    if chunk.token_ids:
                        arrivals.append((time.perf_counter() - begun, len(chunk.token_ids)))
                return arrivals

            return repeated(once, options.repeats)


def prompt_of(number: int) -> list[int]:
    """Other ids each time, so that nothing is cached."""
    return [(1009 * number + 31 * place) % 3_000 for place in range(PROMPT)]


def repeated(once: Callable[[int], Sequence[Arrival]], repeats: int) -> dict[str, Any]:
    """Medians over the runs behind the first few; gaps between messages over all of these runs."""
    runs = [once(number) for number in range(WARM_UPS + repeats)][WARM_UPS:]
    assert all(sum(count for _, count in run) == OUTPUT for run in runs), "every token came"
    gaps = [late[0] - early[0] for run in runs for early, late in pairwise(run)]
    paces = [(run[-1][0] - run[0][0]) / (OUTPUT - run[0][1]) for run in runs]
    return {
        "first_token_ms": 1000 * statistics.median(run[0][0] for run in runs),
        "token_ms": 1000 * statistics.median(paces),
        "tokens_per_message": OUTPUT / statistics.fmean(len(run) for run in runs),
        "gap_ms": {f"p{share * 100:g}": 1000 * percentile(gaps, share) for share in (0.5, 0.9, 0.99)},
        "first_tokens_ms": [1000 * run[0][0] for run in runs],
        "tokens_ms": [1000 * pace for pace in paces],
    }


if __name__ == "__main__":
    main()
