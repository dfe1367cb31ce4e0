"""What a Submit may ask for. Everything is checked again: a service is trusted for who its caller is, for no limit."""

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Self

from penstock.executor.step import MAX_STOP_IDS, ModelInfo, Sampling, unpack_u32
from penstock.rpc.errors import invalid, not_found, unsupported_fields
from penstock.scheduler.records import commands
from penstock.v1 import ErrorReason, Submit, SubmitSampling

ATTEMPT_ID_BYTES: Final = 16
PART_BYTES: Final = 64 << 10
"""Most of a prompt in one message; more comes in parts, so that the cancels of others overtake."""
MAX_SAMPLES: Final = 1
MAX_LABEL_CHARACTERS: Final = 256
MAX_SCOPE_BYTES: Final = 64
COMMAND_OVERHEAD_BYTES: Final = 16 << 10
"""Most that a command holds beside its ids."""

Violations = list[tuple[str, str]]

UNSET: Final[Mapping[str, object]] = MappingProxyType(
    {
        "time_limit_ms": None,
        "ttft_target_ms": None,
        "tpot_target_ms": None,
        "logprobs": None,
        "prompt_logprobs": None,
    }
)
"""Fields of Submit that are not built, and the value that asks for nothing."""

UNSET_SAMPLING: Final[Mapping[str, object]] = MappingProxyType(
    {
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "bias_ids": b"",
        "bias_values": b"",
        "allowed_ids": b"",
        "bad_word_ids": [],
        "constraint": None,
    }
)
"""The same of SubmitSampling."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the engine's model can do for one attempt."""

    vocab_size: int
    eos_ids: tuple[int, ...]
    max_model_tokens: int

    @classmethod
    def of(cls, info: ModelInfo, max_command_bytes: int) -> Self:
        """Those of a model whose attempts must fit into one command."""
        fitting = (max_command_bytes - COMMAND_OVERHEAD_BYTES) // 4
        return cls(info.vocab_size, info.eos_ids, min(info.max_model_tokens, fitting))


@dataclass(frozen=True, slots=True)
class CheckedSubmit:
    """A Submit that may be made once its whole prompt is there."""

    request_id: str
    prompt_tokens: int
    prompt_ids: bytes
    """The beginning, or all."""
    samples: tuple[tuple[int, int, bytes], ...]
    """(index, seed, delivered ids as u32) of each."""
    sampling: Sampling
    max_tokens: int
    min_tokens: int
    stop_ids: bytes
    ignore_eos: bool
    tenant: str
    priority_class: int
    cache_scope: bytes
    traceparent: str

    def to_command(
        self, prompt_ids: bytes, first_handle: int, *, arrival_ns: int, deadline_ns: int, traced: bool
    ) -> commands.Submit:
        """The engine's form of it; samples have consecutive handles."""
        return commands.Submit(
            samples=tuple(
                commands.SubmitSample(handle, index, seed, delivered)
                for handle, (index, seed, delivered) in enumerate(self.samples, first_handle)
            ),
            prompt_ids=prompt_ids,
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            arrival_ns=arrival_ns,
            min_tokens=self.min_tokens,
            stop_ids=self.stop_ids,
            ignore_eos=self.ignore_eos,
            tenant=self.tenant,
            priority_class=self.priority_class,
            cache_scope=self.cache_scope,
            deadline_ns=deadline_ns,
            traced=traced,
        )


def check_submit(submit: Submit, limits: ModelLimits) -> CheckedSubmit:
    """Raise UNIMPLEMENTED, NOT_FOUND or INVALID_ARGUMENT, each naming every field that it is about."""
    refuse_unbuilt(submit)
    violations: Violations = []
    sampling = submit.sampling
    if sampling is None:
        violations.append(("sampling", "is missing"))
        sampling = SubmitSampling()
    _check_labels(submit, violations)
    _check_prompt(submit, limits, violations)
    _check_sampling(sampling, submit.prompt_tokens, limits, violations)
    _check_samples(submit, sampling.max_tokens, limits, violations)
    if violations:
        raise invalid(violations)
    return _checked(submit, sampling, limits)


def refuse_unbuilt(submit: Submit) -> None:
    """Raise UNIMPLEMENTED with every field that asks for what is not built, NOT_FOUND for an adapter."""
    refused = [name for name, unset in UNSET.items() if getattr(submit, name) != unset]
    if submit.sampling is not None:
        sampling = submit.sampling
        refused += [f"sampling.{name}" for name, unset in UNSET_SAMPLING.items() if getattr(sampling, name) != unset]
    if refused:
        raise unsupported_fields(refused)
    if submit.adapter:
        raise not_found(ErrorReason.ADAPTER_NOT_FOUND, "no such adapter")


