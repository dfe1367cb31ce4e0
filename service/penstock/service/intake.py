"""From a request to a running attempt: check, encode, route, submit."""

import asyncio
import secrets
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import betterproto2

from penstock.rpc.errors import deadline_exceeded, unsupported_fields
from penstock.service import errors
from penstock.service.attempts import Attempt
from penstock.service.calls import Call
from penstock.service.catalogue import ModelFacts
from penstock.service.columns import pack_u32
from penstock.service.delivery import Delivery
from penstock.service.fields import find_faults
from penstock.service.fleet import Fleet
from penstock.service.link import Link
from penstock.service.text.encode import Tokenizer
from penstock.service.text.errors import Busy, PromptTooLong, TemplateError
from penstock.service.text.pool import EncodePool
from penstock.service.text.stop import StopStrings
from penstock.service.text.stream import OutputText
from penstock.service.validation import CheckedRequest, Message, Prompt, check, resolve_max_tokens
from penstock.service.violations import Violations
from penstock.v1 import CancelReason, GenerateRequest, SampleFinished, Submit, SubmitSample

END_SECONDS: Final = 0.25
"""For the figures of an attempt that a stop text has ended: about ten flushes of the link."""


@dataclass(slots=True)
class Running:
    """An attempt that a scheduler works on, and what its summary needs. Whoever starts one closes it."""

    model: ModelFacts
    link: Link
    attempt: Attempt
    delivery: Delivery
    request_id: str
    prompt_tokens: int
    seed: int
    priority: int
    expiry: asyncio.TimerHandle | None = field(repr=False)

    async def end(self) -> SampleFinished:
        """How the scheduler ended it, after all was delivered; a stop text ends it there now.

        Without figures if the scheduler does not say in time.
        """
        self.link.cancel(self.attempt, CancelReason.STOP_SEQUENCE)
        return await self.attempt.ended(END_SECONDS) or SampleFinished()

    def close(self, reason: CancelReason) -> None:
        """Nobody waits for it any more: what has not ended is cancelled. Idempotent."""
        if self.expiry is not None:
            self.expiry.cancel()
        self.link.release(self.attempt, reason)


class Intake:
    """Shared by all calls."""

    __slots__ = ("_fleet", "_pool")

    def __init__(self, fleet: Fleet, pool: EncodePool) -> None:
        self._fleet = fleet
        self._pool = pool

    async def start(self, request: GenerateRequest, call: Call) -> Running:
        """Submit an attempt for `request`.

        Raises UNIMPLEMENTED, NOT_FOUND, INVALID_ARGUMENT (with every bad field), DEADLINE_EXCEEDED,
        RESOURCE_EXHAUSTED and UNAVAILABLE.
        """
        refuse_unbuilt(request)
        model = self._fleet.catalogue.resolve(request.model)
        call.note("model", model.name, attribute="gen_ai.request.model")
        if request.adapter and request.adapter not in model.adapters:
            raise errors.adapter_not_found()
        violations = Violations()
        checked = check(request, model, violations)
        tokenizer = self._fleet.catalogue.tokenizer(model)
        ids, max_tokens = array("I"), 0
        if checked.prompt is not None:
            ids = await encode(self._pool, checked.prompt, tokenizer, model, call, violations)
            max_tokens = resolve_max_tokens(checked, checked.prompt.field, len(ids), model, violations)
        if violations:
            raise errors.invalid(violations)
        return await self._submit(checked, ids, max_tokens, model, tokenizer, call)

    async def _submit(
        self,
        checked: CheckedRequest,
        ids: "array[int]",
        max_tokens: int,
        model: ModelFacts,
        tokenizer: Tokenizer,
        call: Call,
    ) -> Running:
        seed = secrets.randbits(64) if checked.sampling.seed is None else checked.sampling.seed
        priority = min(0, call.identity.priority_ceiling)
        request_id = checked.request_id or f"req-{secrets.token_hex(12)}"
        call.note("request_id", request_id)
        attempt = Attempt(
            Submit(
                attempt_id=secrets.token_bytes(16),
                request_id=request_id,
                tenant=call.identity.tenant,
                priority_class=priority,
                prompt_ids=pack_u32(ids),
                prompt_tokens=len(ids),
                samples=[SubmitSample(seed=seed)],
                sampling=checked.sampling.to_submit(max_tokens),
                traceparent=call.traceparent,
            ),
            call.deadline_at,
        )
        call.check_deadline()
        with call.child("route") as span:
            link = await self._fleet.choose(model, len(ids))
            span.set_attribute("penstock.replica", link.replica)
        call.note("replica", link.replica)
        delivery = _delivery(attempt, checked, ids, tokenizer, model)
        link.submit(attempt)  # from here on the caller owes it a close
        return Running(
            model=model,
            link=link,
            attempt=attempt,
            delivery=delivery,
            request_id=request_id,
            prompt_tokens=len(ids),
            seed=seed,
            priority=priority,
            expiry=_expire(attempt, call),
        )


