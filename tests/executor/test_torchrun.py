"""Tensor parallelism under torchrun: ranks that share a model make the tokens of one process; they live together."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.executor.executor import Executor, ExecutorError
from penstock.executor.launcher import TORCHRUN, read_launch, torchrun_ranks
from penstock.executor.multiprocess import MultiprocessExecutor
from penstock.executor.simulated import SimulatedExecutor
from penstock.executor.uniproc import UniprocExecutor
from support import ranks
from support.by_hand import no_progress, spec
from support.reference import greedy_tokens
from support.tiny_llama import TINY_QWEN2, TINY_QWEN3, TinyLlama, build_tiny_llama

SHAPES = {
    "llama": TinyLlama(eos_token_id=None, attention_bias=True, mlp_bias=True),
    "qwen2": replace(TINY_QWEN2, eos_token_id=None),
    "qwen3": replace(TINY_QWEN3, eos_token_id=None, head_dim=32),
}
FOUR = TinyLlama(eos_token_id=None, num_key_value_heads=4)
SCRIPT = Path(ranks.__file__)
LIMIT_S = 100.0
GPU_LIMIT_S = 900.0
"""Kernels are compiled, for each of a few models."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, shape in SHAPES.items():
        build_tiny_llama(folder / name, seed=21, shape=shape, shards=2, tokenizer=True)
    return folder


