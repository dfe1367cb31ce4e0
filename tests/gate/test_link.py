"""One session over a healthy stream."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gate.fake_engine import BURST, FAIL, HOLD, LOSE_TOKENS, STEADY, tokens
from gate.link import Running, Service, running, running_gate, submit, u32
from penstock.scheduler.gate.checks import PART_BYTES
from penstock.v1 import (
    Cancel,
    CancelReason,
    ErrorReason,
    FinishReason,
    SchedulerState,
    Submit,
    SubmitPart,
    SubmitSample,
)


async def test_the_welcome_says_what_the_model_is(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"served_model_name": "tiny", "replica": "r1", "max_waiting": 9}
    async with running_gate(tmp_path, **settings) as gate, Service(gate.address) as service:
        welcome = await service.connect()
    limits = welcome.limits
    assert limits is not None
    assert (welcome.model, welcome.replica, welcome.model_digest) == ("tiny", "r1", "weights")
    assert (welcome.vocab_size, welcome.eos_ids, welcome.block_tokens) == (1000, [2], 16)
    assert (limits.max_model_tokens, limits.max_samples, limits.max_stop_ids, limits.max_waiting) == (100_000, 1, 64, 9)
    assert not welcome.resumed
    assert welcome.load is not None
    assert welcome.load.state == SchedulerState.SERVING


async def test_load_is_the_heartbeat(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        await asyncio.sleep(0.55)
        assert 3 <= service.loads <= 6
        assert (service.load.state, service.load.max_running) == (SchedulerState.SERVING, 4)


@pytest.mark.parametrize("what", [STEADY, BURST])
async def test_every_id_arrives_once_and_then_the_end(tmp_path: Path, what: int) -> None:
    prompts = [[what, 5, number] for number in range(30)]
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handles = [await service.submit(submit(prompt, max_tokens=250)) for prompt in prompts]
        assert len(set(handles)) == 30
        await service.until(lambda: len(service.finished) == 30, "ends")
        for handle, prompt in zip(handles, prompts, strict=True):
            assert service.ids[handle] == tokens(prompt, 250)
        end = service.finished[handles[0]]
        assert (end.reason, end.tokens, end.preemptions) == (FinishReason.LENGTH, 250, 1)
        assert (end.queue_us, end.prefill_us, end.decode_us) == (1, 2, 3)
        await service.acknowledge({}, handles)
        await gate.until(lambda seen: seen.attempts == 0, "all forgotten")


async def test_what_one_attempt_delivered_is_not_said_again(tmp_path: Path) -> None:
    prompt = [STEADY, 8]
    made = tokens(prompt, 20)
    message = submit(prompt, max_tokens=20, samples=[SubmitSample(seed=1, delivered_ids=u32(made[:13]))])
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        service.delivered[message.attempt_id] = made[:13]
        handle = await service.submit(message)
        await service.until(lambda: handle in service.finished, "end")
        assert service.ids[handle] == made


async def test_an_attempt_is_accepted_once(tmp_path: Path) -> None:
    message = submit([HOLD])
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(message)
        service.accepted.clear()
        assert await service.submit(message) == handle
        seen = await gate.until(lambda seen: running(seen) == 1, "runs")
        assert (seen.attempts, seen.steps) == (1, 1)


@pytest.mark.parametrize(
    ("prompt", "remaining_ms", "code", "reason"),
    [
        ([FAIL], None, 13, ErrorReason.SEQUENCE_FAILED),
        ([LOSE_TOKENS], None, 13, ErrorReason.INTERNAL),
        ([HOLD], 50, 4, ErrorReason.DEADLINE),
    ],
)
async def test_what_fails_alone(
    tmp_path: Path, prompt: list[int], remaining_ms: int | None, code: int, reason: ErrorReason
) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        neighbour = await service.submit(submit([STEADY], max_tokens=300))
        handle = await service.submit(submit(prompt, remaining_ms=remaining_ms))
        await service.until(lambda: handle in service.failed, "failure")
        assert (service.failed[handle].code, service.failed[handle].reason) == (code, reason)
        await service.until(lambda: neighbour in service.finished, "the neighbour's end")
        assert service.ids[neighbour] == tokens([STEADY], 300)
        await service.acknowledge({}, [handle, neighbour])
        await gate.until(lambda seen: seen.attempts == 0, "all forgotten")


@pytest.mark.parametrize("reason", [CancelReason.CLIENT, CancelReason.DEADLINE, CancelReason.UNSPECIFIED])
async def test_a_cancelled_attempt_is_forgotten_without_a_word(tmp_path: Path, reason: CancelReason) -> None:
    message = submit([STEADY], max_tokens=90_000)
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(message)
        await service.until(lambda: bool(service.ids.get(handle)), "a token")
        await service.cancel(message.attempt_id, reason)
        await service.cancel(message.attempt_id, reason)
        await gate.until(lambda seen: seen.attempts == 0 and seen.preemptions > 0, "forgotten")
        assert (await gate.status()).preemptions == 1, "the engine is told once"
        assert not service.finished


async def test_who_cancels_for_a_stop_text_hears_the_end(tmp_path: Path) -> None:
    message = submit([STEADY], max_tokens=90_000)
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(message)
        await service.until(lambda: bool(service.ids.get(handle)), "a token")
        await service.cancel(message.attempt_id, CancelReason.STOP_SEQUENCE)
        await service.until(lambda: handle in service.finished, "end")
        end = service.finished[handle]
        assert (end.reason, end.tokens) == (FinishReason.CANCELLED, len(service.ids[handle]))
        assert (await gate.status()).attempts == 1
        await service.acknowledge({}, [handle])
        await gate.until(lambda seen: seen.attempts == 0, "forgotten")


async def test_a_sample_that_is_not_there_is_not_cancelled(tmp_path: Path) -> None:
    message = submit([HOLD], samples=[SubmitSample(index=3, seed=1)])
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        await service.submit(message)
        for samples, left in (([2], 1), ([3, 2], 0)):
            await service.say(cancel=Cancel(attempt_id=message.attempt_id, samples=samples))
            await asyncio.sleep(0.1)
            assert (await gate.status()).attempts == left


async def test_what_is_acknowledged_is_let_go(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        handle = await service.submit(submit([STEADY], max_tokens=300))
        await service.until(lambda: handle in service.finished, "end")
        sample = gate.gate._table.samples[handle]
        assert (sample.base, len(sample.ids)) == (0, 300)
        await service.acknowledge({handle: 120, 4_000_000_000: 5})
        await _until(lambda: sample.base == 120)
        await service.acknowledge({handle: 100})
        await service.acknowledge({handle: 301})
        await asyncio.sleep(0.05)
        assert (sample.base, len(sample.ids), sample.total) == (120, 180, 300)


def parts_of(message: Submit, prompt: list[int]) -> list[SubmitPart]:
    """The message keeps the first piece, the parts are what is left."""
    step = PART_BYTES // 4
    message.prompt_ids = u32(prompt[:step])
    pieces = [prompt[start : start + step] for start in range(step, len(prompt), step)]
    return [SubmitPart(message.attempt_id, index, u32(piece)) for index, piece in enumerate(pieces, 1)]


async def test_long_prompts_come_in_parts_that_others_overtake(tmp_path: Path) -> None:
    prompts = [[STEADY, *range(start, start + 900)] * 50 for start in (1, 2)]
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        messages = [submit(prompt, max_tokens=10) for prompt in prompts]
        parts = [parts_of(message, prompt) for message, prompt in zip(messages, prompts, strict=True)]
        for message in messages:
            await service.say(submit=message)
        short = await service.submit(submit([STEADY], max_tokens=3))
        await service.until(lambda: short in service.finished, "the short one's end")
        assert len(service.accepted) == 1
        for pair in zip(*parts, strict=True):
            for part in pair:
                await service.say(submit_part=part)
        await service.until(lambda: len(service.finished) == 3, "ends")
        for message, prompt in zip(messages, prompts, strict=True):
            assert service.ids[service.accepted[message.attempt_id]] == tokens(prompt, 10)


@pytest.mark.parametrize(
    ("index", "ids", "field"),
    [
        (2, [1], "index"),
        (1, [], "prompt_ids"),
        (1, [1] * 5, "prompt_ids"),
        (1, [1000], "prompt_ids"),
        (1, [1] * (PART_BYTES // 4 + 1), "prompt_ids"),
    ],
)
async def test_a_wrong_part_rejects_its_attempt(tmp_path: Path, index: int, ids: list[int], field: str) -> None:
    message = submit([HOLD, 1])
    message.prompt_tokens = 6
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        await service.say(submit=message)
        await service.say(submit_part=SubmitPart(message.attempt_id, index, u32(ids)))
        await service.until(lambda: message.attempt_id in service.rejected, "rejection")
        failure = service.rejected[message.attempt_id]
        assert (failure.code, failure.reason) == (3, ErrorReason.INVALID_REQUEST)
        assert [violation.field for violation in failure.violations] == [field]
        await service.say(submit_part=SubmitPart(message.attempt_id, 1, u32([1])))
        await no_place_is_held(gate)


async def test_a_prompt_that_does_not_come_gives_its_place_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.scheduler.gate.intake.PARTS_SECONDS", 0.1)
    message = submit([HOLD, 1])
    message.prompt_tokens = 6
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        failure = await service.refused(message)
        assert failure.reason == ErrorReason.INVALID_REQUEST
        await no_place_is_held(gate)


async def no_place_is_held(gate: Running) -> None:
    seen = await gate.status()
    assert (seen.attempts, seen.steps) == (0, 0)
    assert gate.gate._admission.inside == 0


async def _until(condition: "object") -> None:
    assert callable(condition)
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)
