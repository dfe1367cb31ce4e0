"""The asking side of the trace receiver: what `penstock trace` uses."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, cast

import grpc
import msgspec
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from penstock.local.traces import otlp
from penstock.local.traces.spans import Span
from penstock.local.traces.store import Summary
from penstock.local.traces.waterfall import draw

_SERVICE = "/penstock.local.Traces"
_MAX_TRACE_BYTES = 64 << 20
_POLL_S = 0.05
_ANSWER_S = 5.0
"""In which a receiver answers, whatever it has: on a busy machine that takes longer than somebody may want to wait."""


class TraceNotFound(Exception):
    """The receiver does not have that trace (any more), or none at all."""


class ReceiverUnavailable(Exception):
    """No trace receiver answers at that address."""


def fetch(address: str, trace_id: str = "", *, timeout_s: float = _ANSWER_S) -> tuple[Span, ...]:
    """The spans of a trace; without an id, of the latest complete one.

    Raises TraceNotFound and ReceiverUnavailable.
    """
    answer = _call(address, "Get", trace_id.encode("ascii", "replace"), timeout_s)
    decoded = otlp.decode(ExportTraceServiceRequest.FromString(answer))
    return tuple(pair[0] for pair in decoded if pair is not None)


def recent(address: str, *, timeout_s: float = _ANSWER_S) -> list[Summary]:
    """The newest traces, newest first. Raises ReceiverUnavailable."""
    return msgspec.json.decode(_call(address, "List", b"", timeout_s), type=list[Summary])


def wait_for(
    address: str, trace_id: str, ready: Callable[[Sequence[Span]], bool], *, timeout_s: float
) -> tuple[Span, ...]:
    """Ask for a trace until `ready` says that all is there: processes send their spans at their own pace.

    After `timeout_s` what has arrived is returned, ready or not. Raises TraceNotFound if nothing has, and
    ReceiverUnavailable if no answer comes, for which a receiver has some seconds of its own.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = deadline - time.monotonic()
        try:
            spans = fetch(address, trace_id, timeout_s=max(left_s, _ANSWER_S))
        except TraceNotFound:
            if left_s <= 0:
                raise
        else:
            if left_s <= 0 or ready(spans):
                return spans
        time.sleep(_POLL_S)


def show(address: str, trace_id: str, out: TextIO) -> None:
    """Draw a trace (the latest without an id) for a person. Raises TraceNotFound and ReceiverUnavailable."""
    spans = fetch(address, trace_id)
    width = shutil.get_terminal_size((120, 24)).columns if out.isatty() else 120
    colour = out.isatty() and not os.environ.get("NO_COLOR")
    out.write(draw(spans, width, colour, ascii_only=not _can_draw(out)) + "\n")


def _can_draw(out: TextIO) -> bool:
    try:
        "█└├│◆µ…·".encode(out.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _call(address: str, method: str, payload: bytes, timeout_s: float) -> bytes:
    with _channel(address) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"{_SERVICE}/{method}")
        try:
            return call(payload, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _meaning(cast(grpc.Call, error), address) from error


@contextmanager
def _channel(address: str) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", _MAX_TRACE_BYTES), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
        yield channel


def _meaning(failed: grpc.Call, address: str) -> Exception:
    if failed.code() is grpc.StatusCode.NOT_FOUND:
        return TraceNotFound(failed.details())
    return ReceiverUnavailable(f"no trace receiver answers at {address} ({failed.code().name})")
