"""The gate trusts a service for who its caller is, for no limit."""

import math
from pathlib import Path
from typing import Any

import grpc
import pytest

from gate.fake_engine import HOLD
from gate.link import Service, running_gate, submit, u32
from penstock.executor.step import MAX_STOP_IDS
from penstock.rpc.codec import descriptor_of
from penstock.rpc.errors import RpcError
from penstock.scheduler.gate.checks import UNSET, UNSET_SAMPLING, ModelLimits, check_submit
from penstock.v1 import ErrorReason, Submit, SubmitConstraint, SubmitSample, SubmitSampling

LIMITS = ModelLimits(vocab_size=100, eos_ids=(2,), max_model_tokens=64)
CODE = grpc.StatusCode

BAD: dict[str, tuple[dict[str, Any], set[str]]] = {
    "attempt id": ({"attempt_id": b"short"}, {"attempt_id"}),
    "no prompt": ({"prompt_ids": b"", "prompt_tokens": 0}, {"prompt_tokens"}),
    "prompt too long": ({"prompt_tokens": 64}, {"prompt_tokens", "sampling.max_tokens"}),
    "more than announced": ({"prompt_tokens": 1, "prompt_ids": u32([1, 2])}, {"prompt_ids"}),
    "half an id": ({"prompt_ids": b"abc"}, {"prompt_ids"}),
    "id out of range": ({"prompt_ids": u32([100])}, {"prompt_ids"}),
    "too much at once": ({"prompt_ids": u32([1] * 16_385)}, {"prompt_ids"}),
    "no sampling": ({"sampling": None}, {"sampling", "sampling.top_p", "sampling.max_tokens"}),
    "temperature": ({"temperature": math.nan}, {"sampling.temperature"}),
    "negative temperature": ({"temperature": -1.0}, {"sampling.temperature"}),
    "infinite temperature": ({"temperature": math.inf}, {"sampling.temperature"}),
    "top_p 0": ({"top_p": 0.0}, {"sampling.top_p"}),
    "top_p above 1": ({"top_p": 1.5}, {"sampling.top_p"}),
    "top_p NaN": ({"top_p": math.nan}, {"sampling.top_p"}),
    "no tokens": ({"max_tokens": 0}, {"sampling.max_tokens"}),
    "too many tokens": ({"max_tokens": 63}, {"sampling.max_tokens"}),
    "min above max": ({"min_tokens": 6}, {"sampling.min_tokens"}),
    "stop id out of range": ({"stop_ids": u32([100])}, {"sampling.stop_ids"}),
    "half a stop id": ({"stop_ids": b"a"}, {"sampling.stop_ids"}),
    "too many stop ids": ({"stop_ids": u32(range(10, 10 + MAX_STOP_IDS))}, {"sampling.stop_ids"}),
    "the same stop id too often": ({"stop_ids": u32([3] * 65)}, {"sampling.stop_ids"}),
    "no samples": ({"samples": []}, {"samples"}),
    "too many samples": ({"samples": [SubmitSample(index=0), SubmitSample(index=1)]}, {"samples"}),
    "nothing left to make": ({"samples": [SubmitSample(delivered_ids=u32([1] * 5))]}, {"samples[0].delivered_ids"}),
    "delivered out of range": ({"samples": [SubmitSample(delivered_ids=u32([100]))]}, {"samples[0].delivered_ids"}),
    "half a delivered id": ({"samples": [SubmitSample(delivered_ids=b"abc")]}, {"samples[0].delivered_ids"}),
    "long labels": ({"request_id": "x" * 257, "tenant": "x" * 257}, {"request_id", "tenant"}),
    "long scope": ({"cache_scope": b"x" * 65}, {"cache_scope"}),
    "everything": (
        {"attempt_id": b"", "prompt_ids": b"a", "temperature": math.nan, "top_p": 2.0, "samples": []},
        {"attempt_id", "prompt_ids", "sampling.temperature", "sampling.top_p", "samples"},
    ),
}


def changed(fields: dict[str, Any]) -> Submit:
    """A right Submit with these fields, of itself or of its sampling, in place."""
    own = {name: value for name, value in fields.items() if name in Submit.__dataclass_fields__}
    message = submit([1, 2], sampling={name: value for name, value in fields.items() if name not in own})
    for name, value in own.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize("name", BAD)
