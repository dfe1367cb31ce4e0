"""`GenerateRequest` to a typed request. Every bad field is found, not only the first."""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from penstock.service.catalogue import ModelFacts
from penstock.service.columns import pack_u32
from penstock.service.violations import Violations
from penstock.v1 import Chat, ChatMessage, GenerateRequest, Sampling, SubmitSampling, TokenIds

MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_REQUEST_ID_CHARS: Final = 128
MAX_TEMPERATURE: Final = 100.0
LISTED_IDS: Final = 8
"""Of a list of ids, so many bad ones are named."""

InputField = Literal["text", "chat", "token_ids"]
Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be continued. `content` fits `field`: a text, a conversation, or ids as `array('I')`."""

    field: InputField
    content: "str | tuple[Message, ...] | array[int]"


@dataclass(frozen=True, slots=True)
class SamplingChoice:
    """`Sampling` with defaults applied, the stop texts apart."""

    temperature: float
    top_p: float
    top_k: int
    """0: all."""
    seed: int | None
    max_tokens: int | None
    """None: as many as fit."""
    min_tokens: int
    stop_ids: tuple[int, ...]
    ignore_eos: bool

    def to_submit(self, max_tokens: int) -> SubmitSampling:
        """The link's form of it."""
        return SubmitSampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=1.0,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop_ids=pack_u32(self.stop_ids),
            ignore_eos=self.ignore_eos,
        )


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """All that can be said of a request before its prompt is encoded."""

    prompt: Prompt | None
    """None: bad."""
    request_id: str
    sampling: SamplingChoice
    stops: tuple[str, ...]


def check(request: GenerateRequest, model: ModelFacts, violations: Violations) -> CheckedRequest:
    """Read a request whose unbuilt fields are unset. It may be used only if `violations` stays empty."""
    if len(request.request_id) > MAX_REQUEST_ID_CHARS:
        violations.add("request_id", f"has more than {MAX_REQUEST_ID_CHARS} characters")
    sampling = request.sampling if request.sampling is not None else Sampling()
    _check_stops(sampling.stop, violations)
    return CheckedRequest(
        prompt=read_input(request.text, request.chat, request.token_ids, model, violations),
        request_id=request.request_id,
        sampling=_read_sampling(sampling, model, violations),
        stops=tuple(sampling.stop),
    )


def resolve_max_tokens(
    request: CheckedRequest, field: InputField, prompt_tokens: int, model: ModelFacts, violations: Violations
) -> int:
    """How many tokens may be generated behind a prompt of this length, which `field` gave."""
    room = model.max_model_tokens - prompt_tokens
    asked = request.sampling.max_tokens
    if prompt_tokens == 0:
        if not violations.names(field):
            violations.add(field, "has no tokens")
    elif room < 1:
        violations.add(field, f"has {prompt_tokens} tokens; prompt and output have {model.max_model_tokens}")
    elif asked is not None and asked > room:
        violations.add(
            "sampling.max_tokens",
            f"{asked} and the prompt's {prompt_tokens} tokens are more than {model.max_model_tokens}",
        )
    elif asked is None and request.sampling.min_tokens > room:
        violations.add("sampling.min_tokens", f"only {room} tokens fit behind the prompt")
    return room if asked is None else asked


def read_input(
    text: str | None,
    chat: Chat | None,
    token_ids: TokenIds | None,
    model: ModelFacts,
    violations: Violations,
) -> Prompt | None:
    """The one input that is set and good."""
    inputs: dict[InputField, object] = {"text": text, "chat": chat, "token_ids": token_ids}
    given = [field for field, value in inputs.items() if value is not None]
    if not given:
        violations.add("input", "one of text, chat, token_ids is needed")
    for field in given[1:]:
        violations.add(field, f"{given[0]} is set too")
    prompts = [
        None if text is None else _read_text(text, violations),
        None if chat is None else _read_chat(chat, violations),
        None if token_ids is None else _read_ids(token_ids.ids, model, violations),
    ]
    return next((prompt for prompt in prompts if prompt is not None), None)


def check_ids(ids: Sequence[int], field: str, vocab_size: int, violations: Violations) -> None:
    """Name the ids that the model does not have."""
    if not ids or max(ids) < vocab_size:
        return
    bad = [index for index, token in enumerate(ids) if token >= vocab_size]
    for index in bad[:LISTED_IDS]:
        violations.add(f"{field}[{index}]", f"{ids[index]} is not below the vocabulary's size {vocab_size}")
    if len(bad) > LISTED_IDS:
        violations.add(field, f"{len(bad) - LISTED_IDS} more ids are not below {vocab_size}")


