"""Messages to bytes and back: every type, every field, and bytes that are no message."""

import datetime
import math
import time
from typing import Any

import betterproto2
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import v1
from penstock.rpc.codec import MAX_REQUEST_PARTS, MalformedMessage, UnencodableMessage, decoder, descriptor_of, encoder

MESSAGES: list[type[betterproto2.Message]] = [
    getattr(v1, name) for name in v1.__all__ if issubclass(getattr(v1, name), betterproto2.Message)
]
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=20),
    FieldDescriptor.TYPE_STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    FieldDescriptor.TYPE_DOUBLE: st.floats(allow_nan=False),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32, allow_nan=False),
    FieldDescriptor.TYPE_FIXED64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(10**9), 10**9),
    FieldDescriptor.TYPE_SINT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
}


def fill(wire: Any, descriptor: Descriptor, data: st.DataObject, depth: int = 0) -> None:
    """Fill a message of the C codec with anything that it can hold."""
    for field in descriptor.fields:
        if data.draw(st.booleans()) and not (field.message_type and depth > 2):
            fill_field(wire, field, data, depth)


def fill_field(wire: Any, field: FieldDescriptor, data: st.DataObject, depth: int) -> None:
    target = getattr(wire, field.name)
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
        name = data.draw(SCALARS[key.type])
        if value.message_type is not None:
            fill(target[name], value.message_type, data, depth + 1)
        else:
            target[name] = data.draw(SCALARS[value.type])
    elif entry is not None:
        if field.is_repeated:
            target = target.add()
        target.SetInParent()
        if entry.full_name == "google.protobuf.Duration":
            target.FromMicroseconds(data.draw(st.integers(-(10**12), 10**12)))
        else:
            fill(target, entry, data, depth + 1)
    else:
        one = st.integers(0, 3) if field.enum_type is not None else SCALARS[field.type]
        if field.is_repeated:
            target.extend(data.draw(st.lists(one, max_size=3)))
        else:
            setattr(wire, field.name, data.draw(one))


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda t: t.__name__)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_message_survives_both_ways(message_type: type[betterproto2.Message], data: st.DataObject) -> None:
    descriptor = descriptor_of(message_type)
    wire_type = GetMessageClass(descriptor)
    wire: Any = wire_type()
    fill(wire, descriptor, data)
    message = decoder(message_type)(wire.SerializeToString())
    assert isinstance(message, message_type)
    assert wire_type.FromString(encoder(message_type)(message)) == wire
    assert decoder(message_type)(encoder(message_type)(message)) == message


def test_values_arrive_as_their_python_types() -> None:
    request = v1.GenerateRequest(
        model="m",
        token_ids=v1.TokenIds(ids=[1, 2, 2**32 - 1]),
        time_limit=datetime.timedelta(milliseconds=1500),
        sampling=v1.Sampling(temperature=0.0, top_p=0.5, logit_bias={7: -1.0}, stop=["", "é"]),
    )
    again = decoder(v1.GenerateRequest)(encoder(v1.GenerateRequest)(request))
    assert again == request
    assert again.time_limit == datetime.timedelta(milliseconds=1500)
    assert again.sampling is not None
    assert type(again.sampling.stop) is list
    assert type(again.sampling.logit_bias) is dict
    # An optional zero is a value; an absent one is None.
    assert again.sampling.temperature == 0.0
    assert again.sampling.top_k is None


def test_a_field_named_load_is_read() -> None:
    load = v1.Load(state=v1.SchedulerState.SERVING)
    for message in (v1.ConnectResponse(load=load), v1.ConnectResponse(welcome=v1.Welcome(load=load))):
        assert decoder(v1.ConnectResponse)(encoder(v1.ConnectResponse)(message)) == message


def test_an_enum_value_of_tomorrow_is_kept() -> None:
    data = encoder(v1.Failure)(v1.Failure(code=3, reason=v1.ErrorReason(900)))
    reason = decoder(v1.Failure)(data).reason
    assert reason == 900
    assert reason not in list(v1.ErrorReason)


def test_nan_and_infinity_survive() -> None:
    sampling = v1.Sampling(temperature=math.inf, top_p=math.nan)
    again = decoder(v1.Sampling)(encoder(v1.Sampling)(sampling))
    assert again.temperature == math.inf
    assert again.top_p is not None
    assert math.isnan(again.top_p)


def test_the_last_member_of_a_oneof_wins_on_the_wire() -> None:
    first = encoder(v1.GenerateRequest)(v1.GenerateRequest(text="a"))
    second = encoder(v1.GenerateRequest)(v1.GenerateRequest(token_ids=v1.TokenIds(ids=[1])))
    both = decoder(v1.GenerateRequest)(first + second)
    assert both == v1.GenerateRequest(token_ids=v1.TokenIds(ids=[1]))


def test_a_field_of_another_wire_type_is_no_value() -> None:
    number = descriptor_of(v1.GenerateRequest).fields_by_name["model"].number
    assert decoder(v1.GenerateRequest)(bytes([number << 3, 5])) == v1.GenerateRequest()


