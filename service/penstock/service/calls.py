"""One public call: who makes it, until when it is wanted, its span and its line in the log."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context, use_span

from penstock.rpc.errors import RpcError, deadline_exceeded
from penstock.service.auth import Identity
from penstock.service.deadline import Deadline
from penstock.telemetry.logging import get_logger
from penstock.telemetry.tracing import Metadata, as_context, extract, format_traceparent
from penstock.v1 import CancelReason

Note = str | int

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler knows of the call beside the request."""

    identity: Identity
    span: Span
    tracer: Tracer
    deadline: Deadline | None
    notes: dict[str, Note]
    """For the call's line in the log."""

    @property
    def traceparent(self) -> str:
        """Names the call's span; "" if the call belongs to no trace."""
        context = self.span.get_span_context()
        return format_traceparent(context) if context.is_valid else ""

    @property
    def deadline_at(self) -> float | None:
        """By the running loop's clock; None: none."""
        return None if self.deadline is None else self.deadline.at

    @property
    def cancel_reason(self) -> CancelReason:
        """Why a call that is cancelled now is cancelled."""
        return CancelReason.DEADLINE if _left_at(self.deadline) else CancelReason.CLIENT

    def check_deadline(self) -> None:
        """Raise DEADLINE_EXCEEDED once it has passed."""
        if self.deadline is not None and self.deadline.passed:
            raise deadline_exceeded()

    def note(self, name: str, value: Note, *, attribute: str = "") -> None:
        """Say something of the call in the log and on its span, there as `attribute` or `penstock.{name}`."""
        self.notes[name] = value
        self.span.set_attribute(attribute or f"penstock.{name}", value)

    @contextmanager
    def child(self, name: str) -> Iterator[Span]:
        """A span below the call's. What it fails with is recorded by type alone."""
        span = self.tracer.start_span(name, context=set_span_in_context(self.span))
        try:
            yield span
        except BaseException as error:
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            span.end()


@contextmanager
def server_span(
    tracer: Tracer, method: str, metadata: Metadata, deadline: Deadline | None, notes: dict[str, Note]
) -> Iterator[Span]:
    """The span of a call of `method` ("package.Service/Method"), below the caller's if that named one.

    Ends, and is logged with `notes`, with what is raised through it; a cancel at the deadline is DEADLINE_EXCEEDED.
    """
    service, _, name = method.partition("/")
    span = tracer.start_span(
        method,
        context=as_context(extract(metadata)),
        kind=SpanKind.SERVER,
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
    )
    began = time.monotonic()
    code = grpc.StatusCode.OK
    try:
        yield span
    except BaseException as error:
        code, reason = _failure(error, deadline)
        span.set_status(Status(StatusCode.ERROR, reason))
        raise
    finally:
        span.set_attribute("rpc.grpc.status_code", code.value[0])
        with use_span(span):
            log.info("call", method=method, code=code.name, ms=round((time.monotonic() - began) * 1000), **notes)
        span.end()


def _failure(error: BaseException, deadline: Deadline | None) -> tuple[grpc.StatusCode, str]:
    """The status that a call ends with, and a word for it that quotes nothing."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        if not _left_at(deadline):
            return grpc.StatusCode.CANCELLED, "CANCELLED"
        error = deadline_exceeded()
    if isinstance(error, RpcError):
        return error.code, error.reason.name or ""
    return grpc.StatusCode.INTERNAL, type(error).__name__


def _left_at(deadline: Deadline | None) -> bool:
    return deadline is not None and deadline.passed_for_caller
