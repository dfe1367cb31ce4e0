"""The executor whose worker is a process: the same tokens, and a worker that dies, hangs or fails is replaced."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from penstock.executor.executor import ExecutorError, WorkerLost
from penstock.executor.multiprocess import MultiprocessExecutor
from penstock.executor.step import ModelInfo, ModelSpec, StepPlan, StepResult
from penstock.executor.worker.arguments import WorkerArguments
from support.by_hand import ByHand, Kind, admission, no_progress, replace_spec, spec, start_of, wait
from support.hand_scheduler import HandScheduler, Request
from support.reference import greedy_tokens
from support.tiny_llama import TinyLlama, build_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=21, shape=TinyLlama(eos_token_id=None))


@contextmanager
def running(model: ModelSpec, *, step_seconds: float = 30.0) -> Iterator[tuple[MultiprocessExecutor, ModelInfo]]:
    executor = MultiprocessExecutor(step_seconds=step_seconds, log_level="warning")
    try:
        yield executor, executor.start(model, no_progress)
    finally:
        executor.shutdown()


def worker() -> psutil.Process:
    (child,) = psutil.Process().children()
    return child


def await_loss(executor: MultiprocessExecutor, seconds: float = 20.0) -> str:
    """What it says when its worker is lost; results before that are taken."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        select.select([executor.fileno()], [], [], 1.0)
        try:
            executor.results()
        except WorkerLost as lost:
            return str(lost)
    raise AssertionError("the loss was not noticed")


def test_tokens_are_those_of_transformers(folder: Path, kind: Kind) -> None:
    requests = [Request([5 + number, 9, 30, 7], 6 + 3 * number) for number in range(8)]
    with running(spec(folder, 2, **kind)) as (executor, info):
        assert info.plans_in_flight == 2
        HandScheduler(executor, info, seed=3, preempt=0.03, hold=0.1).run(requests)
        assert worker().name().startswith("penstock-worker"[:15])
    for request in requests:
        assert request.output == greedy_tokens(folder, request.prompt, request.max_tokens)


def test_a_killed_worker_is_noticed_and_replaced(folder: Path) -> None:
    with running(spec(folder, 2)) as (executor, info):
        first = ByHand(executor)(admissions=(admission(0, [5, 6, 7]),), **start_of(0, 3, [1]))
        before = worker()
        before.kill()
        assert await_loss(executor) == "the worker was killed by SIGKILL"
        for act in (executor.check_health, executor.results, lambda: executor.submit(StepPlan(1, 2))):
            with pytest.raises(WorkerLost):
                act()
        after = executor.restart(no_progress)
        assert msgspec.structs.replace(after, startup_ms={}) == msgspec.structs.replace(info, startup_ms={})
        assert worker().pid != before.pid
        again = ByHand(executor)(admissions=(admission(0, [5, 6, 7]),), **start_of(0, 3, [1]))
    assert again.ids == first.ids


def test_results_before_the_end_are_given_first(folder: Path) -> None:
    with running(spec(folder, 2)) as (executor, _):
        executor.submit(StepPlan(1, 1))
        executor.submit(StepPlan(1, 3))
        taken: list[StepResult] = []
        with pytest.raises(WorkerLost, match="plan 3 came where 2 was due"):  # noqa: PT012  until it comes
            while True:
                taken += wait(executor)
        assert [result.number for result in taken] == [1]


def test_a_worker_that_hangs_is_replaced(folder: Path) -> None:
    with running(spec(folder), step_seconds=1.0) as (executor, _):
        ByHand(executor)(admissions=(admission(0, [5]),), **start_of(0, 1, [1]))
        worker().send_signal(signal.SIGSTOP)
        executor.submit(StepPlan(1, 2))
        assert await_loss(executor) == "the worker answered nothing for 1 s"
        executor.restart(no_progress)
        ByHand(executor)(admissions=(admission(0, [5]),), **start_of(0, 1, [1]))


def test_a_start_that_fails_says_why_in_one_line(folder: Path) -> None:
    executor = MultiprocessExecutor(log_level="error")
    with pytest.raises(ExecutorError) as caught:
        executor.start(replace_spec(spec(folder), max_model_tokens=513), no_progress)
    assert "max_model_tokens 513 is not within the model's 512" in str(caught.value)
    executor.shutdown()


def test_another_worker_has_as_many_blocks_and_may_find_less_memory(folder: Path) -> None:
    with running(spec(folder, num_blocks=None, gpu_memory_utilization=0.5)) as (executor, info):
        worker().kill()
        await_loss(executor)
        assert executor.restart(no_progress).num_blocks == info.num_blocks
        told = WorkerArguments.parse(worker().cmdline()[-1]).spec
    assert told.num_blocks == info.num_blocks
    assert 0.5 < told.gpu_memory_utilization <= 0.55


def test_a_worker_that_is_silent_while_it_starts_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.executor.multiprocess.START_SILENCE_S", 1.0)
    monkeypatch.setattr("penstock.executor.multiprocess.SHUTDOWN_S", 1.0)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr("penstock.executor.worker.arguments.WorkerArguments.argv", lambda self: command)
    executor = MultiprocessExecutor()
    with pytest.raises(ExecutorError, match="the worker said nothing for 1 s while it started"):
        executor.start(spec(folder), no_progress)
    executor.shutdown()
    assert not psutil.Process().children()


def test_a_worker_killed_while_it_starts_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    monkeypatch.setattr(
        "penstock.executor.worker.arguments.WorkerArguments.argv", lambda self: [sys.executable, "-c", code]
    )
    executor = MultiprocessExecutor()
    with pytest.raises(ExecutorError, match="the worker was killed by SIGTERM while it started"):
        executor.start(spec(folder), no_progress)
    executor.shutdown()


def test_nothing_is_left_behind(folder: Path) -> None:
    files = len(os.listdir("/proc/self/fd"))
    with running(spec(folder)) as (executor, _):
        worker().kill()
        await_loss(executor)
        executor.restart(no_progress)
        executor.submit(StepPlan(1, 1))
        executor.shutdown()
        executor.shutdown()
    assert not psutil.Process().children()
    assert len(os.listdir("/proc/self/fd")) == files


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, penstock.executor.multiprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
