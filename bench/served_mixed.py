"""Requests of mixed lengths through the whole path: client processes, service processes, gate, engine.

The work is that of `workload.mixed`: prompts and outputs of 100 to 1,024 tokens, as token ids, to their full length.
Text is detokenized for real. Any executor can be behind it: the simulated one takes `--step-us` a step; on a GPU

    python bench/served_mixed.py --executor multiprocess --model qwen3-0.6b --set load_format=dummy \\
        --streams 256 --clients 8 --service-processes 4

A ``--model`` of `models.CONFIGS` is written to a temporary folder; anything else is a checkpoint's folder. The run is
over after ``--seconds`` even if requests are left; then throughput is that of the tokens which came in this time.
"""

import argparse
import contextlib
import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

import models
import workload
from record import percentile, save

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from penstock.client import Client, RpcError
from support.stack import Role, scheduler, service

CLIENT = Path(__file__).parent / "load" / "client.py"
START_S = 300.0
MARGIN_S = 60.0
"""What clients may take beyond their time to say what they saw."""


def main() -> None:
    """Measure, print and save."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        model = models.write(options.model, Path(folder)) if options.model in models.CONFIGS else Path(options.model)
        figures = measure(options, model)
    print(json.dumps(figures, indent=1))
    save(options.name, figures)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", default="simulated")
    parser.add_argument("--model", default="qwen3-0.6b", help="a name of models.CONFIGS, or a folder")
    parser.add_argument("--step-us", type=int, default=4000, help="of the simulated executor")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the scheduler")
    parser.add_argument("--streams", type=int, default=64, help="at the same time, in all")
    parser.add_argument("--requests", type=int, default=workload.REQUESTS)
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    parser.add_argument("--connections", type=int, default=8, help="of each client process")
    parser.add_argument("--service-processes", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seconds", type=float, default=30, help="after which the run is over")
    parser.add_argument("--name", default="served_mixed", help="of the file in bench/results")
    return parser.parse_args()


def measure(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Start every role, warm up, run the clients; what came out."""
    settings: dict[str, object] = {
        "executor": options.executor,
        "max_sequences": options.streams,
        "log_level": "warning",
    }
    if options.executor == "simulated":
        settings["step_us"] = options.step_us
    settings |= dict(pair.split("=", 1) for pair in options.set)
    started = time.monotonic()
    with (
        scheduler(model, **settings) as gate,
        service([gate.address], service_processes=options.service_processes, log_level="warning") as front,
    ):
        _until_ready(front.address)
        startup_s = time.monotonic() - started
        _warm(front.address)
        with _clients(options, front.address, _work(options.requests, model)) as clients:
            before = _busy(gate, front)
            answers = _go(clients, options.seconds)
            after = _busy(gate, front)
    wall = max(answer["wall"] for answer in answers)
    shares = {role: (after[role] - before[role]) / wall for role in before}
    shares["clients"] = sum(answer["busy"] for answer in answers) / wall
    return {**_settings(options, settings), "startup_s": startup_s, "core_share": shares, **_summary(answers, wall)}


def _settings(options: argparse.Namespace, settings: dict[str, object]) -> dict[str, Any]:
    kept = ("model", "streams", "requests", "clients", "connections", "service_processes", "temperature", "seconds")
    return {name: getattr(options, name) for name in kept} | {"scheduler": settings}


def _until_ready(address: str) -> None:
    """Until the model can be used. Raises AssertionError after START_S."""
    deadline = time.monotonic() + START_S
    with Client(address, timeout_s=5) as client:
        while True:
            with contextlib.suppress(RpcError):
                if any(model.ready for model in client.models()):
                    return
            assert time.monotonic() < deadline, f"no model is ready after {START_S:g} s"
            time.sleep(0.05)


def _warm(address: str) -> None:
    with Client(address, timeout_s=120) as client:
        for prompt_tokens in (16, 1024):
            client.generate([7] * prompt_tokens, max_tokens=8, ignore_eos=True)


def _work(requests: int, model: Path) -> list[workload.Work]:
    """The requests, with ids that the model has."""
    vocab_size: int = json.loads((model / "config.json").read_text())["vocab_size"]
    return [
        workload.Work([token % vocab_size for token in prompt], max_tokens)
        for prompt, max_tokens in workload.mixed(requests)
    ]


@contextlib.contextmanager
def _clients(
    options: argparse.Namespace, address: str, work: list[workload.Work]
) -> Iterator[list["subprocess.Popen[str]"]]:
    """Client processes that are connected and wait for the word; killed at the end if they are still there."""
    clients = []
    try:
        for number in range(options.clients):
            client = subprocess.Popen(
                [sys.executable, str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            clients.append(client)
            share = len(range(number, options.streams, options.clients))
            job = {
                "address": address,
                "connections": min(options.connections, share),
                "at_once": share,
                "seconds": options.seconds,
                "temperature": options.temperature,
                "requests": work[number :: options.clients],
            }
            _say(client, json.dumps(job))
        for client in clients:
            assert _line(client, MARGIN_S) == "ready\n"
        yield clients
    finally:
        for client in clients:
            client.kill()
            client.communicate(timeout=10)


def _go(clients: list["subprocess.Popen[str]"], seconds: float) -> list[dict[str, Any]]:
    for client in clients:
        _say(client, "go")
    deadline = time.monotonic() + seconds + MARGIN_S
    return [json.loads(_line(client, deadline - time.monotonic())) for client in clients]


def _say(client: "subprocess.Popen[str]", line: str) -> None:
    assert client.stdin is not None
    client.stdin.write(line + "\n")
    client.stdin.flush()


def _line(client: "subprocess.Popen[str]", timeout_s: float) -> str:
    assert client.stdout is not None
    readable, _, _ = select.select([client.stdout], [], [], max(timeout_s, 0))
    assert readable, f"a client says nothing for {timeout_s:.0f} s"
    return client.stdout.readline()


def _busy(gate: Role, front: Role) -> dict[str, float]:
    """Processor seconds of every role's processes so far."""
    engines = gate.children()
    roles = {
        "service": [psutil.Process(front.pid), *front.children()],
        "gate": [psutil.Process(gate.pid)],
        "engine": engines,
        "worker": [worker for engine in engines for worker in engine.children(recursive=True)],
    }
    return {role: sum(sum(one.cpu_times()[:2]) for one in processes) for role, processes in roles.items() if processes}


def _summary(answers: list[dict[str, Any]], wall: float) -> dict[str, Any]:
    streams = [stream for answer in answers for stream in answer["streams"]]
    errors = [stream["error"] for stream in streams if stream["error"]]
    assert not errors, errors[0]
    first = [stream["arrivals"][0] - stream["begun"] for stream in streams if stream["arrivals"]]
    gaps = [late - early for one in streams for early, late in zip(one["arrivals"], one["arrivals"][1:], strict=False)]
    tokens = sum(stream["tokens"] for stream in streams)
    return {
        "complete": all(stream["ended"] for stream in streams),
        "wall_s": wall,
        "output_tokens": tokens,
        "tokens_per_s": tokens / wall,
        "tokens_per_message": tokens / sum(len(stream["arrivals"]) for stream in streams),
        "first_token_ms": _percentiles(first),
        "gap_ms": _percentiles(gaps),
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{share * 100:g}": percentile(seconds, share) * 1000 for share in (0.5, 0.9, 0.99)}


if __name__ == "__main__":
    main()
