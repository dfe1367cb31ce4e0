"""Roles as processes: apart, watched, ended cleanly, never left behind."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from penstock.rpc.errors import RpcError
from penstock.v1 import ListModelsRequest, StreamRequest
from support.clients import caller, collect, request
from support.stack import Stack, healthy, stack, wait_until
from support.tiny_llama import TinyLlama, build_tiny_llama

SCHEDULER = "penstock.v1.SchedulerService"
GENERATION = "penstock.v1.GenerationService"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyLlama(max_position_embeddings=8192)
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", shape=shape, tokenizer=True)


@pytest.fixture
def roles(model: Path) -> Iterator[Stack]:
    with stack(model, executor="simulated", step_us=5000, plans_in_flight=2) as started:
        yield started


def test_service_gate_and_engine_are_processes_of_their_own(roles: Stack) -> None:
    names = {psutil.Process(pid).name() for pid in (roles.service.pid, roles.scheduler.pid, roles.engine.pid)}
    assert names == {"penstock-servic", "penstock-gate", "penstock-engine"}
    assert len({roles.service.pid, roles.scheduler.pid, roles.engine.pid}) == 3
    tree = subprocess.run(["ps", "-o", "comm=", "--ppid", str(roles.scheduler.pid)], capture_output=True, text=True)
    assert tree.stdout.split() == ["penstock-engine"]


async def test_a_stopped_engine_is_noticed_and_streams_go_on_after_it(roles: Stack) -> None:
    gate, service = roles.scheduler.address, roles.service.address
    async with caller(service) as stubs:
        stream = stubs.generation.stream(StreamRequest(request=request([5] * 20, max_tokens=1500, ignore_eos=True)))
        ids = [token for _ in range(3) for token in (await stream.__anext__()).token_ids]
        roles.engine.send_signal(signal.SIGSTOP)
        try:
            start = time.monotonic()
            while await asyncio.to_thread(healthy, gate, SCHEDULER):
                await asyncio.sleep(0.05)
            while await asyncio.to_thread(healthy, service, GENERATION):
                await asyncio.sleep(0.05)
            assert time.monotonic() - start < 5
            listed = await stubs.models.list_models(ListModelsRequest(), timeout=2)
            assert [model.name for model in listed.models] == ["tiny"]
            assert not listed.models[0].replicas[0].ready
        finally:
            roles.engine.send_signal(signal.SIGCONT)
        async for response in stream:
            ids += response.token_ids
        assert len(ids) == 1500
        wait_until(lambda: healthy(service, GENERATION))
        alone, _ = await collect(stubs, request([5] * 20, max_tokens=1500, ignore_eos=True))
        assert alone == ids


def test_an_idle_engine_stays_healthy(roles: Stack) -> None:
    for _ in range(12):
        time.sleep(0.5)
        assert healthy(roles.scheduler.address)
        assert healthy(roles.service.address)


async def test_a_dead_engine_ends_its_gate_and_its_streams_with_unavailable(roles: Stack) -> None:
    async with caller(roles.address) as stubs:
        stream = stubs.generation.stream(StreamRequest(request=request([5] * 20, max_tokens=4000, ignore_eos=True)))
        await stream.__anext__()
        roles.engine.kill()
        with pytest.raises(RpcError) as caught:
            async for _ in stream:
                pass
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert caught.value.retry_after_s
    assert await asyncio.to_thread(roles.scheduler.process.wait, 10) == 1
    assert "engine" in roles.scheduler.errors


@pytest.mark.parametrize("role", ["service", "scheduler"])
def test_sigterm_ends_a_role_with_0(roles: Stack, role: str) -> None:
    engine = roles.engine
    process = getattr(roles, role)
    assert process.stop() == 0
    if role == "scheduler":
        engine.wait(5)


def test_nothing_is_left_when_the_gate_is_killed(roles: Stack) -> None:
    engine = roles.engine
    roles.scheduler.process.kill()
    roles.scheduler.process.wait(5)
    engine.wait(5)


def started_serve(environment: dict[str, str], *arguments: str) -> tuple["subprocess.Popen[str]", str]:
    """``penstock serve`` and its ready line."""
    command = [sys.executable, "-m", "penstock.local.main", "serve", "--grpc-address", "127.0.0.1:0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready "):
            return process, line
    raise AssertionError(f"not ready: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_serve_leaves_no_process_behind(tmp_path: Path, how: signal.Signals) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    process, _ = started_serve(environment, "--executor", "simulated")
    children = psutil.Process(process.pid).children(recursive=True)
    assert {child.name() for child in children} >= {"penstock-servic", "penstock-gate", "penstock-engine"}
    process.send_signal(how)
    code = process.wait(20)
    assert code == (0 if how is signal.SIGTERM else -signal.SIGKILL)
    gone, alive = psutil.wait_procs(children, timeout=10)
    with contextlib.suppress(psutil.NoSuchProcess):
        assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    assert len(gone) + len(alive) == len(children)
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()
