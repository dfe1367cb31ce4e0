"""One W3C trace from the client's span to the engine's steps, in a real OTLP receiver."""

import asyncio
import os
from pathlib import Path

import pytest

from penstock.client import AsyncClient
from penstock.local.traces.receiver import TraceReceiver
from penstock.local.traces.spans import Span, build_tree
from penstock.telemetry import tracing
from support.clients import until
from support.stack import stack
from support.tiny_llama import build_tiny_llama

SECRET = "the quick brown fox"
EXPECTED_PARENTS = {
    "penstock.client/Stream": None,
    "penstock.v1.GenerationService/Stream": "penstock.client/Stream",
    "tokenize": "penstock.v1.GenerationService/Stream",
    "route": "penstock.v1.GenerationService/Stream",
    "scheduler.request": "penstock.v1.GenerationService/Stream",
    "queue": "scheduler.request",
    "prefill": "scheduler.request",
    "decode": "scheduler.request",
}
SERVICES = {
    "penstock.client/Stream": "penstock-client",
    "penstock.v1.GenerationService/Stream": "penstock-service",
    "tokenize": "penstock-service",
    "route": "penstock-service",
    "scheduler.request": "penstock-gate",
    "queue": "penstock-engine",
    "prefill": "penstock-engine",
    "decode": "penstock-engine",
    "engine.step": "penstock-engine",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", tokenizer=True)


async def test_the_whole_tree(model: Path) -> None:
    async with TraceReceiver() as receiver:
        telemetry = tracing.configure("client", endpoint=receiver.address)
        settings = {"executor": "simulated", "step_us": 1000, "max_step_tokens": 16, "max_sequences": 4}
        with stack(model, otlp_endpoint=receiver.address, **settings) as roles:
            async with AsyncClient(roles.address, tracer=telemetry.tracer("penstock.client")) as client:
                stream = client.stream(SECRET * 2, max_tokens=40, ignore_eos=True, request_id="traced-1")
                async for _ in stream:
                    pass
                trace_id = stream.completion.trace_id
            await asyncio.to_thread(telemetry.force_flush)

            async def complete() -> bool:
                names = {span.name for span in receiver.store.get(trace_id) or ()}
                return names >= SERVICES.keys()

            await until(complete, what="all spans")
            spans = list(receiver.store.get(trace_id) or ())
            pids = {"penstock-service": roles.service.pid, "penstock-gate": roles.scheduler.pid,
                    "penstock-engine": roles.engine.pid, "penstock-client": os.getpid()}  # fmt: skip
        await asyncio.to_thread(telemetry.shutdown)
    check_tree(spans, pids)
    check_facts(spans)
    assert SECRET not in repr(spans), "prompt text is in the trace"


def check_tree(spans: list[Span], pids: dict[str, int]) -> None:
    tree = build_tree(spans)
    assert not tree.orphans
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        assert span.service == SERVICES[span.name]
        assert span.pid == pids[span.service]
        parent = by_id[span.parent_id] if span.parent_id else None
        if span.name in EXPECTED_PARENTS:
            assert (parent.name if parent else None) == EXPECTED_PARENTS[span.name]
        assert span.start_ns <= span.end_ns
        if parent is not None:
            slack = 0 if span.service == "penstock-engine" else 2_000_000  # the gate makes both by one clock
            assert span.start_ns >= parent.start_ns - slack, "before its parent, beyond the clocks' difference"
    assert len({span.pid for span in spans}) >= 4


def check_facts(spans: list[Span]) -> None:
    (server,) = (span for span in spans if span.name == "penstock.v1.GenerationService/Stream")
    assert server.attributes["gen_ai.request.model"] == "tiny"
    assert server.attributes["gen_ai.usage.input_tokens"] == 38
    assert server.attributes["gen_ai.usage.output_tokens"] == 40
    prefills = [span for span in spans if span.name == "prefill"]
    assert len(prefills) == 3, "38 tokens in chunks of 16"
    events = {event.name for span in spans for event in span.events}
    assert "first_token" in events
    steps = [span for span in spans if span.name == "engine.step"]
    (request_span,) = (span for span in spans if span.name == "scheduler.request")
    assert steps
    assert all(span.trace_id == request_span.trace_id for span in steps)