def refuse_unbuilt(message: betterproto2.Message) -> None:
    """Raise UNIMPLEMENTED for fields that are not built, then INVALID_ARGUMENT for unknown enum values."""
    faults = find_faults(message)
    if faults.refused:
        raise unsupported_fields(faults.refused)
    violations = Violations()
    for path in faults.unknown_enums:
        violations.add(path, "is no known value")
    if violations:
        raise errors.invalid(violations)


async def encode(
    pool: EncodePool,
    prompt: Prompt,
    tokenizer: Tokenizer,
    model: ModelFacts,
    call: Call,
    violations: Violations,
    *,
    add_special_tokens: bool = True,
) -> "array[int]":
    """The ids of `prompt`; none, with a violation, if it is bad. Raises DEADLINE_EXCEEDED and RESOURCE_EXHAUSTED."""
    if isinstance(prompt.content, array):
        return prompt.content
    ids = array("I")
    with call.child("tokenize") as span, _encoding_errors(prompt, violations):
        ids = await _encode(pool, prompt.content, tokenizer, model, call, add_special_tokens)
        span.set_attribute("gen_ai.usage.input_tokens", len(ids))
    return ids


async def _encode(
    pool: EncodePool,
    content: str | tuple[Message, ...],
    tokenizer: Tokenizer,
    model: ModelFacts,
    call: Call,
    add_special_tokens: bool,
) -> "array[int]":
    most, deadline = model.max_model_tokens, call.deadline_at
    if not isinstance(content, str):
        return await pool.encode_chat(tokenizer, content, max_tokens=most, deadline=deadline)
    return await pool.encode(
        tokenizer, content, max_tokens=most, add_special_tokens=add_special_tokens, deadline=deadline
    )


@contextmanager
def _encoding_errors(prompt: Prompt, violations: Violations) -> Iterator[None]:
    try:
        yield
    except (PromptTooLong, TemplateError) as error:
        violations.add(prompt.field, str(error))
    except Busy:
        raise errors.service_busy() from None
    except TimeoutError:
        raise deadline_exceeded() from None


def _delivery(
    attempt: Attempt,
    checked: CheckedRequest,
    ids: "array[int]",
    tokenizer: Tokenizer,
    model: ModelFacts,
) -> Delivery:
    stops = StopStrings(checked.stops) if checked.stops else None
    output = OutputText(tokenizer.detokenizer(ids), stops)
    own = () if checked.sampling.ignore_eos else model.eos_ids
    return Delivery(attempt, output, frozenset((*checked.sampling.stop_ids, *own)))


def _expire(attempt: Attempt, call: Call) -> asyncio.TimerHandle | None:
    if call.deadline is None:
        return None
    return asyncio.get_running_loop().call_at(call.deadline.at, attempt.fail, deadline_exceeded())