def test_two_members_of_a_oneof_are_refused() -> None:
    with pytest.raises(UnencodableMessage, match="another member of input") as caught:
        encoder(v1.GenerateRequest)(v1.GenerateRequest(text="", token_ids=v1.TokenIds(ids=[1])))
    assert caught.value.field in ("text", "token_ids")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (v1.GenerateRequest(token_ids=v1.TokenIds(ids=[-1])), "token_ids.ids"),
        (v1.GenerateRequest(token_ids=v1.TokenIds(ids=[2**32])), "token_ids.ids"),
        (v1.GenerateRequest(model=7), "model"),  # type: ignore[arg-type]
        (v1.GenerateRequest(model="\ud800"), "model"),
        (v1.GenerateRequest(sampling="warm"), "sampling"),  # type: ignore[arg-type]
        (v1.GenerateRequest(sampling=v1.Sampling(seed=2**64)), "sampling.seed"),
    ],
)
def test_values_that_a_field_cannot_carry_are_named(message: v1.GenerateRequest, field: str) -> None:
    with pytest.raises(UnencodableMessage) as caught:
        encoder(v1.GenerateRequest)(message)
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xff\xff", id="garbage"),
        pytest.param(b"\x0a\x05abc", id="truncated"),
        pytest.param(b"\x00", id="field zero"),
        pytest.param(b"\x0f", id="no such wire type"),
        pytest.param(b"\x80" * 11, id="endless varint"),
    ],
)
def test_malformed_bytes_are_refused(data: bytes) -> None:
    for message_type in MESSAGES:
        with pytest.raises(MalformedMessage):
            decoder(message_type)(data)


def test_invalid_utf8_is_refused_and_not_quoted() -> None:
    number = descriptor_of(v1.GenerateRequest).fields_by_name["text"].number
    with pytest.raises(MalformedMessage, match=r"^the bytes are no penstock\.v1\.GenerateRequest$"):
        decoder(v1.GenerateRequest)(bytes([number << 3 | 2, 3]) + b"\xff\xfe\xfd")


def test_every_truncation_is_refused_or_a_shorter_message() -> None:
    request = v1.GenerateRequest(model="m", text="hello", sampling=v1.Sampling(temperature=0.5, stop=["a", "b"]))
    data = encoder(v1.GenerateRequest)(request)
    refused = 0
    for end in range(len(data)):
        try:
            assert decoder(v1.GenerateRequest)(data[:end]) != request
        except MalformedMessage:
            refused += 1
    # Only cuts between fields can pass.
    assert refused >= len(data) - 4


def test_a_duration_beyond_python_is_refused() -> None:
    wire: Any = GetMessageClass(descriptor_of(v1.GenerateRequest))()
    wire.time_limit.seconds = 2**62
    with pytest.raises(MalformedMessage):
        decoder(v1.GenerateRequest)(wire.SerializeToString())


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_refused_as_the_c_codec_has_it(data: bytes) -> None:
    wire_type = GetMessageClass(descriptor_of(v1.ConnectRequest))
    try:
        wire = wire_type.FromString(data)
    except DecodeError:
        with pytest.raises(MalformedMessage):
            decoder(v1.ConnectRequest)(data)
        return
    message = decoder(v1.ConnectRequest)(data)
    wire.DiscardUnknownFields()
    assert wire_type.FromString(encoder(v1.ConnectRequest)(message)) == wire


def chat_of(messages: int, parts: int) -> bytes:
    turn = v1.ChatMessage(content=[v1.ContentPart() for _ in range(parts)])
    return encoder(v1.GenerateRequest)(v1.GenerateRequest(chat=v1.Chat(messages=[turn] * messages)))


@pytest.mark.parametrize(("messages", "parts"), [(100, 0), (10, 9)])
def test_as_many_parts_as_are_allowed(messages: int, parts: int) -> None:
    decode = decoder(v1.GenerateRequest, max_parts=100)
    chat = decode(chat_of(messages, parts)).chat
    assert chat is not None
    assert len(chat.messages) == messages


@pytest.mark.parametrize(("messages", "parts"), [(101, 0), (10, 10), (1, 100)])
def test_too_many_parts_are_refused_however_deep(messages: int, parts: int) -> None:
    data = chat_of(messages, parts)
    with pytest.raises(MalformedMessage, match="more than 100 parts"):
        decoder(v1.GenerateRequest, max_parts=100)(data)
    assert decoder(v1.GenerateRequest)(data)


def test_texts_and_map_entries_are_parts_and_numbers_are_not() -> None:
    decode = decoder(v1.Sampling, max_parts=100)
    write = encoder(v1.Sampling)
    assert decode(write(v1.Sampling(stop_token_ids=list(range(1_000)))))
    for many in (v1.Sampling(stop=["abc"] * 101), v1.Sampling(logit_bias=dict.fromkeys(range(101), 1.0))):
        with pytest.raises(MalformedMessage, match="more than 100 parts"):
            decode(write(many))


def test_millions_of_parts_are_refused_at_once() -> None:
    """Converted, they would take some ten seconds."""
    chat = b"\x0a\x00" * 3_000_000
    field = descriptor_of(v1.GenerateRequest).fields_by_name["chat"].number
    size = b"".join(bytes([len(chat) >> shift & 127 | (128 if shift < 21 else 0)]) for shift in (0, 7, 14, 21))
    began = time.monotonic()
    with pytest.raises(MalformedMessage, match="parts"):
        decoder(v1.GenerateRequest, max_parts=MAX_REQUEST_PARTS)(bytes([field << 3 | 2]) + size + chat)
    assert time.monotonic() - began < 3
