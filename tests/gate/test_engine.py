"""The engine stops, dies, lies, or is too slow for what it is told."""

import asyncio
import os
import signal
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gate.fake_engine import EXIT, GARBAGE, HOLD, STEADY, tokens
from gate.link import Running, Service, engine_command, running, running_gate, submit
from penstock.executor.step import ModelSpec, Sampling, pack_u32
from penstock.rpc.channel import open_channel
from penstock.scheduler.gate.engine_process import EngineProcess
from penstock.scheduler.records import commands, events
from penstock.scheduler.records.startup import EngineSpec
from penstock.v1 import DrainRequest, ErrorReason, SchedulerState

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "penstock.v1.SchedulerService"


async def health(gate: Running, service: str = SERVICE) -> int:
    async with open_channel(gate.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)


async def test_a_stopped_engine_is_noticed_and_goes_on(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(submit([STEADY], max_tokens=2000))
        await service.until(lambda: len(service.ids[handle]) > 10, "some ids")
        assert [await health(gate), await health(gate, "")] == [SERVING, SERVING]
        os.kill(gate.gate.engine.pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            await service.until(lambda: service.load.state == SchedulerState.UNRESPONSIVE, "unresponsive")
            assert 2.5 < time.monotonic() - start < 5
            assert [await health(gate), await health(gate, "")] == [NOT_SERVING, NOT_SERVING]
            failure = await service.refused(submit([STEADY]))
            assert (failure.code, failure.reason) == (14, ErrorReason.NO_SCHEDULER)
            assert failure.retry_after_ms
            assert (await gate.status()).attempts == 1
        finally:
            os.kill(gate.gate.engine.pid, signal.SIGCONT)
        await service.until(lambda: handle in service.finished, "end")
        assert service.ids[handle] == tokens([STEADY], 2000)
        assert service.load.state == SchedulerState.SERVING
        assert await health(gate) == SERVING


@pytest.mark.parametrize(("what", "why"), [(EXIT, "exit code 7"), (GARBAGE, "could not be handled")])
async def test_an_engine_that_is_lost(tmp_path: Path, what: int, why: str) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(submit([STEADY], max_tokens=90_000))
        await service.until(lambda: len(service.ids[handle]) > 10, "some ids")
        last = await service.submit(submit([what]))
        async with asyncio.timeout(5):
            line = await gate.gate.engine.ended()
        assert why in line
        assert "\n" not in line
        await gate.gate.lose_engine()
        await service.until(lambda: {handle, last} <= service.failed.keys(), "failures")
        failure = service.failed[handle]
        assert (failure.code, failure.reason) == (14, ErrorReason.SCHEDULER_LOST)
        assert failure.retry_after_ms
        await service.until(lambda: service.end is not None, "the stream's end")
        assert await health(gate) == NOT_SERVING


async def test_drain_finishes_what_runs_and_admits_nobody(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service, gate.stub() as stub:
        await service.connect()
        handle = await service.submit(submit([STEADY], max_tokens=500))
        await service.until(lambda: bool(service.ids[handle]), "a token")
        answer = await stub.drain(DrainRequest(grace_ms=5000))
        assert answer.attempts == 1
        assert gate.gate.drain_asked.is_set()
        await service.until(lambda: service.draining is not None, "draining")
        assert service.draining is not None
        assert service.draining.grace_ms == 5000
        failure = await service.refused(submit([STEADY]))
        assert (failure.code, failure.reason) == (14, ErrorReason.DRAINING)
        assert await health(gate) == NOT_SERVING
        await gate.gate.drain()
        await service.until(lambda: service.end is not None, "the stream's end")
        assert service.ids[handle] == tokens([STEADY], 500)
        assert handle in service.finished
        assert service.end is not None
        assert (service.end.code, service.end.reason) == (grpc.StatusCode.UNAVAILABLE, ErrorReason.DRAINING)
        assert service.end.from_peer
        assert (await gate.status()).preemptions_in_flight == 1, "the engine was told"


async def test_drain_cuts_off_what_lasts_too_long(tmp_path: Path) -> None:
    async with running_gate(tmp_path, drain_grace=0.2) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(submit([HOLD]))
        start = time.monotonic()
        await gate.gate.drain()
        assert 0.2 <= time.monotonic() - start < 3
        await service.until(lambda: handle in service.failed, "failure")
        assert service.failed[handle].reason == ErrorReason.DRAINING


async def test_commands_wait_in_order_while_the_engine_takes_none() -> None:
    """More than the ring holds: nothing is lost, nothing blocks, and the gate knows that it is too much."""
    seen: list[events.Load] = []

    def take(record: events.Event) -> None:
        if isinstance(record, events.LoadReport):
            seen.append(record.load)

    spec = EngineSpec(executor="fake", model=ModelSpec(path="."))
    engine = EngineProcess(spec, take, engine_command)
    engine.start()
    try:
        await until(lambda: bool(seen), "it works")
        os.kill(engine.pid, signal.SIGSTOP)
        prompt = pack_u32([HOLD] * 50_000)
        for handle in range(1, 501):
            sample = commands.SubmitSample(handle, 0, 0)
            engine.send(commands.Submit((sample,), prompt, Sampling(), 5, time.monotonic_ns()))
        engine.send(commands.Cancel(pack_u32(list(range(1, 501)))))
        assert congested(engine)
        os.kill(engine.pid, signal.SIGCONT)
        await until(lambda: (seen[-1].steps, seen[-1].preemptions, seen[-1].running) == (500, 500, 0), "all obeyed")
        assert not congested(engine)
    finally:
        await engine.stop()
    await engine.stop()


def congested(engine: EngineProcess) -> bool:
    return engine.congested


async def test_an_engine_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.scheduler.gate.engine_process.SHUTDOWN_SECONDS", 0.2)
    started: list[events.Event] = []
    engine = EngineProcess(EngineSpec(executor="fake", model=ModelSpec(path=".")), started.append, engine_command)
    engine.start()
    await until(lambda: bool(started), "it works")
    pid = engine.pid
    os.kill(pid, signal.SIGSTOP)
    await engine.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_what_comes_behind_a_bad_record_is_not_looked_at() -> None:
    seen: list[events.Event] = []

    def take(record: events.Event) -> None:
        seen.append(record)
        time.sleep(0.5)  # more of them come meanwhile
        raise ValueError("unheard of")

    engine = EngineProcess(EngineSpec(executor="fake", model=ModelSpec(path=".")), take, engine_command)
    engine.start()
    try:
        async with asyncio.timeout(10):
            assert "could not be handled" in await engine.ended()
    finally:
        await engine.stop()
    assert len(seen) == 1


async def test_an_idle_engine_stays_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.scheduler.gate.liveness.STALL_SECONDS", 0.6)
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        await service.until(lambda: service.loads > 0, "a load")
        for _ in range(15):
            await asyncio.sleep(0.1)
            assert service.load.state == SchedulerState.SERVING
        assert running(await gate.status()) == 0


async def until(condition: "object", what: str) -> None:
    assert callable(condition)
    try:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(what) from None