def check_ids(name: str, data: bytes, vocab_size: int, violations: Violations) -> "array[int]":
    """The ids of a column of u32; what is wrong with them is added to the violations."""
    try:
        ids = unpack_u32(data)
    except ValueError:
        violations.append((name, f"{len(data)} bytes are no column of u32"))
        return array("I")
    if ids and max(ids) >= vocab_size:
        violations.append((name, f"holds an id that is not below {vocab_size}"))
    return ids


def check_piece(data: bytes, limits: ModelLimits, violations: Violations) -> int:
    """Check one piece of a prompt; how many ids it has."""
    if len(data) > PART_BYTES:
        violations.append(("prompt_ids", f"more than {PART_BYTES} bytes come in parts"))
        return 0
    return len(check_ids("prompt_ids", data, limits.vocab_size, violations))


def _check_labels(submit: Submit, violations: Violations) -> None:
    if len(submit.attempt_id) != ATTEMPT_ID_BYTES:
        violations.append(("attempt_id", f"must have {ATTEMPT_ID_BYTES} bytes"))
    for name, text in (("request_id", submit.request_id), ("tenant", submit.tenant)):
        if len(text) > MAX_LABEL_CHARACTERS:
            violations.append((name, f"has more than {MAX_LABEL_CHARACTERS} characters"))
    if len(submit.cache_scope) > MAX_SCOPE_BYTES:
        violations.append(("cache_scope", f"has more than {MAX_SCOPE_BYTES} bytes"))


def _check_prompt(submit: Submit, limits: ModelLimits, violations: Violations) -> None:
    if submit.prompt_tokens < 1:
        violations.append(("prompt_tokens", "must be at least 1"))
    elif submit.prompt_tokens >= limits.max_model_tokens:
        violations.append(("prompt_tokens", f"must leave room for output: less than {limits.max_model_tokens}"))
    if check_piece(submit.prompt_ids, limits, violations) > submit.prompt_tokens:
        violations.append(("prompt_ids", "holds more than prompt_tokens"))


def _check_sampling(sampling: SubmitSampling, prompt_tokens: int, limits: ModelLimits, violations: Violations) -> None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        violations.append(("sampling.temperature", "must be a finite number, at least 0"))
    if not 0 < sampling.top_p <= 1:
        violations.append(("sampling.top_p", "must be above 0 and at most 1"))
    if sampling.max_tokens < 1:
        violations.append(("sampling.max_tokens", "must be at least 1"))
    elif prompt_tokens + sampling.max_tokens > limits.max_model_tokens:
        violations.append(("sampling.max_tokens", f"with the prompt exceeds {limits.max_model_tokens} tokens"))
    if sampling.min_tokens > sampling.max_tokens:
        violations.append(("sampling.min_tokens", "must not exceed max_tokens"))
    stops = set(check_ids("sampling.stop_ids", sampling.stop_ids, limits.vocab_size, violations))
    if not sampling.ignore_eos:
        stops.update(limits.eos_ids)
    if len(stops) > MAX_STOP_IDS or len(sampling.stop_ids) > 4 * MAX_STOP_IDS:
        violations.append(("sampling.stop_ids", f"more than {MAX_STOP_IDS}, the model's own included"))


def _check_samples(submit: Submit, max_tokens: int, limits: ModelLimits, violations: Violations) -> None:
    samples = submit.samples
    if not 1 <= len(samples) <= MAX_SAMPLES:
        violations.append(("samples", f"must be 1 to {MAX_SAMPLES}"))
        return
    if len({sample.index for sample in samples}) != len(samples):
        violations.append(("samples", "have the same index"))
    for number, sample in enumerate(samples):
        name = f"samples[{number}].delivered_ids"
        if len(check_ids(name, sample.delivered_ids, limits.vocab_size, violations)) >= max(max_tokens, 1):
            violations.append((name, "leave nothing to make: as many as max_tokens"))


def _checked(submit: Submit, sampling: SubmitSampling, limits: ModelLimits) -> CheckedSubmit:
    return CheckedSubmit(
        request_id=submit.request_id,
        prompt_tokens=submit.prompt_tokens,
        prompt_ids=submit.prompt_ids,
        samples=tuple((sample.index, sample.seed, sample.delivered_ids) for sample in submit.samples),
        sampling=Sampling(sampling.temperature, sampling.top_p, min(sampling.top_k, limits.vocab_size)),
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_ids=sampling.stop_ids,
        ignore_eos=sampling.ignore_eos,
        tenant=submit.tenant,
        priority_class=submit.priority_class,
        cache_scope=submit.cache_scope,
        traceparent=submit.traceparent,
    )
