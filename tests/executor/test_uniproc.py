"""The executor driven by plans of every kind, against ``transformers``; and its manners when things go wrong."""

from __future__ import annotations

import os
import random
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from penstock.executor.executor import ExecutorError
from penstock.executor.step import (
    ModelSpec,
    Sampling,
    StepPlan,
    StepResult,
    pack_u32,
)
from penstock.executor.uniproc import UniprocExecutor
from support.by_hand import GREEDY, ByHand, Kind, admission, no_progress, replace_spec, spec, started, wait
from support.hand_scheduler import HandScheduler, Request
from support.reference import greedy_tokens
from support.tiny_llama import TinyLlama, build_tiny_llama, save_weights

SHAPE = TinyLlama(eos_token_id=None)
POISON = 300
"""Its embedding is NaN in the poisoned checkpoint."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=21, shape=SHAPE)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_llama(tmp_path_factory.mktemp("poisoned"), seed=21, shape=SHAPE)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = float("nan")
    save_weights(folder, weights)
    return folder


def greedy(folder: Path, request: Request) -> list[int]:
    """What ``transformers`` makes of it, without regard to stop ids."""
    return greedy_tokens(folder, request.prompt, request.max_tokens)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, POISON) for _ in range(source.choice((1, 7, 8, 25, 60)))] for _ in range(count)]


@pytest.mark.parametrize("depth", [1, 2])
def test_plans_of_every_kind_equal_transformers(folder: Path, depth: int, kind: Kind) -> None:
    requests = [Request(prompt, 5 + 3 * number) for number, prompt in enumerate(prompts(14))]
    with started(spec(folder, depth, **kind)) as (executor, info):
        assert (info.plans_in_flight, info.tokens_ahead) == (depth, depth - 1)
        hands = HandScheduler(executor, info, seed=depth, preempt=0.03, hold=0.1)
        hands.run(requests)
    for request in requests:
        assert request.output == greedy(folder, request)
    assert sum(request.preempted for request in requests) > 10
    assert (sum(request.preempted_in_flight for request in requests) > 3) is (depth == 2)


@pytest.mark.parametrize("depth", [1, 2])
def test_stop_ids_end_a_sequence_with_themselves(folder: Path, depth: int, kind: Kind) -> None:
    requests = [Request(prompt, 24) for prompt in prompts(8, seed=1)]
    expected = [greedy(folder, request) for request in requests]
    for number, (request, tokens) in enumerate(zip(requests, expected, strict=True)):
        request.stop_ids = (1, tokens[3 + 2 * number], 2)
    with started(spec(folder, depth, **kind)) as (executor, info):
        hands = HandScheduler(executor, info, seed=depth, preempt=0.02)
        hands.run(requests)
    for request, tokens in zip(requests, expected, strict=True):
        end = next(i for i, token in enumerate(tokens) if token in request.stop_ids)
        assert request.output == tokens[: end + 1]
    assert (hands.silent > 0) is (depth == 2), "only a plan made too early asks one that has stopped"


@pytest.mark.parametrize("depth", [1, 2])
def test_min_tokens_forbid_stopping_until_they_are_made(folder: Path, depth: int, kind: Kind) -> None:
    """Also across a preemption: output made before it counts."""
    prompt = prompts(1, seed=2)[0]
    free = greedy(folder, Request(prompt, 12))
    stop = free[2]
    requests = [Request(prompt, 40, stop_ids=(stop,), min_tokens=least) for least in (0, 3, 6, 20)]
    with started(spec(folder, depth, **kind)) as (executor, info):
        HandScheduler(executor, info, seed=4, preempt=0.05).run(requests)
    assert requests[0].output == free[:3]
    for request in requests[1:]:
        assert request.output[:2] == free[:2]
        assert stop not in request.output[: request.min_tokens]
        assert len(request.output) == 40 or request.output.index(stop) == len(request.output) - 1


@pytest.mark.parametrize("depth", [1, 2])
def test_sampled_tokens_are_the_same_alone_and_in_a_crowd(folder: Path, depth: int, kind: Kind) -> None:
    sampling = [Sampling(temperature=0.8), Sampling(temperature=1.2, top_k=20), Sampling(top_p=0.8), GREEDY]

    def make() -> list[Request]:
        return [
            Request(prompt, 20, sampling[number % 4], seed=2**64 - 1 - number // 4)
            for number, prompt in enumerate(prompts(12, seed=3))
        ]

    crowd, alone = make(), make()
    with started(spec(folder, depth, **kind)) as (executor, info):
        HandScheduler(executor, info, seed=5, preempt=0.04, hold=0.05).run(crowd)
    with started(spec(folder, 1, **kind)) as (executor, info):
        hands = HandScheduler(executor, info, longest_chunk=1000)
        for request in alone:
            hands.run([request])
    assert [request.output for request in crowd] == [request.output for request in alone]
    assert sum(request.preempted for request in crowd) > 5
    other = Request(alone[0].prompt, 20, sampling[0], seed=5)
    with started(spec(folder, 1, **kind)) as (executor, info):
        HandScheduler(executor, info).run([other])
    assert other.output != alone[0].output


def test_min_p_of_one_leaves_the_best_token(folder: Path, kind: Kind) -> None:
    requests = [Request(prompt, 12, Sampling(temperature=2.0, min_p=1.0), seed=7) for prompt in prompts(6, seed=8)]
    with started(spec(folder, 2, **kind)) as (executor, info):
        HandScheduler(executor, info, seed=9).run(requests)
    for request in requests:
        assert request.output == greedy(folder, request)


def test_bfloat16_runs(folder: Path, kind: Kind) -> None:
    request = Request(prompts(1)[0], 8)
    with started(spec(folder, dtype="bfloat16", **kind)) as (executor, info):
        assert info.dtype == "bfloat16"
        HandScheduler(executor, info).run([request])
    assert len(request.output) == 8


def test_logits_that_are_not_finite_fail_their_sequence_alone(poisoned: Path, kind: Kind) -> None:
    """Its blocks are used by others afterwards, and do them no harm."""
    healthy = [Request(prompt, 30) for prompt in prompts(10, seed=6)]
    sick = [Request([5, 6, POISON, 7, 8, 9, 10, 11, 12], 30), Request([POISON], 30)]
    with started(spec(poisoned, 2, num_blocks=64, **kind)) as (executor, info):
        hands = HandScheduler(executor, info, seed=6)
        hands.run([*healthy[:3], *sick, *healthy[3:]])
        executor.check_health()
    for request in sick:
        assert request.output == []
        assert request.failure == "the model's logits are not finite"
    for request in healthy:
        assert request.output == greedy(poisoned, request)


def test_a_new_epoch_starts_with_empty_slots(folder: Path, kind: Kind) -> None:
    start: dict[str, object] = {
        "admissions": (admission(0, [5, 6]),),
        "block_slots": pack_u32([0]),
        "block_ids": pack_u32([7]),
        "schedule_slots": pack_u32([0]),
        "schedule_rows": pack_u32([2]),
        "rows": pack_u32([0]),
    }
    with started(spec(folder, **kind)) as (executor, _):
        results: list[StepResult] = []
        for epoch in (3, 4):
            executor.submit(StepPlan(epoch, 1, **start))  # type: ignore[arg-type]
            results += wait(executor)
    assert [result.epoch for result in results] == [3, 4]
    assert results[0].ids == results[1].ids
    assert not results[1].failed


def test_a_plan_out_of_order_is_a_health_failure_with_one_line(folder: Path, kind: Kind) -> None:
    with started(spec(folder, 2, **kind)) as (executor, _):
        executor.submit(StepPlan(1, 1))
        executor.submit(StepPlan(1, 3))
        deadline = time.monotonic() + 30
        taken: list[StepResult] = []
        message = ""
        while not message and time.monotonic() < deadline:
            try:
                taken += wait(executor)
            except ExecutorError as error:
                message = str(error)
        assert message == "plan 3 failed: ExecutorError: plan 3 came where 2 was due"
        assert [result.number for result in taken] == [1], "results before the failure are given first"
        for act in (executor.check_health, executor.results, lambda: executor.submit(StepPlan(1, 2))):
            assert select.select([executor.fileno()], [], [], 0)[0], "readable as long as there is something to raise"
            with pytest.raises(ExecutorError, match="plan 3 failed"):
                act()


def test_a_torch_error_is_a_health_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(spec(folder)) as (executor, _):

        def explode(*arguments: object) -> None:
            raise RuntimeError("[enforce fail] not enough memory\nsecond line")

        monkeypatch.setattr("penstock.executor.worker.model_runner.choose_tokens", explode)
        with pytest.raises(ExecutorError) as caught:
            ByHand(executor)(
                admissions=(admission(0, [5]),),
                block_slots=pack_u32([0]),
                block_ids=pack_u32([0]),
                schedule_slots=pack_u32([0]),
                schedule_rows=pack_u32([1]),
                rows=pack_u32([0]),
            )
        assert str(caught.value) == "plan 1 failed: RuntimeError: [enforce fail] not enough memory"


def test_more_plans_than_allowed_are_refused(folder: Path, kind: Kind) -> None:
    with started(spec(folder, 2, **kind)) as (executor, _):
        executor.submit(StepPlan(1, 1))
        executor.submit(StepPlan(1, 2))
        with pytest.raises(ExecutorError, match="plan 3: 2 plans are in flight"):
            executor.submit(StepPlan(1, 3))


def test_shutdown_ends_the_thread_and_closes_the_descriptor(folder: Path) -> None:
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    with started(spec(folder)) as (executor, _):
        executor.submit(StepPlan(1, 1))
        executor.shutdown()
        executor.shutdown()
        with pytest.raises(ExecutorError):
            executor.check_health()
        with pytest.raises(ExecutorError):
            executor.results()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


def test_what_the_model_info_says(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    executor = UniprocExecutor()
    model = ModelSpec(path=str(folder), max_sequences=3, block_tokens=16, max_model_tokens=100, kv_cache_bytes=1 << 20)
    info = executor.start(model, lambda *progress: seen.append(progress))
    executor.shutdown()
    assert info.num_blocks == 3 * 7, "no more than whole contexts of every slot need"
    assert info.max_model_tokens == 100
    assert info.device == "cpu"
    assert info.weight_bytes == 4 * info.parameters == seen[-1][1] == seen[-1][2]
    assert seen[-1][0] == "weights"
    small = replace_spec(model, kv_cache_bytes=3 * 16 * 2 * 2 * 2 * 16 * 4)
    with started(small) as (_, info):
        assert (info.num_blocks, info.max_model_tokens) == (3, 48), "a longer sequence could never end"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"path": "/nowhere"}, "/nowhere/config.json: no such file"),
        ({"dtype": "float64"}, "dtype 'float64' is not supported"),
        ({"plans_in_flight": 3}, "plans_in_flight 3 is not offered"),
        ({"max_model_tokens": 513}, "max_model_tokens 513 is not within the model's 512"),
        ({"num_blocks": None, "kv_cache_bytes": 100}, "no room for one block"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"block_tokens": 48, "resident": True}, "block_tokens is 48, must be a power of two"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not there"),
        ({"device": "tpu"}, "is not known"),
        ({"attention_backend": "sdpa"}, "attention_backend 'sdpa' is not known, only 'auto', 'triton', 'flash_attn'"),
        ({"attention_backend": "flash_attn"}, "'flash_attn' is not possible: it needs a GPU, the device is cpu"),
        ({"attention_backend": "triton", "resident": True}, "'triton' is not possible: it needs a GPU"),
        ({"load_format": "pickle"}, "load_format 'pickle' is not supported"),
        ({"resident": True, "num_blocks": 10**9}, "1000000000 blocks"),
    ],
)
def test_a_start_that_fails_says_why_in_one_line(changes: dict[str, object], line: str, folder: Path) -> None:
    executor = UniprocExecutor()
    with pytest.raises(ExecutorError) as caught:
        executor.start(replace_spec(spec(folder), **changes), no_progress)
    executor.shutdown()
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("resident", [False, True], ids=["host", "resident"])
def test_a_model_with_a_window_is_served_up_to_it(resident: bool, tmp_path: Path) -> None:
    shape = TinyLlama(model_type="mistral", sliding_window=40, eos_token_id=None)
    model = replace_spec(spec(build_tiny_llama(tmp_path, shape=shape)), resident=resident)
    with started(model) as (executor, info):
        assert info.max_model_tokens == 40
        result = ByHand(executor)(admissions=(admission(0, [5] * 39), admission(1, [5] * 41)))
        assert [failure.slot for failure in result.failed] == [1]
        assert "do not fit 40 tokens" in result.failed[0].reason
    with pytest.raises(ExecutorError, match="max_model_tokens 41 is not within the model's 40, its sliding window"):
        UniprocExecutor().start(replace_spec(model, max_model_tokens=41), no_progress)
    with started(replace_spec(model, max_model_tokens=30)) as (_, info):
        assert info.max_model_tokens == 30


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, penstock.executor.uniproc; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
