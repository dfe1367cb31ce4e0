import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.trace import SpanContext, TraceFlags, TraceState

from penstock.telemetry.tracing import (
    as_context,
    child_of,
    extract,
    format_traceparent,
    inject,
    new_span_id,
    parse_traceparent,
)

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{SPAN}-01"

contexts = st.builds(
    lambda trace_id, span_id, flags: SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags)),
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.integers(0, 3),
)


@unhurried
@given(contexts)
def test_format_then_parse_is_the_identity(context: SpanContext) -> None:
    assert parse_traceparent(format_traceparent(context)) == context


@unhurried
@given(st.from_regex(r"(00|01|0A|fe|ff)-[0-9a-f]{31}[01Aa]-0{15}[0-3]-0[0-9a-fA](-[a-z]?)?", fullmatch=True))
def test_parses_exactly_what_the_specification_allows(header: str) -> None:
    version, trace_id, span_id, flags, *more = header.split("-", 4)
    allowed = (
        header == header.lower()
        and version != "ff"
        and not (version == "00" and more)
        and int(trace_id, 16) > 0
        and int(span_id, 16) > 0
    )
    context = parse_traceparent(header)
    assert (context is not None) == allowed
    if context is not None:
        assert format_traceparent(context) == f"00-{trace_id}-{span_id}-{int(flags, 16) & 3:02x}"


@unhurried
@given(st.text(max_size=70) | st.text(alphabet=string.hexdigits + "-", min_size=55, max_size=55))
def test_any_text_is_survived(header: str) -> None:
    assert parse_traceparent(header) is None


@unhurried
@given(st.integers(0, len(VALID) - 1), st.characters(exclude_characters="0123456789abcdef-"))
def test_one_foreign_character_spoils_it(at: int, foreign: str) -> None:
    assert parse_traceparent(VALID[:at] + foreign + VALID[at + 1 :]) is None


@unhurried
@given(st.integers(0, len(VALID) - 1))
def test_a_truncated_header_is_refused(length: int) -> None:
    assert parse_traceparent(VALID[:length]) is None


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"{VALID}-",
        f"{VALID}-more",
        f" {VALID}",
        f"{VALID}\n",
        f"01-{TRACE}-{SPAN}-01more",
        f"01-{TRACE}-{SPAN}-01-{'x' * 600}",
        VALID.replace("4", "٤"),  # a digit, but not of ASCII
    ],
)
def test_refused(header: str | None) -> None:
    assert parse_traceparent(header) is None


def test_a_later_version_may_append_fields_and_flags() -> None:
    context = parse_traceparent(f"cc-{TRACE}-{SPAN}-ff-what.the.future.brings")
    assert context is not None
    assert context.trace_flags.sampled
    assert format_traceparent(context) == f"00-{TRACE}-{SPAN}-03"


def test_an_invalid_context_has_no_traceparent() -> None:
    with pytest.raises(ValueError, match="invalid"):
        format_traceparent(SpanContext(0, 1, is_remote=False))


@unhurried
@given(contexts)
def test_metadata_round_trip(context: SpanContext) -> None:
    metadata = inject([("authorization", "x"), ("Traceparent", VALID), ("blob-bin", b"\xff")], context)
    assert extract(metadata) == context
    assert [name for name, _ in metadata] == ["authorization", "blob-bin", "traceparent"]


def test_tracestate_travels_along() -> None:
    context = extract([("traceparent", VALID), ("tracestate", "a=1,b=2")])
    assert context is not None
    assert context.trace_state == TraceState([("a", "1"), ("b", "2")])
    assert inject((), child_of(context))[1] == ("tracestate", "a=1,b=2")


def test_bytes_are_read_and_two_parents_are_none() -> None:
    assert extract([("traceparent", VALID.encode())]) == parse_traceparent(VALID)
    assert extract([("traceparent", VALID), ("traceparent", VALID)]) is None
    assert extract([("tracestate", "a=1")]) is None
    assert extract([("traceparent", b"\xff\xfe")]) is None


def test_without_a_span_metadata_stays_as_it_is() -> None:
    assert inject([("a", "b")]) == (("a", "b"),)
    assert len(as_context(None)) == 0


@unhurried
@given(contexts)
def test_a_child_stays_in_the_trace(parent: SpanContext) -> None:
    child = child_of(parent)
    assert (child.trace_id, child.trace_flags) == (parent.trace_id, parent.trace_flags)
    assert child.is_valid
    assert not child.is_remote


def test_span_ids_differ() -> None:
    assert len({new_span_id() for _ in range(1000)}) == 1000
