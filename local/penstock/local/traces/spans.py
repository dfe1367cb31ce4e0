"""Spans as plain data, and the tree they form."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

Scalar = str | bool | int | float
Attribute = Scalar | list[Scalar]
Kind = Literal["internal", "server", "client", "producer", "consumer"]
Status = Literal["unset", "ok", "error"]


class SpanEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened at one moment of a span."""

    name: str
    unix_ns: int
    attributes: dict[str, Attribute] = {}


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One finished span with its process. Ids are lower-case hexadecimal, times Unix nanoseconds."""

    trace_id: str
    span_id: str
    parent_id: str | None
    """None for a root."""
    name: str
    start_ns: int
    end_ns: int
    service: str = "unknown"
    pid: int | None = None
    kind: Kind = "internal"
    attributes: dict[str, Attribute] = {}
    events: tuple[SpanEvent, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    """Pairs of trace id and span id."""
    status: Status = "unset"
    status_message: str = ""
    resource: dict[str, Attribute] = {}
    """All that is known of the process, service name and pid included."""

    @property
    def duration_ns(self) -> int:
        """Never negative, whatever two clocks say."""
        return max(0, self.end_ns - self.start_ns)


class Row(msgspec.Struct, frozen=True):
    """A span in its place in the tree."""

    span: Span
    lasts: tuple[bool, ...]
    """For each level from the first below the head down to this span: whether it is the last child there."""
    orphan: bool
    """Whether the span has a parent that is not among the spans."""

    @property
    def depth(self) -> int:
        """0 for a root or an orphan."""
        return len(self.lasts)


class Tree(msgspec.Struct, frozen=True):
    """A trace in depth-first order, siblings by start: the roots with all below, then the orphans."""

    rows: tuple[Row, ...]

    @property
    def roots(self) -> tuple[Span, ...]:
        """Spans without a parent; a whole trace has one."""
        return tuple(row.span for row in self.rows if row.depth == 0 and not row.orphan)

    @property
    def orphans(self) -> tuple[Span, ...]:
        """Spans whose parent is missing; also one of each circle of spans that name each other as parent."""
        return tuple(row.span for row in self.rows if row.orphan)

    def children(self, span_id: str) -> tuple[Span, ...]:
        """The direct children of a span, by start."""
        return tuple(row.span for row in self.rows if row.depth > 0 and row.span.parent_id == span_id)


def build_tree(spans: Iterable[Span]) -> Tree:
    """The tree of one trace. Of two spans with one id the later counts; no parent links upset it."""
    known = {span.span_id: span for span in spans}
    children: dict[str | None, list[Span]] = defaultdict(list)
    for span in sorted(known.values(), key=_by_start):
        children[span.parent_id].append(span)
    rows: list[Row] = []
    left = dict(known)
    for root in children[None]:
        _descend(root, False, children, left, rows)
    heads = [span for span in known.values() if span.parent_id is not None and span.parent_id not in known]
    for head in sorted(heads, key=_by_start):
        _descend(head, True, children, left, rows)
    while left:  # only circles are left: cut each at its earliest span
        _descend(min(left.values(), key=_by_start), True, children, left, rows)
    return Tree(tuple(rows))


def _descend(
    head: Span,
    orphan: bool,
    children: dict[str | None, list[Span]],
    left: dict[str, Span],
    rows: list[Row],
) -> None:
    """Append the rows of `head` and all below it; a stack, not recursion, as depth is the sender's choice."""
    stack = [Row(head, (), orphan)]
    while stack:
        row = stack.pop()
        if left.pop(row.span.span_id, None) is None:
            continue
        rows.append(row)
        below: Sequence[Span] = [span for span in children.get(row.span.span_id, ()) if span.span_id in left]
        for span in reversed(below):
            stack.append(Row(span, (*row.lasts, span is below[-1]), False))


def _by_start(span: Span) -> tuple[int, int, str]:
    return span.start_ns, -span.end_ns, span.span_id


def sign(ns: int) -> str:
    """Of a time that is shown in microseconds at the finest: what rounds to none of them is not before."""
    return "-" if ns < -500 else "+"
