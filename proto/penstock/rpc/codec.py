"""Messages of ``penstock.v1`` to bytes and back, through the C codec (upb).

The generated dataclasses are the types; upb is the wire. betterproto2's own parser is not used: it takes garbage for
an empty message, a truncated field for a shorter one and a second member of a oneof for an additional one, and a
field named ``load`` hides the method that it parses with. upb refuses malformed bytes, truncated fields and invalid
UTF-8, obeys every rule of the format (the last of a oneof wins, repeated sub-messages merge), and is several times
faster. What is left to do here is to carry values between the two shapes of one message.
"""

import datetime
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from typing import Any, TypeVar, cast

import betterproto2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration as WireDuration
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as WireMessage
from google.protobuf.message_factory import GetMessageClass

M = TypeVar("M", bound=betterproto2.Message)

MAX_REQUEST_PARTS = 16_384
"""Most elements of repeated messages and texts in one request, however deep. Two bytes make one, and its dataclass
takes microseconds: without a bound, a request of a few megabytes would stop its server for many seconds."""

_SMALLEST_PART_BYTES = 2

_Convert = Callable[[Any], Any]
_Write = Callable[[WireMessage, Any], None]


class MalformedMessage(ValueError):
    """The bytes are no message of the expected type. The text never quotes them."""


class UnencodableMessage(ValueError):
    """A field holds a value that its type cannot carry, or two members of a oneof are set."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        """The field's name, dotted when it is inside another message."""
        self.description = description
        """What is wrong with it."""


def decoder(message_type: type[M], *, max_parts: int | None = None) -> Callable[[bytes], M]:
    """The function that reads one ``message_type`` from its bytes.

    It raises MalformedMessage, also for more than ``max_parts`` elements of repeated messages and texts; fields that
    the type does not know are dropped, unknown enum values are kept as nameless members.
    """
    shape = _shape(message_type)
    wire_type = shape.wire_type
    read = shape.read
    can_exceed = (max_parts or 0) * _SMALLEST_PART_BYTES

    def decode(data: bytes) -> M:
        try:
            wire = wire_type.FromString(data)
            if len(data) > can_exceed and max_parts is not None and _parts_left(wire, max_parts) < 0:
                raise MalformedMessage(f"the {shape.name} has more than {max_parts} parts")
            message: M = read(wire)
        except (DecodeError, OverflowError, RecursionError) as error:
            raise MalformedMessage(f"the bytes are no {shape.name}") from error
        return message

    return decode


def encoder(message_type: type[M]) -> Callable[[M], bytes]:
    """The function that writes one ``message_type``. It raises UnencodableMessage."""
    shape = _shape(message_type)
    wire_type = shape.wire_type
    write = shape.write

    def encode(message: M) -> bytes:
        wire = wire_type()
        write(wire, message)
        return wire.SerializeToString()

    return encode


def descriptor_of(message_type: type[betterproto2.Message]) -> Descriptor:
    """The descriptor that a generated message carries."""
    descriptor = message_type.DESCRIPTOR  # type: ignore[attr-defined]  # each generated class has it, the base not
    if not isinstance(descriptor, Descriptor):
        raise TypeError(f"{message_type.__name__} has no descriptor")
    return descriptor


class _Shape:
    """How one message type maps to the C codec's class of it. Its fields are compiled when first met."""

    def __init__(self, message_type: type[betterproto2.Message]) -> None:
        descriptor = descriptor_of(message_type)
        self.message_type = message_type
        self.name = descriptor.full_name
        self.wire_type: type[WireMessage] = GetMessageClass(descriptor)
        self._descriptor = descriptor

    @cached_property
    def _readers(self) -> dict[int, tuple[str, _Convert | None]]:
        return {f.number: (name, _reader(f, self.message_type, name)) for name, f in self._fields()}

    @cached_property
    def _writers(self) -> list[tuple[str, str | None, _Write]]:
        return [(name, _oneof(f), _writer(f, self.message_type, name)) for name, f in self._fields()]

    def _fields(self) -> list[tuple[str, FieldDescriptor]]:
        names: dict[int, str] = _meta(self.message_type).field_name_by_number
        return [(names[field.number], field) for field in self._descriptor.fields]

    def read(self, wire: WireMessage) -> Any:
        """The dataclass of a parsed message."""
        readers = self._readers
        values = {}
        for field, value in wire.ListFields():
            name, convert = readers[field.number]
            values[name] = value if convert is None else convert(value)
        return self.message_type(**values)

    def write(self, wire: WireMessage, message: betterproto2.Message) -> None:
        """Fill an empty ``wire`` from the dataclass. Raises UnencodableMessage."""
        for name, oneof, write in self._writers:
            value = getattr(message, name)
            if value is None:
                continue
            if oneof is not None and wire.WhichOneof(oneof) is not None:
                raise UnencodableMessage(name, f"another member of {oneof} is set too")
            try:
                write(wire, value)
            except UnencodableMessage as error:
                raise UnencodableMessage(f"{name}.{error.field}", error.description) from error
            except (TypeError, ValueError, AttributeError, OverflowError) as error:
                raise UnencodableMessage(name, _reason(error)) from error