def launch(
    scenario: str,
    folder: Path,
    out: Path,
    settings: dict[str, Any] | None = None,
    *,
    size: int = 2,
    limit: float = LIMIT_S,
    lost: Sequence[int] = (),
) -> list[ranks.Seen]:
    """What each rank saw but those that are ``lost``, which write nothing; torchrun ends well if none is."""
    out.mkdir(exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    arguments = [scenario, str(folder), str(out), json.dumps(settings or {})]
    ended = subprocess.run(
        [*torchrun, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=limit, check=False
    )
    print(ended.stdout[-4000:], ended.stderr[-8000:])
    assert (ended.returncode == 0) == (not lost)
    files = [out / f"{rank}.json" for rank in range(size)]
    assert [rank for rank, file in enumerate(files) if not file.exists()] == list(lost)
    return [json.loads(file.read_text()) for file in files if file.exists()]


def alone(folder: Path) -> ranks.Seen:
    """What one process makes."""
    return ranks.generated(folder, {})


def assert_same_work(seen: list[ranks.Seen], expected: ranks.Seen) -> None:
    """All ranks computed the same plans and have the tokens of one process."""
    assert [one["rank"] for one in seen] == list(range(len(seen)))
    for one in seen:
        for name in ("tokens", "again", "texts", "info"):
            assert one[name] == expected[name], name
        assert one["plans"] == seen[0]["plans"]
        assert one["numbers"] == list(range(1, len(one["numbers"]) + 1))
    assert len(seen[0]["numbers"]) > 20


KINDS = {"host": {}, "resident": {"resident": True}, "spoiled": {"resident": True, "spoiled": True}}


@pytest.fixture(scope="module")
def two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ranks.Seen]:
    """What each of two ranks made of every model; the scripts ended well without closing their last one."""
    return launch("tokens", models, tmp_path_factory.mktemp("seen"), KINDS)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_make_the_tokens_of_one_process(
    kind: str, name: str, two_ranks: list[ranks.Seen], models: Path
) -> None:
    """Also where the other rank's logits are spoiled: rank 0 chooses for both, before anything goes on from there."""
    seen, expected = [one[f"{kind} {name}"] for one in two_ranks], alone(models / name)
    assert_same_work(seen, expected)
    for one in seen:
        assert 0.5 < one["weight_bytes"] / expected["weight_bytes"] < 0.8, "a share, and what all have"
    for prompt, params, made in list(zip(ranks.PROMPTS, ranks.PARAMS, seen[1]["tokens"], strict=True))[1::2]:
        assert params.max_tokens is not None
        assert made == [greedy_tokens(models / name, prompt, params.max_tokens)]


@pytest.mark.long
def test_four_ranks(tmp_path: Path) -> None:
    build_tiny_llama(tmp_path / "models" / "four", seed=3, shape=FOUR, tokenizer=True)
    seen = launch("tokens", tmp_path / "models", tmp_path / "seen", KINDS, size=4)
    for kind in KINDS:
        assert_same_work([one[f"{kind} four"] for one in seen], alone(tmp_path / "models" / "four"))


def test_a_fault_in_one_rank_is_one_line_in_all(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    build_tiny_llama(folder / "good", seed=21, tokenizer=True)
    build_tiny_llama(folder / "another", seed=22, tokenizer=True)
    build_tiny_llama(folder / "one_key_head", shape=TinyLlama(num_key_value_heads=1), tokenizer=True)
    truncated = build_tiny_llama(folder / "truncated", seed=21, tokenizer=True) / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    first, second = launch("faults", folder, tmp_path / "out")
    lines = {name: [one[name] for one in (first, second) if name in one] for name in {**first, **second}}
    assert len(lines.pop("afterwards")) == 2
    for name, faults in lines.items():
        for _, line, seconds in faults:
            assert "\n" not in line, name
            assert seconds < 20, name
    nowhere = f"{folder}/nowhere/config.json: no such file"
    assert [line[1] for line in lines["missing"]] == [f"rank 1: {nowhere}", nowhere]
    assert lines["truncated"][0][1].startswith(f"{truncated}: ")
    assert lines["truncated"][1][1] == f"rank 0: {lines['truncated'][0][1]}"
    for one in ("another", "settings", "heads", "cuda"):
        assert lines[one][0][:2] == lines[one][1][:2]
    assert lines["settings"][0][1] == "max_sequences is 5 in rank 0 and 6 in rank 1"
    assert lines["another"][0][1].startswith("the model is ")
    key_heads = "num_key_value_heads 1 is not a multiple of tensor_parallel 2"
    assert lines["heads"][0][1] == f"{folder}/one_key_head/config.json: {key_heads}"
    assert "device 'cuda:9' is not there" in lines["cuda"][0][1]
    assert lines["prompt"][0][:2] == lines["prompt"][1][:2]
    assert lines["prompt"][0][:2] == ["ValueError", "a prompt of 0 tokens; it must have at least 1 and fewer than 512"]
    ((_, line, _),) = lines["differing"]
    assert line == "rank 1 was given other prompts than rank 0: all ranks must make the same calls"
    ((_, line, _),) = lines["requests"]
    assert line.startswith("this rank follows rank 0")
    ((kind, line, _),) = lines["absent"]
    assert kind == "GroupError"
    assert line.startswith("the 2 ranks did not meet: ")
    assert first["afterwards"]["tokens"] == second["afterwards"]["tokens"]


def test_a_rank_that_is_lost_ends_the_others_within_the_deadline(models: Path, tmp_path: Path) -> None:
    changes = {"rank_seconds": 4.0}
    settings = {"meeting": str(tmp_path / "meeting"), "changes": changes, "ends": ["stopped", "killed"]}
    (first,) = launch("lost", models / "llama", tmp_path / "out", settings, lost=[1])
    assert_lost(first["stopped"], 4.0, 20.0)
    assert_lost(first["killed"], 0.0, 10.0)


def assert_lost(end: list[Any], least: float, most: float) -> None:
    """One line, within so many seconds."""
    kind, line, seconds = end
    assert kind == "ExecutorError"
    assert "another rank of 2 is lost or does not answer: " in line
    assert "\n" not in line
    assert least <= seconds < most


@pytest.mark.gpu
@pytest.mark.timeout(GPU_LIMIT_S + 60)
def test_two_gpus_make_the_tokens_of_one_process(models: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    gpu = {"device": "cuda", "gpu_memory_utilization": 0.2, "rank_seconds": 300.0}
    kinds = {"graphs": gpu, "eager": gpu | {"cuda_graphs": False}, "spoiled": gpu | {"spoiled": True}}
    seen = launch("tokens", models, tmp_path / "seen", kinds, limit=GPU_LIMIT_S)
    for name in SHAPES:
        expected = ranks.generated(models / name, gpu)
        for kind in kinds:
            for one in seen:
                made = one[f"{kind} {name}"]
                assert [made[what] for what in ("tokens", "again")] == [expected[what] for what in ("tokens", "again")]
                assert made["plans"] == seen[0][f"{kind} {name}"]["plans"]


@pytest.mark.gpu
@pytest.mark.timeout(GPU_LIMIT_S + 60)
def test_a_rank_that_is_killed_ends_the_other_one_on_gpus(models: Path, tmp_path: Path) -> None:
    """Though the device of the other one waits for it in the middle of a graph."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    changes = {"device": "cuda", "gpu_memory_utilization": 0.2, "rank_seconds": 300.0}
    settings = {"meeting": str(tmp_path / "meeting"), "changes": changes, "ends": ["killed"]}
    (first,) = launch("lost", models / "llama", tmp_path / "out", settings, limit=GPU_LIMIT_S, lost=[1])
    assert_lost(first["killed"], 0.0, 30.0)


# ---- refused by name, before anything is started ----

LAUNCHED = {
    TORCHRUN: "x",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


def test_what_the_launcher_said() -> None:
    launch = read_launch(LAUNCHED)
    assert (launch.rank, launch.size, launch.local_rank) == (1, 2, 1)
    assert torchrun_ranks(LAUNCHED) == 2
    assert torchrun_ranks({name: value for name, value in LAUNCHED.items() if name != TORCHRUN}) == 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"RANK": None}, "RANK is not set: the ranks must be started by torchrun"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', must be a whole number"),
        ({"RANK": "2"}, "RANK is 2, must be below WORLD_SIZE 2"),
    ],
)
def test_a_launch_that_makes_no_sense_is_named(changes: dict[str, str | None], line: str) -> None:
    environment = {name: value for name, value in (LAUNCHED | changes).items() if value is not None}
    with pytest.raises(ExecutorError, match=line):
        read_launch(environment)


@pytest.mark.parametrize("create", [MultiprocessExecutor, SimulatedExecutor])
def test_executors_that_do_not_offer_it_say_so(create: Callable[[], Executor], models: Path) -> None:
    executor = create()
    with pytest.raises(ExecutorError, match="tensor_parallel 2: only the uniproc executor offers it"):
        executor.start(spec(models / "llama", tensor_parallel=2), no_progress)
    executor.shutdown()


def test_ranks_that_nobody_started(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = UniprocExecutor()
    with pytest.raises(ExecutorError, match="is not set: the ranks must be started by torchrun"):
        executor.start(spec(models / "llama", tensor_parallel=2), no_progress)
    for changes, line in (
        ({"tensor_parallel": 0}, "tensor_parallel is 0, must be at least 1"),
        ({"tensor_parallel": 2, "rank_seconds": 0.5}, "rank_seconds is 0.5, must be at least 1"),
    ):
        with pytest.raises(ExecutorError, match=line):
            executor.start(spec(models / "llama", **changes), no_progress)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ExecutorError, match="tensor_parallel is 3, and 2 ranks were started"):
        executor.start(spec(models / "llama", tensor_parallel=3), no_progress)
    executor.shutdown()