def test_every_bad_field_is_named(name: str) -> None:
    fields, named = BAD[name]
    with pytest.raises(RpcError) as caught:
        check_submit(changed(fields), LIMITS)
    assert (caught.value.code, caught.value.reason) == (CODE.INVALID_ARGUMENT, ErrorReason.INVALID_REQUEST)
    assert {field for field, _ in caught.value.violations} == named


BUILT = {
    "attempt_id", "request_id", "tenant", "priority_class", "prompt_ids", "prompt_tokens", "samples", "sampling",
    "adapter", "cache_scope", "traceparent", "remaining_ms",
}  # fmt: skip
BUILT_SAMPLING = {"temperature", "top_p", "top_k", "max_tokens", "min_tokens", "stop_ids", "ignore_eos"}


def test_every_field_is_built_or_refused() -> None:
    for message, built, refused in ((Submit, BUILT, UNSET), (SubmitSampling, BUILT_SAMPLING, UNSET_SAMPLING)):
        fields = {field.name for field in descriptor_of(message).fields}
        assert fields == built | refused.keys()
        assert not built & refused.keys()


ASKED: dict[str, Any] = {
    "time_limit_ms": 0, "ttft_target_ms": 0, "tpot_target_ms": 5, "logprobs": 0, "prompt_logprobs": 1, "min_p": 0.1,
    "presence_penalty": 0.5, "frequency_penalty": math.nan, "repetition_penalty": 1.1, "bias_ids": b"\0\0\0\0",
    "bias_values": b"\0\0\0\0", "allowed_ids": b"\0\0\0\0", "bad_word_ids": [b"\0\0\0\0"],
    "constraint": SubmitConstraint(regex="a*"),
}  # fmt: skip


@pytest.mark.parametrize("field", [*UNSET, *UNSET_SAMPLING])
def test_what_is_not_built_is_refused_by_name(field: str) -> None:
    name = field if field in UNSET else f"sampling.{field}"
    with pytest.raises(RpcError) as caught:
        check_submit(changed({field: ASKED[field]}), LIMITS)
    assert (caught.value.code, caught.value.reason) == (CODE.UNIMPLEMENTED, ErrorReason.UNSUPPORTED_FIELD)
    assert [one for one, _ in caught.value.violations] == [name]


def test_an_adapter_is_not_found() -> None:
    with pytest.raises(RpcError) as caught:
        check_submit(changed({"adapter": "blake"}), LIMITS)
    assert (caught.value.code, caught.value.reason) == (CODE.NOT_FOUND, ErrorReason.ADAPTER_NOT_FOUND)


def test_what_is_right_is_passed_on() -> None:
    stops = u32(range(10, 9 + MAX_STOP_IDS))
    message = changed({"top_k": 5000, "min_tokens": 5, "stop_ids": stops, "tenant": "t", "cache_scope": b"s"})
    message.samples = [SubmitSample(index=3, seed=2**64 - 1, delivered_ids=u32([9]))]
    command = check_submit(message, LIMITS).to_command(message.prompt_ids, 17, arrival_ns=5, deadline_ns=6, traced=True)
    (sample,) = command.samples
    assert (sample.handle, sample.index, sample.seed, sample.delivered_ids) == (17, 3, 2**64 - 1, u32([9]))
    assert (command.sampling.top_k, command.max_tokens, command.min_tokens) == (100, 5, 5)
    assert (command.stop_ids, command.tenant, command.cache_scope) == (stops, "t", b"s")
    assert (command.arrival_ns, command.deadline_ns, command.traced) == (5, 6, True)


async def test_a_rejection_over_the_link(tmp_path: Path) -> None:
    async with running_gate(tmp_path) as gate, Service(gate.address) as service:
        await service.connect()
        failure = await service.refused(submit([HOLD, 1000], max_tokens=0))
        assert (failure.code, failure.reason) == (3, ErrorReason.INVALID_REQUEST)
        assert {one.field for one in failure.violations} == {"prompt_ids", "sampling.max_tokens"}
        failure = await service.refused(submit([HOLD], remaining_ms=0))
        assert (failure.code, failure.reason) == (4, ErrorReason.DEADLINE)
        failure = await service.refused(submit([HOLD], adapter="a"))
        assert (failure.code, failure.reason) == (5, ErrorReason.ADAPTER_NOT_FOUND)
        seen = await gate.status()
        assert (seen.attempts, seen.steps) == (0, 0), "no work"
        assert await service.submit(submit([HOLD], remaining_ms=2**64 - 1)), "a deadline beyond all bounds is none"
