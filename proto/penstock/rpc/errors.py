"""One typed error for every failure of an rpc, on both sides of the wire.

A server raises RpcError and the client catches the same RpcError: between them it is a ``google.rpc.Status`` in the
trailer ``grpc-status-details-bin`` with ErrorInfo, BadRequest, RetryInfo and QuotaFailure as google.aip.dev/193 has it.
On the internal link it is a ``penstock.v1.Failure``.
"""

from collections.abc import Iterable, MutableSequence
from typing import TypeVar

import grpc
from google.protobuf.any_pb2 import Any as WireAny
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from penstock.v1 import ErrorReason, Failure, FieldViolation

D = TypeVar("D", bound=Message)

DOMAIN = "penstock"
DETAILS_KEY = "grpc-status-details-bin"
MAX_STATUS_BYTES = 5000
"""Of an encoded status. As base64, beside its message in ``grpc-message``, it keeps trailers under 8 KB."""
_MAX_MESSAGE_CHARACTERS = 300
_MAX_DESCRIPTION_CHARACTERS = 160
_MAX_FIELD_CHARACTERS = 80

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_RETRIED = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
_DEFAULT_RETRY_S = 1.0
_REASON_OF_CODE = {
    grpc.StatusCode.DEADLINE_EXCEEDED: ErrorReason.DEADLINE,
    grpc.StatusCode.CANCELLED: ErrorReason.CANCELLED,
    grpc.StatusCode.UNAUTHENTICATED: ErrorReason.UNAUTHENTICATED,
}
"""What a status without details still tells."""


class RpcError(Exception):
    """Why an rpc failed. Its text is ``message``: one line for people, without secrets or prompt text."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: ErrorReason,
        message: str,
        violations: Iterable[tuple[str, str]] = (),
        retry_after_s: float | None = None,
        quota: Iterable[tuple[str, str]] = (),
        *,
        from_peer: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        """UNSPECIFIED when the status came without penstock's details and its code does not tell."""
        self.message = message
        self.violations = tuple(violations)
        """(field path, what is wrong with it)."""
        self.retry_after_s = retry_after_s
        self.quota = tuple(quota)
        """(subject, description)."""
        self.from_peer = from_peer
        """The other side's own final word, as its ErrorInfo proves; else the transport, or this process, made it."""

    def __repr__(self) -> str:
        return f"RpcError({self.code.name}, {self.reason.name}, {self.message!r}, {self.violations!r})"


def invalid(violations: Iterable[tuple[str, str]], message: str = "") -> RpcError:
    """INVALID_ARGUMENT that names every bad field."""
    named = tuple(violations)
    text = message or "; ".join(f"{field}: {description}" for field, description in named) or "invalid request"
    return RpcError(grpc.StatusCode.INVALID_ARGUMENT, ErrorReason.INVALID_REQUEST, text, named)


def malformed(what: str) -> RpcError:
    """INVALID_ARGUMENT for bytes that are no message of the type ``what``."""
    return RpcError(grpc.StatusCode.INVALID_ARGUMENT, ErrorReason.MALFORMED_MESSAGE, f"malformed message: {what}")


def unsupported_fields(fields: Iterable[str]) -> RpcError:
    """UNIMPLEMENTED that names the fields which are not built yet."""
    named = tuple((field, "not supported by this server") for field in fields)
    text = f"unsupported: {', '.join(field for field, _ in named)}"
    return RpcError(grpc.StatusCode.UNIMPLEMENTED, ErrorReason.UNSUPPORTED_FIELD, text, named)


def unsupported_method(method: str) -> RpcError:
    """UNIMPLEMENTED for a method that is in the contract and not built yet."""
    return RpcError(
        grpc.StatusCode.UNIMPLEMENTED, ErrorReason.UNSUPPORTED_METHOD, f"{method} is not supported by this server"
    )


def not_found(reason: ErrorReason, message: str) -> RpcError:
    """NOT_FOUND."""
    return RpcError(grpc.StatusCode.NOT_FOUND, reason, message)


def unavailable(reason: ErrorReason, message: str, retry_after_s: float = _DEFAULT_RETRY_S) -> RpcError:
    """UNAVAILABLE: try again after ``retry_after_s``."""
    return RpcError(grpc.StatusCode.UNAVAILABLE, reason, message, retry_after_s=retry_after_s)


def exhausted(
    reason: ErrorReason, message: str, retry_after_s: float, quota: Iterable[tuple[str, str]] = ()
) -> RpcError:
    """RESOURCE_EXHAUSTED: try again after ``retry_after_s``."""
    return RpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message, retry_after_s=retry_after_s, quota=quota)


def deadline_exceeded(message: str = "the deadline passed") -> RpcError:
    """DEADLINE_EXCEEDED."""
    return RpcError(grpc.StatusCode.DEADLINE_EXCEEDED, ErrorReason.DEADLINE, message)


def cancelled(message: str = "cancelled by the caller") -> RpcError:
    """CANCELLED."""
    return RpcError(grpc.StatusCode.CANCELLED, ErrorReason.CANCELLED, message)


def unauthenticated(message: str) -> RpcError:
    """UNAUTHENTICATED."""
    return RpcError(grpc.StatusCode.UNAUTHENTICATED, ErrorReason.UNAUTHENTICATED, message)


def internal() -> RpcError:
    """INTERNAL, telling nothing of what happened inside."""
    return RpcError(grpc.StatusCode.INTERNAL, ErrorReason.INTERNAL, "internal error")