def _read_text(text: str, violations: Violations) -> Prompt | None:
    if not text:
        violations.add("text", "is empty")
        return None
    return Prompt("text", text)


def _read_ids(ids: Sequence[int], model: ModelFacts, violations: Violations) -> Prompt | None:
    if not ids:
        violations.add("token_ids.ids", "is empty")
        return None
    if len(ids) > model.max_model_tokens:  # not looked at one by one: a request can bring millions
        violations.add("token_ids", f"has {len(ids)} tokens; prompt and output have {model.max_model_tokens}")
        return None
    check_ids(ids, "token_ids.ids", model.vocab_size, violations)
    return Prompt("token_ids", array("I", ids))


def _read_chat(chat: Chat, violations: Violations) -> Prompt | None:
    if not chat.messages:
        violations.add("chat.messages", "is empty")
        return None
    messages = tuple(
        _read_message(message, f"chat.messages[{index}]", violations) for index, message in enumerate(chat.messages)
    )
    good = all(message is not None for message in messages)
    return Prompt("chat", tuple(message for message in messages if message is not None)) if good else None


def _read_message(message: ChatMessage, path: str, violations: Violations) -> Message | None:
    bad = False
    if not message.role:
        violations.add(f"{path}.role", "is empty")
        bad = True
    if not message.content:
        violations.add(f"{path}.content", "is empty")
        bad = True
    for index, part in enumerate(message.content):
        if part.text is None:
            violations.add(f"{path}.content[{index}]", "has no text")
            bad = True
    if bad:
        return None
    return {"role": message.role, "content": "".join(part.text or "" for part in message.content)}


def _check_stops(stops: Sequence[str], violations: Violations) -> None:
    if len(stops) > MAX_STOPS:
        violations.add("sampling.stop", f"has {len(stops)} texts, at most {MAX_STOPS} are allowed")
    for index, stop in enumerate(stops[:MAX_STOPS]):
        if not stop:
            violations.add(f"sampling.stop[{index}]", "is empty")
        elif len(stop) > MAX_STOP_CHARS:
            violations.add(f"sampling.stop[{index}]", f"has more than {MAX_STOP_CHARS} characters")


def _read_sampling(sampling: Sampling, model: ModelFacts, violations: Violations) -> SamplingChoice:
    top_k = _at_least_one(sampling.top_k, "sampling.top_k", violations)
    max_tokens = _at_least_one(sampling.max_tokens, "sampling.max_tokens", violations)
    min_tokens = sampling.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens > 0:
        violations.add("sampling.min_tokens", f"{min_tokens} is more than max_tokens, {max_tokens}")
    check_ids(sampling.stop_token_ids, "sampling.stop_token_ids", model.vocab_size, violations)
    return SamplingChoice(
        temperature=_temperature(sampling.temperature, violations),
        top_p=_top_p(sampling.top_p, violations),
        top_k=top_k or 0,
        seed=sampling.seed,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_ids=_stop_ids(sampling.stop_token_ids, model, violations),
        ignore_eos=sampling.ignore_eos,
    )


def _at_least_one(value: int | None, field: str, violations: Violations) -> int | None:
    if value == 0:
        violations.add(field, "must be at least 1")
    return value


def _temperature(value: float | None, violations: Violations) -> float:
    if value is None:
        return 1.0
    if math.isnan(value) or not 0.0 <= value <= MAX_TEMPERATURE:
        violations.add("sampling.temperature", f"{value:g} is not in [0, {MAX_TEMPERATURE:g}]")
    return value


def _top_p(value: float | None, violations: Violations) -> float:
    if value is None:
        return 1.0
    if math.isnan(value) or not 0.0 < value <= 1.0:
        violations.add("sampling.top_p", f"{value:g} is not in (0, 1]")
    return value


def _stop_ids(ids: Sequence[int], model: ModelFacts, violations: Violations) -> tuple[int, ...]:
    """Without repetition; counted together with the model's own, as the scheduler does."""
    count = len({*ids, *model.eos_ids})
    if count > model.max_stop_ids:
        violations.add(
            "sampling.stop_token_ids",
            f"with the model's own there are {count}, at most {model.max_stop_ids} are allowed",
        )
    return tuple(dict.fromkeys(ids))
