"""A trace as a page: everything is in it, and nothing that a sender wrote is taken for markup."""

import re
from html.parser import HTMLParser

from penstock.local.traces.page import render
from penstock.local.traces.spans import Span, SpanEvent

ROOT = Span(trace_id="a" * 32, span_id="1" * 16, parent_id=None, name="Stream", start_ns=10**9, end_ns=3 * 10**9)
STEP = Span(
    trace_id="a" * 32,
    span_id="2" * 16,
    parent_id="1" * 16,
    name="<script>alert(1)</script>",
    start_ns=2 * 10**9,
    end_ns=2 * 10**9 + 5_000_000,
    service="penstock-engine",
    pid=7,
    attributes={"penstock.device_ms": 4.5, "a&b": ["<i>", "x"]},
    events=(SpanEvent(name="first_token", unix_ns=2 * 10**9 + 1_000_000),),
    status="error",
    status_message='"quoted"',
)


def test_everything_is_there_and_escaped() -> None:
    text = render([STEP, ROOT])
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for part in ("penstock-engine 7", "5.00 ms", "penstock.device_ms", "4.5", "first_token", "&quot;quoted&quot;"):
        assert part in text
    assert re.search(r"left:50\.000%;width:0\.250%", text)
    assert "http" not in text, "nothing is fetched"
    HTMLParser().feed(text)
