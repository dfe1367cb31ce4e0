"""What every rank runs in the tests of tensor parallelism: ``torchrun … ranks.py SCENARIO FOLDER OUT [SETTINGS]``.

Each rank writes what it saw to ``OUT/<rank>.json``. Scenarios start one model after another: a launch takes seconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from penstock.executor.executor import ExecutorError
from penstock.executor.step import ModelSpec, StepPlan, decode_plan, encode_plan
from penstock.executor.uniproc import UniprocExecutor
from penstock.executor.worker.device.runner import DeviceRunner
from penstock.executor.worker.model_runner import ModelRunner
from penstock.local import LLM, SamplingParams
from penstock.local.offline import engine

Seen = dict[str, Any]
SMALL: dict[str, Any] = {
    "executor": "uniproc",
    "device": "cpu",
    "threads": 1,
    "max_sequences": 6,
    "max_step_tokens": 24,
    "block_tokens": 8,
    "progress": False,
    "rank_seconds": 30.0,
}
PROMPTS = [[3 + (7 * number + 5 * place) % 290 for place in range(1 + 11 * number % 40)] for number in range(9)]
"""Of mixed lengths, some longer than a step."""
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12 + number)
    if number % 2
    else SamplingParams(n=1 + number % 3, temperature=0.9, top_p=0.95, seed=2**63 + number, max_tokens=9)
    for number in range(9)
]
RANK = int(os.environ.get("RANK", "0"))
ENDS = {"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}


def worker(llm: LLM) -> UniprocExecutor:
    executor = llm.engine.executor
    assert isinstance(executor, UniprocExecutor)
    return executor


@contextmanager
def watched(see: Callable[[StepPlan], object]) -> Iterator[None]:
    """Show each plan that this rank computes, the first one too: rank 0 may send it before a script has gone on."""
    before = {kind: kind.launch for kind in (ModelRunner, DeviceRunner)}

    def watch(kind: Any, launch: Any) -> None:
        def launch_seen(runner: Any, plan: StepPlan) -> None:
            see(plan)
            launch(runner, plan)

        kind.launch = launch_seen

    for kind, launch in before.items():
        watch(kind, launch)
    try:
        yield
    finally:
        for kind, launch in before.items():
            kind.launch = launch  # type: ignore[method-assign]


def spoil_head(llm: LLM) -> None:
    """Make the logits of this rank those of another model: of a batch that lives on the device."""
    runner: Any = worker(llm).runner
    model = runner._program.model
    model.head = torch.randn_like(model.head)  # another one: a tied head is the embedding, too


def generated(folder: Path, settings: dict[str, Any]) -> Seen:
    """What a model makes, and what it was told to do, to the end: rank 0's last plan may come behind its last token.

    Of the settings, "resident" is one of ModelSpec that LLM does not take; "spoiled" is :func:`spoil_head`.
    """
    plans: list[bytes] = []
    changes = dict(settings)
    spoiled = changes.pop("spoiled", False)
    engine.ModelSpec = functools.partial(ModelSpec, resident=changes.pop("resident", None))  # type: ignore[attr-defined,assignment]
    with watched(lambda plan: plans.append(encode_plan(plan))), LLM(folder, **SMALL | changes) as llm:
        if spoiled and llm.rank:
            spoil_head(llm)
        seen = outputs_of(llm)
    numbers = [decode_plan(plan).number for plan in plans]
    return seen | {"plans": hashlib.sha256(b"".join(plans)).hexdigest(), "numbers": numbers}


def outputs_of(llm: LLM) -> Seen:
    """What it makes in a few calls, and what it says of itself."""
    outputs = llm.generate(PROMPTS, PARAMS, progress=False)
    again = llm.generate(PROMPTS[:2], PARAMS[1:3], progress=False)
    spoken = llm.generate("hello there", PARAMS[1], progress=False)
    spoken += llm.chat([{"role": "user", "content": "hello"}], PARAMS[0], progress=False)
    return {
        "rank": llm.rank,
        "tokens": [[made.token_ids for made in output.outputs] for output in outputs],
        "again": [[made.token_ids for made in output.outputs] for output in again],
        "texts": [[made.text for made in output.outputs] for output in [*outputs, *spoken]],
        "info": {name: getattr(llm.engine.info, name) for name in ("model_digest", "num_blocks", "parameters")},
        "weight_bytes": llm.engine.info.weight_bytes,
    }


@contextmanager
def error(seen: Seen, name: str) -> Iterator[None]:
    """Keep the line that the inside ends with, and how long that took."""
    began = time.monotonic()
    try:
        yield
    except (ExecutorError, ValueError) as fault:
        seen[name] = [type(fault).__name__, str(fault), time.monotonic() - began]


def tokens(folder: Path, settings: dict[str, Any]) -> Seen:
    """What the ranks make of each model in ``folder``, by kind of settings; at last one that nobody closes."""
    seen: Seen = {}
    for kind, changes in settings.items():
        for model in sorted(folder.iterdir()):
            seen[f"{kind} {model.name}"] = generated(model, changes)
    llm = LLM(max(folder.iterdir()), **SMALL)
    llm.generate(PROMPTS[:3], PARAMS[:3], progress=False)
    time.sleep(0.0 if RANK else 1.0)  # rank 1 ends while rank 0 is idle
    return seen


def faults(folder: Path, settings: dict[str, Any]) -> Seen:
    """Starts that fail in one rank or in all, calls that differ; between them nothing is left over."""
    seen: Seen = {}
    for name, model, changes in (
        ("missing", "good" if RANK == 0 else "nowhere", {}),
        ("truncated", "truncated" if RANK == 0 else "good", {}),
        ("another", "another" if RANK else "good", {}),
        ("settings", "good", {"max_sequences": 5 + RANK}),
        ("heads", "one_key_head", {}),
        ("cuda", "good", {"device": "cuda:9"}),
    ):
        with error(seen, name):
            LLM(folder / model, **SMALL | settings | changes).close()
    with LLM(folder / "good", **SMALL | settings) as llm:
        with error(seen, "prompt"):
            llm.generate([[1, 2], []], progress=False)
        with error(seen, "differing"):
            llm.generate([[1, 2, 3 + llm.rank]], PARAMS[1], progress=False)
        with error(seen, "requests"):
            llm.engine.add_request("alone", [5, 6], PARAMS[1])
            while llm.engine.has_unfinished_requests:
                llm.engine.step()
        seen["afterwards"] = outputs_of(llm)
    with error(seen, "absent"):
        if RANK == 0:  # the other one never comes
            LLM(folder / "good", **SMALL | {"rank_seconds": 2.0})
    return seen


def lost(folder: Path, settings: dict[str, Any]) -> Seen:
    """A rank that stops answering, then one that is killed, in the middle of their work; rank 0 times the end of it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which torchrun ends the others as soon as one has ended
    seen: Seen = {}
    meeting, changes = Path(settings["meeting"]), settings["changes"]
    for name in settings["ends"]:
        send, began = ENDS[name], 0.0

        def end(plan: StepPlan, send: signal.Signals = send) -> None:
            nonlocal began
            if plan.number == 9:
                began = time.monotonic()
                if RANK == 1:
                    os.kill(os.getpid(), send)

        other = meet(meeting / name)
        with error(seen, name), watched(end), LLM(folder, **SMALL | changes) as llm:
            llm.generate(PROMPTS, PARAMS, progress=False)
        seen[name][-1] = time.monotonic() - began
        if RANK == 0 and send == signal.SIGSTOP:
            os.kill(other, signal.SIGCONT)
    return seen


def meet(folder: Path) -> int:
    """Wait for the other one of two ranks, however late it comes; its process id."""
    folder.mkdir(parents=True, exist_ok=True)
    mine, other = folder / str(RANK), folder / str(1 - RANK)
    mine.with_suffix(".new").write_text(str(os.getpid()))
    mine.with_suffix(".new").rename(mine)
    give_up = time.monotonic() + 60
    while not other.exists() and time.monotonic() < give_up:
        time.sleep(0.02)
    return int(other.read_text())


def main() -> None:
    scenario, folder, out = sys.argv[1:4]
    settings = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    run = {"tokens": tokens, "faults": faults, "lost": lost}[scenario]
    seen = run(Path(folder), settings)
    (Path(out) / f"{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
