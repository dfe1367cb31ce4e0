"""One error, told as a status with details and as a message of the internal link."""

import grpc
import pytest
from google.protobuf.any_pb2 import Any as WireAny
from google.rpc.error_details_pb2 import ErrorInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.rpc import errors
from penstock.rpc.codec import decoder, encoder
from penstock.rpc.errors import RpcError
from penstock.v1 import ErrorReason, Failure

EXAMPLES = [
    errors.invalid([("sampling.top_p", "must be in (0, 1]"), ("text", "is empty")]),
    errors.malformed("penstock.v1.GenerateRequest"),
    errors.unsupported_fields(["sampling.n", "echo"]),
    errors.unsupported_method("penstock.v1.AdapterService.LoadAdapter"),
    errors.not_found(ErrorReason.MODEL_NOT_FOUND, "no model 'x'"),
    errors.unavailable(ErrorReason.NO_SCHEDULER, "no scheduler", 0.25),
    errors.exhausted(ErrorReason.QUEUE_FULL, "the queue is full", 2.0, [("tenant:a", "8 requests at once")]),
    errors.deadline_exceeded(),
    errors.cancelled(),
    errors.unauthenticated("unknown key"),
    errors.internal(),
]


class BrokenCall(grpc.RpcError):
    """A failed call with these trailers."""

    def __init__(self, code: grpc.StatusCode, trailers: object) -> None:
        self._code, self._trailers = code, trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "plain text"

    def trailing_metadata(self) -> object:  # type: ignore[override]
        return self._trailers


def parts(error: RpcError) -> tuple[object, ...]:
    return error.code, error.reason, error.message, error.violations, error.retry_after_s, error.quota


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: e.reason.name)
def test_a_status_tells_everything(error: RpcError) -> None:
    again = errors.from_status(Status.FromString(errors.to_status(error).SerializeToString()))
    assert parts(again) == parts(error)
    assert again.from_peer
    assert not error.from_peer


@pytest.mark.parametrize("error", [e for e in EXAMPLES if not e.quota], ids=lambda e: e.reason.name)
def test_a_failure_tells_everything_but_quotas(error: RpcError) -> None:
    data = encoder(Failure)(errors.to_failure(error))
    assert parts(errors.from_failure(decoder(Failure)(data))) == parts(error)


def test_error_info_is_in_our_domain_without_the_prefix() -> None:
    info = ErrorInfo()
    assert errors.to_status(EXAMPLES[0]).details[0].Unpack(info)
    assert (info.domain, info.reason) == ("penstock", "INVALID_REQUEST")


def test_a_full_queue_always_says_when_to_retry() -> None:
    error = RpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, ErrorReason.QUEUE_FULL, "full")
    assert errors.from_status(errors.to_status(error)).retry_after_s == 1.0


@settings(max_examples=50, deadline=None)
@given(
    message=st.text(max_size=2000),
    violations=st.lists(st.tuples(st.text(max_size=300), st.text(max_size=1000)), max_size=200),
    quota=st.lists(st.tuples(st.text(max_size=300), st.text(max_size=1000)), max_size=100),
)
def test_trailers_stay_under_8_kilobytes(
    message: str, violations: list[tuple[str, str]], quota: list[tuple[str, str]]
) -> None:
    error = RpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, ErrorReason.QUEUE_FULL, message, violations, 1.0, quota)
    _, details, metadata = errors.trailers(error)
    encoded = 4 * sum(len(value) for _, value in metadata) / 3
    assert encoded <= 7000
    assert len(details.encode()) <= 1200
    assert encoder(Failure)(errors.to_failure(error)) is not None


def test_long_lists_keep_their_first_entries() -> None:
    error = errors.invalid([(f"field_{i}", "x" * 1000) for i in range(1000)])
    again = errors.from_status(errors.to_status(error))
    assert 10 < len(again.violations) < 1000
    assert again.violations[0] == ("field_0", "x" * 159 + "…")
    assert len(again.message) == 300


@pytest.mark.parametrize(
    "trailers",
    [
        None,
        (),
        (("other", "text"),),
        ((errors.DETAILS_KEY, b"\xff\xff garbage"),),
        ((errors.DETAILS_KEY, b""),),
        ((errors.DETAILS_KEY, Status(code=13, message="another code").SerializeToString()),),
    ],
)
def test_a_status_without_readable_details_keeps_code_and_text(trailers: object) -> None:
    error = errors.from_call(BrokenCall(grpc.StatusCode.UNAVAILABLE, trailers))
    assert parts(error)[:3] == (grpc.StatusCode.UNAVAILABLE, ErrorReason.UNSPECIFIED, "plain text")
    assert not error.from_peer


def test_details_of_others_and_broken_ones_are_passed_over() -> None:
    status = errors.to_status(EXAMPLES[0])
    status.details.insert(0, WireAny(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\xff"))
    status.details.insert(0, WireAny(type_url="type.googleapis.com/someone.Else", value=b"\xff"))
    assert parts(errors.from_status(status)) == parts(EXAMPLES[0])


def test_error_info_of_another_domain_is_not_our_word() -> None:
    status = Status(code=14, message="proxy")
    status.details.add().Pack(ErrorInfo(domain="proxy.example", reason="QUEUE_FULL"))
    error = errors.from_status(status)
    assert (error.reason, error.from_peer) == (ErrorReason.UNSPECIFIED, False)


def test_a_reason_of_tomorrow_is_unspecified_and_still_the_peers_word() -> None:
    status = Status(code=9)
    status.details.add().Pack(ErrorInfo(domain="penstock", reason="NOT_INVENTED_YET"))
    error = errors.from_status(status)
    assert (error.reason, error.from_peer) == (ErrorReason.UNSPECIFIED, True)


def test_a_deadline_made_by_the_transport_has_its_reason() -> None:
    error = errors.from_call(BrokenCall(grpc.StatusCode.DEADLINE_EXCEEDED, ()))
    assert error.reason is ErrorReason.DEADLINE
