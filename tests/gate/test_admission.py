"""The queue is bounded, and who is refused hears when to come back."""

from pathlib import Path

import pytest

from gate.fake_engine import HOLD, SLOTS, STEADY
from gate.link import Service, running, running_gate, submit
from penstock.rpc.errors import RpcError
from penstock.scheduler.gate.admission import MAX_RETRY_S, Admission, DrainRate
from penstock.scheduler.records.events import Load
from penstock.v1 import ErrorReason


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refused(admission: Admission, tokens: int = 1) -> RpcError:
    with pytest.raises(RpcError) as caught:
        admission.enter(tokens)
    assert caught.value.reason == ErrorReason.QUEUE_FULL
    return caught.value


def waiting(count: int) -> Load:
    return Load(count, 0, 0, 1, 2, 0, 10, 0, 0, 0, 0)


def test_the_number_is_bounded() -> None:
    admission = Admission(3, 1000, 2)
    for _ in range(5):
        admission.enter(1)
    refused(admission)
    admission.started(1)
    refused(admission)
    admission.leave(1, started=True)
    admission.enter(1)
    refused(admission)
    admission.leave(1, started=False)
    admission.enter(1)
    assert admission.inside == 5


def test_what_the_engine_says_counts_while_anybody_waits() -> None:
    """Blocks lack: two run, though there are slots for a hundred."""
    admission = Admission(3, 1000, 100)
    for _ in range(4):
        admission.enter(1)
    admission.observe(waiting(2))
    admission.enter(1)
    refused(admission)
    admission.leave(1, started=True)
    admission.enter(1)
    refused(admission)
    admission.observe(waiting(0))
    admission.enter(1)


def test_the_tokens_are_bounded_but_a_single_prompt_is_not() -> None:
    admission = Admission(10, 100, 2)
    admission.enter(5000)
    refused(admission)
    admission.started(5000)
    admission.enter(60)
    refused(admission, 41)
    admission.enter(40)


def test_when_to_come_back_follows_from_the_rate() -> None:
    clock = Clock()
    admission = Admission(10, 1000, 1, DrainRate(clock))
    for _ in range(11):
        admission.enter(1)
    assert refused(admission).retry_after_s == 1.0, "nothing is known yet"
    for _ in range(100):  # ten a second
        clock.now += 0.1
        admission.started(1)
        admission.leave(1, started=True)
        admission.enter(1)
    assert refused(admission).retry_after_s == pytest.approx(11 / 10, rel=0.2)
    clock.now += 8
    assert refused(admission).retry_after_s == pytest.approx(11 / 10 * 2.718 ** (8 / 5), rel=0.2)
    clock.now += 60
    later = refused(admission).retry_after_s
    assert later is not None
    assert later <= MAX_RETRY_S


async def test_who_acknowledges_nothing_gets_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.scheduler.gate.intake.MAX_UNACKNOWLEDGED", 3)
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handles = [await service.submit(submit([STEADY], max_tokens=2)) for _ in range(3)]
        await service.until(lambda: len(service.finished) == 3, "ends")
        assert (await service.refused(submit([STEADY]))).reason == ErrorReason.QUEUE_FULL
        await service.acknowledge({}, handles[:1])
        await gate.until(lambda seen: seen.attempts == 2, "one is forgotten")
        message = submit([STEADY], max_tokens=90_000)
        await service.submit(message)
        await service.cancel(message.attempt_id)
        await service.acknowledge({}, handles)
        await gate.until(lambda seen: seen.attempts == 0, "all are forgotten")
        (session,) = gate.gate._sessions.all()
        assert session.unacknowledged == 0


async def test_a_full_queue_over_the_link(tmp_path: Path) -> None:
    async with running_gate(tmp_path, max_waiting=3) as gate, Service(gate.address) as service:
        await service.connect()
        messages = [submit([HOLD]) for _ in range(SLOTS + 3)]
        for message in messages:
            await service.submit(message)
        failure = await service.refused(submit([HOLD]))
        assert (failure.code, failure.reason) == (8, ErrorReason.QUEUE_FULL)
        assert failure.retry_after_ms
        await service.cancel(messages[0].attempt_id)
        await gate.until(lambda seen: seen.attempts == SLOTS + 2 and running(seen) == SLOTS + 2, "one has left")
        handle = await service.submit(submit([STEADY], max_tokens=2))
        await service.until(lambda: handle in service.finished, "end")
