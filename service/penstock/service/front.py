"""What every public call passes: its span, its identity, a place, its deadline."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from opentelemetry.trace import Tracer

from penstock.service.admission import Admission
from penstock.service.auth import Authenticator
from penstock.service.calls import Call, Note, server_span
from penstock.service.deadline import Deadline
from penstock.telemetry.tracing import Metadata


class CallContext(Protocol):
    """The part of a gRPC servicer context that is used."""

    def invocation_metadata(self) -> Metadata | None:
        """The caller's metadata."""
        ...

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None: none."""
        ...


class Front:
    """Shared by all services of the process."""

    __slots__ = ("_admission", "_authenticator", "_tracer")

    def __init__(self, authenticator: Authenticator, admission: Admission, tracer: Tracer) -> None:
        self._authenticator = authenticator
        self._admission = admission
        self._tracer = tracer

    @contextmanager
    def call(self, method: str, context: CallContext) -> Iterator[Call]:
        """One call of `method` ("package.Service/Method").

        Raises UNAUTHENTICATED, UNAVAILABLE, RESOURCE_EXHAUSTED, or DEADLINE_EXCEEDED if it is over already.
        """
        metadata = tuple(context.invocation_metadata() or ())
        remaining_s = context.time_remaining()
        deadline = None if remaining_s is None else Deadline.after(remaining_s)
        notes: dict[str, Note] = {}
        with server_span(self._tracer, method, metadata, deadline, notes) as span:
            identity = self._authenticator.authenticate(metadata)
            with self._admission.enter():
                call = Call(identity, span, self._tracer, deadline, notes)
                call.check_deadline()
                call.note("tenant", identity.tenant)
                yield call