def to_status(error: RpcError) -> Status:
    """The status with details, cut so that it encodes to at most MAX_STATUS_BYTES."""
    status = Status(code=error.code.value[0], message=_cut(error.message, _MAX_MESSAGE_CHARACTERS))
    _attach(status, ErrorInfo(reason=error.reason.name or ErrorReason.INTERNAL.name, domain=DOMAIN))
    if error.code in _RETRIED or error.retry_after_s is not None:
        _attach(status, _retry_info(error.retry_after_s))
    if error.quota:
        quota = QuotaFailure()
        _append_fitting(quota.violations, (_quota_violation(*pair) for pair in error.quota), _room(status) // 2)
        _attach(status, quota)
    if error.violations:
        bad = BadRequest()
        _append_fitting(bad.field_violations, (_field_violation(*pair) for pair in error.violations), _room(status))
        _attach(status, bad)
    return status


def trailers(error: RpcError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Code, details and trailing metadata to abort a call with."""
    status = to_status(error)
    return error.code, status.message, ((DETAILS_KEY, status.SerializeToString()),)


def from_status(status: Status) -> RpcError:
    """What ``to_status`` told, as far as its details can be read; others' details are passed over."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    error = RpcError(code, _REASON_OF_CODE.get(code, ErrorReason.UNSPECIFIED), status.message)
    for detail in status.details:
        try:
            _read_detail(error, detail)
        except (DecodeError, OverflowError):
            continue
    return error


def from_call(error: grpc.RpcError) -> RpcError:
    """The typed error of a failed call, sync or async. Absent or unreadable details leave code and text."""
    code = error.code()
    plain = RpcError(code, _REASON_OF_CODE.get(code, ErrorReason.UNSPECIFIED), error.details() or code.name.lower())
    trailing: Iterable[tuple[str, str | bytes]] | None = error.trailing_metadata()  # type: ignore[assignment]
    for key, value in trailing or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return _with_details(plain, value)
    return plain


def to_failure(error: RpcError) -> Failure:
    """The error as a message of the internal link."""
    bad = BadRequest()
    _append_fitting(bad.field_violations, (_field_violation(*pair) for pair in error.violations), MAX_STATUS_BYTES)
    retry = error.retry_after_s
    return Failure(
        code=error.code.value[0],
        reason=error.reason,
        message=_cut(error.message, _MAX_MESSAGE_CHARACTERS),
        retry_after_ms=None if retry is None else min(max(round(retry * 1000), 0), 2**32 - 1),
        violations=[FieldViolation(field=one.field, description=one.description) for one in bad.field_violations],
    )


def from_failure(failure: Failure) -> RpcError:
    """The error that the other side of the internal link told."""
    retry = failure.retry_after_ms
    return RpcError(
        _CODES.get(failure.code, grpc.StatusCode.UNKNOWN),
        failure.reason,
        failure.message,
        tuple((violation.field, violation.description) for violation in failure.violations),
        None if retry is None else retry / 1000,
        from_peer=True,
    )


def _with_details(plain: RpcError, data: bytes) -> RpcError:
    try:
        told = from_status(Status.FromString(data))
    except DecodeError:
        return plain
    return told if told.code is plain.code else plain


def _read_detail(error: RpcError, detail: WireAny) -> None:
    if detail.Is(ErrorInfo.DESCRIPTOR):
        info = _unpacked(detail, ErrorInfo())
        if info.domain == DOMAIN:
            error.reason = ErrorReason.__members__.get(info.reason, ErrorReason.UNSPECIFIED)
            error.from_peer = True
    elif detail.Is(RetryInfo.DESCRIPTOR):
        error.retry_after_s = _unpacked(detail, RetryInfo()).retry_delay.ToTimedelta().total_seconds()
    elif detail.Is(BadRequest.DESCRIPTOR):
        bad = _unpacked(detail, BadRequest())
        error.violations = tuple((one.field, one.description) for one in bad.field_violations)
    elif detail.Is(QuotaFailure.DESCRIPTOR):
        quota = _unpacked(detail, QuotaFailure())
        error.quota = tuple((one.subject, one.description) for one in quota.violations)


def _unpacked(detail: WireAny, message: D) -> D:
    detail.Unpack(message)
    return message


def _attach(status: Status, detail: Message) -> None:
    status.details.add().Pack(detail)


def _room(status: Status) -> int:
    """Bytes left for one more detail's content."""
    used: int = status.ByteSize()
    return MAX_STATUS_BYTES - used - 100  # the type's url and the lengths


def _append_fitting(target: MutableSequence[D], items: Iterable[D], room: int) -> None:
    """Append the first items that together fit into ``room`` bytes."""
    for item in items:
        room -= item.ByteSize() + 4
        if room < 0:
            return
        target.append(item)


def _retry_info(retry_after_s: float | None) -> RetryInfo:
    info = RetryInfo()
    info.retry_delay.FromMilliseconds(round(1000 * (_DEFAULT_RETRY_S if retry_after_s is None else retry_after_s)))
    return info


def _field_violation(field: str, description: str) -> BadRequest.FieldViolation:
    return BadRequest.FieldViolation(
        field=_cut(field, _MAX_FIELD_CHARACTERS), description=_cut(description, _MAX_DESCRIPTION_CHARACTERS)
    )


def _quota_violation(subject: str, description: str) -> QuotaFailure.Violation:
    return QuotaFailure.Violation(
        subject=_cut(subject, _MAX_FIELD_CHARACTERS), description=_cut(description, _MAX_DESCRIPTION_CHARACTERS)
    )


def _cut(text: str, limit: int) -> str:
    """At most ``limit`` characters, and none that UTF-8 cannot carry."""
    clean = text[: limit + 1].encode("utf-8", "replace").decode()
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
