"""Reading call metadata: bounded, and never trusted to be well formed."""

from collections.abc import Iterable
from typing import Any

import grpc

MAX_VALUE_CHARACTERS = 4096


def header(context: grpc.aio.ServicerContext[Any, Any], key: str) -> str | None:
    """The first value of a text header, or None if it is absent, binary or absurdly long. ``key`` is lower case."""
    return first(context.invocation_metadata() or (), key)


def first(metadata: Iterable[tuple[str, str | bytes]], key: str) -> str | None:
    """The same for metadata at hand, as interceptors have it."""
    for name, value in metadata:
        if name == key and isinstance(value, str):
            return value if len(value) <= MAX_VALUE_CHARACTERS else None
    return None
