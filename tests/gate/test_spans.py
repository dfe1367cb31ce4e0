"""What a traced attempt leaves in a real OTLP receiver."""

import asyncio
import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from gate.fake_engine import FAIL, STEADY
from gate.link import Service, running_gate, submit
from penstock.local.traces.receiver import TraceReceiver
from penstock.local.traces.spans import Span
from penstock.scheduler.gate import spans as spans_of_gate
from penstock.telemetry import tracing

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


async def spans_of(receiver: TraceReceiver, count: int) -> list[Span]:
    async with asyncio.timeout(8):
        while len(spans := list(receiver.store.get(TRACE) or ())) < count:
            await asyncio.sleep(0.05)
    return spans


async def test_the_tree_of_one_attempt(tmp_path: Path) -> None:
    async with TraceReceiver() as receiver:
        telemetry = tracing.configure("gate", endpoint=receiver.address)
        async with running_gate(tmp_path, telemetry) as gate, Service(gate.address) as service:
            engine_pid = gate.gate.engine.pid
            await service.connect()
            message = submit([STEADY, 1, 2], tenant="t", traceparent=f"00-{TRACE}-{PARENT}-01", request_id="label")
            handle = await service.submit(message)
            plain = await service.submit(submit([STEADY], traceparent=f"00-{TRACE}-{PARENT}-00"))
            bare = await service.submit(submit([STEADY], traceparent="garbage"))
            await service.until(lambda: {handle, plain, bare} <= service.finished.keys(), "ends")
            await asyncio.to_thread(telemetry.force_flush)
            spans = await spans_of(receiver, 6)
        await asyncio.to_thread(telemetry.shutdown)
    names = sorted(span.name for span in spans)
    assert names == ["decode", "engine.step", "prefill", "queue", "queue", "scheduler.request"], "of one attempt alone"
    by_name = {span.name: span for span in spans}
    request = by_name["scheduler.request"]
    assert (request.parent_id, request.service, request.pid) == (PARENT, "penstock-gate", os.getpid())
    about = request.attributes
    assert about["penstock.attempt"] == message.attempt_id.hex()
    assert about["penstock.request_id"] == "label"
    assert (about["penstock.tenant"], about["penstock.prompt_tokens"]) == ("t", 3)
    assert (about["penstock.preemptions"], about["penstock.output_tokens"]) == (1, 5)
    for span in spans:
        if span is not request:
            assert (span.parent_id, span.service, span.pid) == (request.span_id, "penstock-engine", engine_pid)
            assert request.start_ns <= span.start_ns <= span.end_ns <= request.end_ns
    decode, prefill, step = by_name["decode"], by_name["prefill"], by_name["engine.step"]
    assert [event.name for event in decode.events] == ["first_token", "preempted"]
    assert dict(decode.events[1].attributes) == {"by": "blocks", "mode": "recompute", "cost": 5}
    assert (prefill.attributes["penstock.tokens"], decode.attributes["penstock.tokens"]) == (3, 5)
    assert step.attributes["penstock.prefill_rows"] == 3
    times = {name: step.attributes[f"penstock.{name}_us"] for name in ("plan", "launch", "device")}
    assert times == {"plan": 1, "launch": 4, "device": 2}
    assert step.attributes["penstock.repeat"] == 2
    linked = {span.name: {span_id for _, span_id in span.links} for span in spans}
    assert linked["engine.step"] == {request.span_id}
    assert linked["prefill"] == linked["decode"] == {step.span_id}


async def test_a_failure_is_an_error(tmp_path: Path) -> None:
    async with TraceReceiver() as receiver:
        telemetry = tracing.configure("gate", endpoint=receiver.address)
        async with running_gate(tmp_path, telemetry) as gate, Service(gate.address) as service:
            await service.connect()
            handle = await service.submit(submit([FAIL], traceparent=f"00-{TRACE}-{PARENT}-01"))
            await service.until(lambda: handle in service.failed, "failure")
            await asyncio.to_thread(telemetry.force_flush)
            spans = await spans_of(receiver, 3)
        await asyncio.to_thread(telemetry.shutdown)
    (request,) = (span for span in spans if span.name == "scheduler.request")
    assert request.status == "error"


def test_one_moment_has_one_unix_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever records it is told in: the two clocks are never read at quite the same time."""
    unix = itertools.chain([10**18, 10**18 + 900], itertools.repeat(10**18 + 60 * 10**9))
    monkeypatch.setattr(spans_of_gate, "time", SimpleNamespace(time_ns=lambda: next(unix), monotonic_ns=lambda: 10**9))
    spans = spans_of_gate.Spans(tracing.configure("gate", endpoint=None), {})
    first, second, behind_the_clocks_change = (spans._unix_offset() for _ in range(3))
    assert first == second == 10**18 - 10**9
    assert behind_the_clocks_change == first + 60 * 10**9
