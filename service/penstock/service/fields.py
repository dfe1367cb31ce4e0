"""Which fields of the public requests are built. What is not built is refused by name, never ignored."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import Any, Final

import betterproto2

from penstock.rpc.codec import descriptor_of
from penstock.v1 import (
    Chat,
    ChatMessage,
    ContentPart,
    DetokenizeRequest,
    GenerateRequest,
    Sampling,
    StreamRequest,
    TokenIds,
    TokenizeRequest,
)


class Support(Enum):
    """Whether a field does what it says."""

    BUILT = "built"
    REFUSED = "refused"


B, R = Support.BUILT, Support.REFUSED

FIELDS: Final[Mapping[type[betterproto2.Message], Mapping[str, Support]]] = MappingProxyType(
    {
        StreamRequest: {"request": B},
        GenerateRequest: {
            "text": B,
            "chat": B,
            "token_ids": B,
            "model": B,
            "adapter": B,
            "request_id": B,
            "priority": R,
            "cache_scope": R,
            "time_limit": R,
            "ttft_target": R,
            "tpot_target": R,
            "sampling": B,
            "json_schema": R,
            "regex": R,
            "grammar": R,
            "choice": R,
            "logprobs": R,
            "prompt_logprobs": R,
            "echo": R,
            "stream_options": R,
        },
        Sampling: {
            "temperature": B,
            "top_p": B,
            "top_k": B,
            "min_p": R,
            "presence_penalty": R,
            "frequency_penalty": R,
            "repetition_penalty": R,
            "seed": B,
            "logit_bias": R,
            "n": R,
            "max_tokens": B,
            "min_tokens": B,
            "stop": B,
            "stop_token_ids": B,
            "ignore_eos": B,
            "allowed_token_ids": R,
            "bad_words": R,
        },
        TokenIds: {"ids": B},
        Chat: {"messages": B, "tools": R, "template_kwargs": R},
        ChatMessage: {"role": B, "content": B, "name": R, "tool_calls": R, "tool_call_id": R},
        ContentPart: {"text": B},
        TokenizeRequest: {"model": B, "text": B, "chat": B, "add_special_tokens": B},
        DetokenizeRequest: {"model": B, "token_ids": B, "skip_special_tokens": B},
    }
)
"""Every message that a public request reaches through built fields. A refused field stands for all below it."""


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    support: Support
    repeated: bool
    explicit: bool
    """Whether the message knows if it was set."""
    is_message: bool
    is_enum: bool


@dataclass(frozen=True, slots=True)
class FieldFaults:
    """Paths, such as `chat.messages[2].name`, of the fields that are set and cannot be served."""

    refused: tuple[str, ...]
    unknown_enums: tuple[str, ...]


def find_faults(message: betterproto2.Message) -> FieldFaults:
    """Look at every field of a public request that is set, however deep."""
    refused: list[str] = []
    unknown: list[str] = []
    for path, field, value in _walk(message, ""):
        if field.support is Support.REFUSED:
            refused.append(path)
        elif isinstance(value, betterproto2.Enum) and not value.name:
            unknown.append(path)
    return FieldFaults(tuple(refused), tuple(unknown))


def _walk(message: betterproto2.Message, prefix: str) -> Iterator[tuple[str, _Field, object]]:
    """The refused fields that are set, and every enum value, with their paths."""
    for field in _fields(type(message)):
        value = getattr(message, field.name)
        if not _is_set(field, value):
            continue
        path = prefix + field.name
        if field.support is Support.REFUSED:
            yield path, field, value
        elif field.is_message:
            for name, item in _items(path, field, value):
                yield from _walk(item, name + ".")
        elif field.is_enum:
            for name, item in _items(path, field, value):
                yield name, field, item


def _items(path: str, field: _Field, value: Any) -> Iterator[tuple[str, Any]]:
    if not field.repeated:
        yield path, value
        return
    for index, item in enumerate(value):
        yield f"{path}[{index}]", item


def _is_set(field: _Field, value: object) -> bool:
    return value is not None if field.explicit else bool(value)


@cache
def _fields(kind: type[betterproto2.Message]) -> tuple[_Field, ...]:
    table = FIELDS[kind]
    return tuple(
        _Field(
            name=field.name,
            support=table[field.name],
            repeated=field.is_repeated,
            explicit=field.has_presence,
            is_message=field.message_type is not None,
            is_enum=field.enum_type is not None,
        )
        for field in descriptor_of(kind).fields
    )
