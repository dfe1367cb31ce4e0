"""A session outlives its streams: no id is lost, none comes twice, nothing is computed twice."""

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest

from gate.fake_engine import BURST, HOLD, STEADY, tokens
from gate.link import PROTOCOL, Service, read_to_end, running, running_gate, submit
from penstock.rpc.errors import RpcError
from penstock.v1 import ConnectRequest, ErrorReason, Hello, SchedulerState


async def test_streams_that_are_cut_again_and_again(tmp_path: Path) -> None:
    rng = random.Random(3)
    prompts = [[STEADY if number % 4 else BURST, number] for number in range(40)]
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handles = [await service.submit(submit(prompt, max_tokens=900)) for prompt in prompts]
        cuts = 0
        while len(service.finished) < len(handles):
            await asyncio.sleep(rng.uniform(0.02, 0.15))
            if cuts < 8:
                await service.disconnect()
                cuts += 1
                welcome = await service.connect([one for one in handles if one not in service.finished])
                assert welcome.resumed
                assert not welcome.lost_handles
        assert cuts == 8
        for handle, prompt in zip(handles, prompts, strict=True):
            assert service.ids[handle] == tokens(prompt, 900)
        assert (await gate.status()).steps == 40, "nothing was submitted twice"


async def test_ends_are_said_again_until_they_are_acknowledged(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(submit([STEADY], max_tokens=50))
        await service.until(lambda: handle in service.finished, "end")
        end = service.finished.pop(handle)
        service.ids[handle] = service.ids[handle][:20]
        await service.disconnect()
        await service.connect([handle])
        await service.until(lambda: handle in service.finished, "the end again")
        assert service.finished[handle] == end
        assert service.ids[handle] == tokens([STEADY], 50)


async def test_an_accepted_that_was_lost(tmp_path: Path) -> None:
    """The service does not know the handle: it submits again, and it is the same attempt."""
    message = submit([STEADY, 4], max_tokens=400)
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        service.reads = False
        await service.say(submit=message)
        await gate.until(lambda seen: seen.steps == 1, "submitted")
        await service.disconnect()
        service.reads = True
        service.ids.clear()
        service.accepted.clear()
        welcome = await service.connect()
        assert welcome.resumed
        await asyncio.sleep(0.1)
        assert not service.ids, "nothing is said of a handle that may be unknown"
        handle = await service.submit(message)
        await service.until(lambda: handle in service.finished, "end")
        assert service.ids[handle] == tokens([STEADY, 4], 400)
        assert (await gate.status()).steps == 1


async def test_an_attempt_in_doubt_that_nobody_claims_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.scheduler.gate.sessions.CLAIM_SECONDS", 0.2)
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        await service.submit(submit([HOLD]))
        await service.submit(submit([STEADY], max_tokens=3))
        await service.disconnect()
        await service.connect()
        assert (await gate.status()).attempts == 2
        await gate.until(lambda seen: seen.attempts == 0 and running(seen) == 0, "cancelled and forgotten")


async def test_what_the_hello_does_not_name_is_cancelled(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        first, second = [await service.submit(submit([STEADY], max_tokens=90_000)) for _ in range(2)]
        await service.acknowledge({first: 0, second: 0})
        await gate.until(lambda seen: running(seen) == 2, "both run")
        await service.disconnect()
        await service.connect([second])
        await gate.until(lambda seen: running(seen) == 1 and seen.attempts == 1, "one is cancelled")
        count = len(service.ids[second])
        await service.until(lambda: len(service.ids[second]) > count + 10, "the other goes on")


async def test_handles_that_are_not_known_are_lost(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service, Service(gate.address) as other:
        welcome = await service.connect([7, 8])
        assert not welcome.resumed
        assert welcome.lost_handles == b"\7\0\0\0\10\0\0\0"
        await other.connect()
        theirs = await other.submit(submit([HOLD]))
        mine = await service.submit(submit([HOLD]))
        await service.disconnect()
        welcome = await service.connect([theirs, mine, mine], [0, 0, 1])
        assert welcome.resumed
        assert welcome.lost_handles == theirs.to_bytes(4, "little") + mine.to_bytes(4, "little")
        assert running(await gate.until(lambda seen: running(seen) == 2, "both run")) == 2


async def test_the_grace_period_ends(tmp_path: Path) -> None:
    async with running_gate(tmp_path, session_grace=0.3) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(submit([HOLD]))
        await gate.until(lambda seen: running(seen) == 1, "runs")
        await service.disconnect()
        await asyncio.sleep(0.1)
        seen = await gate.status()
        assert (seen.sessions, seen.attempts) == (1, 1), "it lives on"
        seen = await gate.until(lambda seen: seen.attempts == 0 and running(seen) == 0, "cancelled")
        assert seen.sessions == 0
        welcome = await service.connect([handle])
        assert not welcome.resumed
        assert welcome.lost_handles


async def test_a_session_without_attempts_ends_with_its_stream(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        await service.disconnect()
        await gate.until(lambda seen: seen.sessions == 0, "forgotten")


async def test_a_newer_stream_takes_the_session_over(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as old:
        await old.connect()
        handle = await old.submit(submit([STEADY], max_tokens=500))
        await old.until(lambda: bool(old.ids[handle]), "a token")
        async with Service(gate.address, old.session) as new:
            new.ids[handle] = old.ids[handle][:1]
            assert (await new.connect([handle])).resumed
            await old.until(lambda: old.end is not None, "the older stream ends")
            await new.until(lambda: handle in new.finished, "end")
            assert new.ids[handle] == tokens([STEADY], 500)
            assert (await gate.status()).sessions == 1


async def test_a_silent_side_is_given_up_and_may_come_back(tmp_path: Path) -> None:
    async with running_gate(tmp_path, silence=0.3) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(submit([STEADY], max_tokens=700))
        service.beats = False
        await service.until(lambda: service.end is not None, "given up")
        assert service.end is not None
        assert "heard" in service.end.message
        await service.disconnect()
        service.beats = True
        await service.connect([handle])
        await service.until(lambda: handle in service.finished, "end")
        assert service.ids[handle] == tokens([STEADY], 700)


async def test_half_a_prompt_is_void_when_the_stream_is_lost(tmp_path: Path) -> None:
    message = submit([HOLD, 1])
    message.prompt_tokens = 6
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        await service.say(submit=message)
        await service.submit(submit([HOLD]))
        assert gate.gate._admission.inside == 2
        await service.disconnect()
        await gate.until(lambda _: gate.gate._admission.inside == 1, "its place is given back")
        await service.connect()
        whole = submit([HOLD] * 6, attempt_id=message.attempt_id)
        await service.submit(whole)


async def test_a_side_that_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    async with running_gate(tmp_path, stall=0.4, session_grace=0.2) as gate, Service(gate.address) as service:
        await service.connect()
        handles = [await service.submit(submit([BURST, 1], max_tokens=90_000)) for _ in range(40)]
        assert len(handles) == 40
        service.reads = False
        async with Service(gate.address) as neighbour:
            await neighbour.connect()
            handle = await neighbour.submit(submit([STEADY], max_tokens=300))
            await neighbour.until(lambda: handle in neighbour.finished, "the neighbour's end")
            assert neighbour.ids[handle] == tokens([STEADY], 300)
            await neighbour.acknowledge({}, [handle])
            await gate.until(lambda seen: (seen.attempts, seen.sessions) == (0, 1), "cut off and given up")


async def test_a_half_closed_stream_ends(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, gate.stub() as stub:
        call = stub.connect()
        service = Service(gate.address)
        hello = Hello("x", service.session, PROTOCOL)
        await call.write(ConnectRequest(hello=hello))
        await call.done_writing()
        with pytest.raises(Exception, match="last word"):
            await read_to_end(call)


async def test_a_stream_that_breaks_during_a_drain_is_resumed(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service, Service(gate.address) as stranger:
        await service.connect()
        handle = await service.submit(submit([STEADY], max_tokens=900))
        draining = asyncio.create_task(gate.gate.drain())
        await service.until(lambda: service.draining is not None, "draining")
        await service.disconnect()
        welcome = await service.connect([handle])
        assert welcome.resumed
        assert welcome.load is not None
        assert welcome.load.state == SchedulerState.DRAINING
        with pytest.raises(RpcError) as refused:
            await stranger.connect()
        assert refused.value.reason == ErrorReason.DRAINING
        assert (await service.refused(submit([STEADY]))).reason == ErrorReason.DRAINING
        await service.until(lambda: handle in service.finished, "end")
        assert service.ids[handle] == tokens([STEADY], 900)
        await service.acknowledge({}, [handle])
        await draining


async def test_an_end_that_nobody_heard_is_kept_while_draining(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(submit([STEADY], max_tokens=100))
        draining = asyncio.create_task(gate.gate.drain())
        await service.until(lambda: service.draining is not None, "draining")
        await service.disconnect()
        await gate.until(lambda seen: running(seen) == 0, "the engine is done")
        await asyncio.sleep(0.2)
        assert (await service.connect([handle])).resumed
        await service.until(lambda: handle in service.finished, "end")
        assert service.ids[handle] == tokens([STEADY], 100)
        await service.acknowledge({}, [handle])
        await draining


async def test_a_submit_that_comes_again_too_late_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt in doubt is being cancelled; an engine that stands still has not ended it yet."""
    monkeypatch.setattr("penstock.scheduler.gate.sessions.CLAIM_SECONDS", 0.1)
    message = submit([HOLD])
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        await service.submit(message)
        os.kill(gate.gate.engine_pid, signal.SIGSTOP)
        try:
            await service.disconnect()
            service.accepted.clear()
            await service.connect()
            await asyncio.sleep(0.3)
            failure = await service.refused(message)
            assert failure.reason == ErrorReason.SCHEDULER_LOST
            assert failure.retry_after_ms
        finally:
            os.kill(gate.gate.engine_pid, signal.SIGCONT)
        await gate.until(lambda seen: seen.attempts == 0 and running(seen) == 0, "cancelled and forgotten")
