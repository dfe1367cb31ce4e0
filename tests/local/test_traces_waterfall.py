import re
from textwrap import dedent

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.local.traces.spans import Attribute, Kind, Span, SpanEvent
from penstock.local.traces.waterfall import draw

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


T0 = 1_700_000_000_000_000_000
MS = 1_000_000


def span(
    name: str,
    number: int,
    parent: int | None,
    start_ms: float,
    end_ms: float,
    *,
    service: str = "penstock-service",
    pid: int | None = 402,
    kind: Kind = "internal",
    attributes: dict[str, Attribute] | None = None,
    events: tuple[SpanEvent, ...] = (),
    error: str | None = None,
) -> Span:
    return Span(
        trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
        span_id=f"{number:016x}",
        parent_id=None if parent is None else f"{parent:016x}",
        name=name,
        start_ns=T0 + int(start_ms * MS),
        end_ns=T0 + int(end_ms * MS),
        service=service,
        pid=pid,
        kind=kind,
        attributes=attributes or {},
        events=events,
        status="unset" if error is None else "error",
        status_message=error or "",
    )


def event(name: str, at_ms: float, **attributes: Attribute) -> SpanEvent:
    return SpanEvent(name=name, unix_ns=T0 + int(at_ms * MS), attributes=attributes)


GATE, ENGINE = "penstock-gate", "penstock-engine"
REQUEST = [
    span("penstock.client/Stream", 1, None, 0, 100, service="penstock-client", pid=399, kind="client"),
    span("penstock.v1.GenerationService/Stream", 2, 1, 0.4, 99.5, kind="server"),
    span("tokenize", 3, 2, 1, 3, attributes={"penstock.prompt_tokens": 17, "rpc.system": "grpc"}),
    span("route", 4, 2, 3, 3.05),
    span("scheduler.request", 5, 2, 4, 99, service=GATE, pid=403),
    span("queue", 6, 5, 4, 6, service=ENGINE, pid=404),
    span("prefill", 7, 5, 6, 20, service=ENGINE, pid=404, attributes={"rows": 17, "last": True}),
    span(
        "decode",
        8,
        5,
        20,
        98,
        service=ENGINE,
        pid=404,
        attributes={"tokens": 64},
        events=(event("preempted", 60, by="blocks", mode="recompute", cost=12.25), event("first_token", 21)),
    ),
    span("engine.step", 9, 8, 40, 41, service=ENGINE, pid=404, error="worker lost"),
]


def test_the_drawing_of_a_request() -> None:
    assert draw(REQUEST, 100, colour=False) + "\n" == dedent(
        """\
        trace 4bf92f3577b34da6a3ce929d0e0e4736  ·  9 spans  ·  4 processes  ·  100 ms

        penstock.client/Stream                 client 399       0 µs    100 ms █████████████████████████████
        └ penstock.v1.GenerationService/Stream service 402    400 µs   99.1 ms █████████████████████████████
          ├ tokenize                           service 402    1.0 ms    2.0 ms █
          │   penstock.prompt_tokens=17
          ├ route                              service 402    3.0 ms     50 µs ▏
          └ scheduler.request                  gate 403       4.0 ms   95.0 ms  ████████████████████████████
            ├ queue                            engine 404     4.0 ms    2.0 ms  █
            ├ prefill                          engine 404     6.0 ms   14.0 ms  █████
            │   rows=17  last=true
            └ decode                           engine 404    20.0 ms   78.0 ms      █◆██████████◆███████████
                tokens=64
                ◆ first_token +1.0 ms
                ◆ preempted +40.0 ms  by=blocks  mode=recompute  cost=12.25
              └ engine.step                    engine 404    40.0 ms    1.0 ms            ▏
                  ✗ worker lost
        """
    )


def test_the_drawing_in_ascii() -> None:
    assert draw(REQUEST, 80, colour=False, ascii_only=True) + "\n" == dedent(
        """\
        trace 4bf92f3577b34da6a3ce929d0e0e4736  -  9 spans  -  4 processes  -  100 ms

        penstock.client/Stream               client 399       0 us    100 ms ===========
        `-penstock.v1.GenerationService/Str~ service 402    400 us   99.1 ms ===========
          |-tokenize                         service 402    1.0 ms    2.0 ms |
          |   penstock.prompt_tokens=17
          |-route                            service 402    3.0 ms     50 us |
          `-scheduler.request                gate 403       4.0 ms   95.0 ms ===========
            |-queue                          engine 404     4.0 ms    2.0 ms |
            |-prefill                        engine 404     6.0 ms   14.0 ms ===
            |   rows=17  last=true
            `-decode                         engine 404    20.0 ms   78.0 ms   *===*====
                tokens=64
                * first_token +1.0 ms
                * preempted +40.0 ms  by=blocks  mode=recompute  cost=12.25
              `-engine.step                  engine 404    40.0 ms    1.0 ms     |
                  ! worker lost
        """
    )


def test_orphans_are_reported() -> None:
    drawn = draw([*REQUEST[:2], span("lost", 20, 99, 5, 9), span("below", 21, 20, 6, 7)], 100, colour=False)
    before, _, after = drawn.partition("spans whose parent was not received:\n")
    assert "lost" not in before
    assert after.splitlines()[0].startswith("lost ")
    assert after.splitlines()[1].startswith("└ below ")


def test_colour_changes_nothing_else() -> None:
    painted = draw(REQUEST, 110, colour=True)
    plain = "\n".join(line.rstrip() for line in re.sub(r"\x1b\[\d+m", "", painted).splitlines())
    assert plain == draw(REQUEST, 110, colour=False)
    assert painted.count("\x1b[31m") == 2  # the failed span: its process and its bar
    assert painted.count("\x1b[") % 2 == 0


def test_escape_sequences_of_a_sender_do_not_reach_the_terminal() -> None:
    evil = span("na\x1b[2Jme", 1, None, 0, 1, service="s\x07", attributes={"k\r": "v\x1b]0;x"}, error="\x9bm")
    drawn = draw([evil], 100, colour=False)
    assert all(char.isprintable() or char == "\n" for char in drawn)
    assert "na?[2Jme" in drawn


def test_no_spans() -> None:
    assert draw([], 80, colour=False) == "no spans"


@pytest.mark.parametrize("width", [0, 72, 73, 90, 300])
def test_lines_fit(width: int) -> None:
    long = span("n" * 200, 1, None, 0, 0, service="s" * 90, attributes={"a": "b" * 500})
    for spans in (REQUEST, [long], [long, span("x", 2, 1, 5, 9)]):
        assert max(map(len, draw(spans, width, colour=False).splitlines())) <= max(width, 72)


times = st.integers(-(10**9), 10**12)


@unhurried
@given(st.lists(st.tuples(st.integers(1, 6), st.none() | st.integers(1, 7), times, times, times), min_size=1))
def test_anything_can_be_drawn(given_spans: list[tuple[int, int | None, int, int, int]]) -> None:
    spans = [
        span("x", number, parent, start / MS, end / MS, events=(event("e", at / MS),))
        for number, parent, start, end, at in given_spans
    ]
    lines = draw(spans, 100, colour=False).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("service 402" in line for line in lines) == len({number for number, *_ in given_spans})


def test_a_moment_before_its_span_has_one_sign() -> None:
    """Clocks are read one after the other: an event may be a little earlier than what it belongs to."""
    early = [span("decode", 1, None, 1, 9, events=(event("first_token", 0.9999), event("late", 0.5)))]
    drawn = draw(early, 100, colour=False)
    assert "first_token +0 µs" in drawn
    assert "late -500 µs" in drawn