def _parts_left(wire: WireMessage, left: int) -> int:
    """What is left of a number of parts after those of a message, however deep; negative as soon as there are more."""
    for field, value in wire.ListFields():
        if field.is_repeated and field.cpp_type in (FieldDescriptor.CPPTYPE_MESSAGE, FieldDescriptor.CPPTYPE_STRING):
            left -= len(value)
        if left < 0:
            break
        for message in _messages(field, value):
            left = _parts_left(message, left)
            if left < 0:
                return left
    return left


def _messages(field: FieldDescriptor, value: Any) -> Iterable[WireMessage]:
    """The messages that a field of the C codec holds."""
    if _value_field(field).message_type is None:
        return ()
    if _is_map(field):
        return cast("Iterable[WireMessage]", value.values())
    return cast("Iterable[WireMessage]", value) if field.is_repeated else (value,)


@cache
def _shape(message_type: type[betterproto2.Message]) -> _Shape:
    return _Shape(message_type)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "the text is not valid Unicode"
    return "the value is out of the field's range" if isinstance(error, ValueError) else "the value is of a wrong type"


def _oneof(field: FieldDescriptor) -> str | None:
    """The oneof that is one for people; ``optional`` makes one of a single field."""
    group = field.containing_oneof
    return group.name if group is not None and len(group.fields) > 1 else None


def _meta(message_type: Any) -> Any:
    """What betterproto2 knows of a message's fields."""
    return message_type._betterproto


def _value_field(field: FieldDescriptor) -> FieldDescriptor:
    """The field that holds a map's values, or the field itself."""
    entry = field.message_type
    return field if entry is None or not _is_map(field) else entry.fields_by_name["value"]


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _python_type(owner: type[betterproto2.Message], name: str, field: FieldDescriptor) -> Any:
    """The class of a field's message or enum values, as the generated code declares it."""
    classes = _meta(owner).cls_by_field
    return classes[f"{name}.value" if _is_map(field) else name]


def _reader(field: FieldDescriptor, owner: type[betterproto2.Message], name: str) -> _Convert | None:
    """From what the C codec holds to what the dataclass holds; None when they are the same."""
    one = _value_reader(_value_field(field), _python_type(owner, name, field))
    if _is_map(field):
        return dict if one is None else lambda entries: {key: one(value) for key, value in entries.items()}
    if field.is_repeated:
        return list if one is None else lambda items: [one(item) for item in items]
    return one


def _value_reader(field: FieldDescriptor, python_type: Any) -> _Convert | None:
    if field.enum_type is not None:
        return _enum_reader(python_type)
    if field.message_type is None:
        return None
    if python_type is datetime.timedelta:
        return WireDuration.ToTimedelta
    return _shape(python_type).read


def _enum_reader(enum: type[betterproto2.Enum]) -> _Convert:
    """Known values by a table: calling an enum costs three times as much."""
    known = {member.value: member for member in enum}

    def read(value: int) -> betterproto2.Enum:
        return known.get(value) or enum(value)

    return read


def _writer(field: FieldDescriptor, owner: type[betterproto2.Message], name: str) -> _Write:
    """The function that puts a dataclass's value into the C codec's message."""
    wire_name = field.name
    value_field = _value_field(field)
    if value_field.message_type is not None:
        return _message_writer(field, _fill(_python_type(owner, name, field)))
    if _is_map(field):
        return lambda wire, value: getattr(wire, wire_name).update(value)
    if field.is_repeated:
        return lambda wire, value: getattr(wire, wire_name).extend(value)
    return lambda wire, value: setattr(wire, wire_name, value)


def _fill(python_type: Any) -> _Write:
    if python_type is datetime.timedelta:
        return WireDuration.FromTimedelta  # type: ignore[return-value]  # unbound: the wire message is its self
    return _shape(python_type).write


def _message_writer(field: FieldDescriptor, fill: _Write) -> _Write:
    wire_name = field.name

    def write_map(wire: WireMessage, value: Any) -> None:
        target = getattr(wire, wire_name)
        for key, item in value.items():
            fill(target[key], item)

    def write_repeated(wire: WireMessage, value: Any) -> None:
        target = getattr(wire, wire_name)
        for item in value:
            fill(target.add(), item)

    def write_one(wire: WireMessage, value: Any) -> None:
        target = getattr(wire, wire_name)
        target.SetInParent()
        fill(target, value)

    if _is_map(field):
        return write_map
    return write_repeated if field.is_repeated else write_one
