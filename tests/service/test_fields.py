"""The table of public fields, against the descriptor and against the running service."""

import asyncio
from datetime import timedelta
from typing import Any

import betterproto2
import grpc
import pytest

from penstock.generated.google.protobuf import Struct
from penstock.rpc.codec import descriptor_of
from penstock.rpc.errors import RpcError
from penstock.service.fields import FIELDS, Support, find_faults
from penstock.v1 import (
    Chat,
    ChatMessage,
    Choices,
    ContentPart,
    ErrorReason,
    FinishReason,
    GenerateRequest,
    Sampling,
    StreamOptions,
    StreamRequest,
    TokenizeRequest,
    Tool,
    ToolCall,
)
from service.fake_scheduler import FakeScheduler
from service.harness import request, serving, stream

TURN = ChatMessage(role="user", content=[ContentPart(text="hi")])


def chat_request(**fields: Any) -> GenerateRequest:
    return GenerateRequest(chat=Chat(messages=[TURN], **fields))


def turn_request(**fields: Any) -> GenerateRequest:
    return GenerateRequest(chat=Chat(messages=[ChatMessage(role="user", content=TURN.content, **fields)]))


REFUSED: dict[str, GenerateRequest] = {
    "priority": request(priority=0),
    "cache_scope": request(cache_scope="x"),
    "time_limit": request(time_limit=timedelta(seconds=1)),
    "ttft_target": request(ttft_target=timedelta(0)),
    "tpot_target": request(tpot_target=timedelta(seconds=1)),
    "json_schema": request(json_schema=""),
    "regex": request(regex="a"),
    "grammar": request(grammar="a"),
    "choice": request(choice=Choices(texts=["a"])),
    "logprobs": request(logprobs=0),
    "prompt_logprobs": request(prompt_logprobs=1),
    "echo": request(echo=True),
    "stream_options": request(stream_options=StreamOptions()),
    "sampling.min_p": request(min_p=0.0),
    "sampling.presence_penalty": request(presence_penalty=0.0),
    "sampling.frequency_penalty": request(frequency_penalty=1.0),
    "sampling.repetition_penalty": request(repetition_penalty=1.0),
    "sampling.logit_bias": request(logit_bias={1: 0.0}),
    "sampling.n": request(n=1),
    "sampling.allowed_token_ids": request(allowed_token_ids=[1]),
    "sampling.bad_words": request(bad_words=[""]),
    "chat.tools": chat_request(tools=[Tool()]),
    "chat.template_kwargs": chat_request(template_kwargs=Struct()),
    "chat.messages[0].name": turn_request(name="x"),
    "chat.messages[0].tool_calls": turn_request(tool_calls=[ToolCall()]),
    "chat.messages[0].tool_call_id": turn_request(tool_call_id="x"),
}
"""For every refused field a request that is otherwise good."""


def test_the_table_has_exactly_the_fields_of_the_descriptor() -> None:
    for kind, table in FIELDS.items():
        assert set(table) == {field.name for field in descriptor_of(kind).fields}, kind.__name__


def test_the_table_reaches_every_message_below_built_fields() -> None:
    named = {descriptor_of(kind).full_name for kind in FIELDS}
    for kind, table in FIELDS.items():
        for field in descriptor_of(kind).fields:
            if field.message_type is not None and table[field.name] is Support.BUILT:
                assert field.message_type.full_name in named, f"{kind.__name__}.{field.name}"


def test_every_refused_field_has_a_case() -> None:
    paths = {
        GenerateRequest: "",
        Sampling: "sampling.",
        Chat: "chat.",
        ChatMessage: "chat.messages[0].",
        TokenizeRequest: "",
    }
    refused = {
        paths[kind] + name for kind, table in FIELDS.items() for name, how in table.items() if how is Support.REFUSED
    }
    assert refused == set(REFUSED)


def test_refused_fields_are_refused_by_name() -> None:
    async def scenario() -> None:
        scheduler = FakeScheduler()
        async with serving(scheduler) as running:
            for path, message in REFUSED.items():
                for call in (running.generation.generate(message), stream(running, message)):
                    with pytest.raises(RpcError) as caught:
                        await call
                    assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED, path
                    assert caught.value.reason == ErrorReason.UNSUPPORTED_FIELD
                    assert [field for field, _ in caught.value.violations] == [path]
        assert scheduler.submits == []

    asyncio.run(scenario())


def test_all_refused_fields_are_named_at_once() -> None:
    message = request(priority=1, echo=True, n=2)
    assert find_faults(message).refused == ("priority", "sampling.n", "echo")
    assert find_faults(StreamRequest(request=message)).refused[0] == "request.priority"


def test_zero_of_a_field_without_presence_is_unset() -> None:
    assert find_faults(request(echo=False, cache_scope="", bad_words=[])).refused == ()


def test_unknown_enum_values_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.service import fields
    from penstock.v1 import Choice

    table: dict[type[betterproto2.Message], dict[str, Support]] = {
        Choice: dict.fromkeys((field.name for field in descriptor_of(Choice).fields), Support.BUILT)
    }
    monkeypatch.setattr(fields, "FIELDS", table)
    assert find_faults(Choice(finish_reason=FinishReason(77))).unknown_enums == ("finish_reason",)
    assert find_faults(Choice(finish_reason=FinishReason.STOP)).unknown_enums == ()


def test_no_public_request_has_an_enum_that_needs_a_case() -> None:
    assert not [f.full_name for kind in FIELDS for f in descriptor_of(kind).fields if f.enum_type is not None]
