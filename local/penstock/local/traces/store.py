"""The latest traces, in bounded memory."""

from collections import OrderedDict

import msgspec

from penstock.local.traces.spans import Span


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One line about a trace."""

    trace_id: str
    root: str
    """Name of the root, or of the earliest span where the root has not arrived."""
    spans: int
    complete: bool
    start_ns: int
    end_ns: int


class _Trace:
    def __init__(self) -> None:
        self.spans: dict[str, tuple[Span, int]] = {}
        self.size_bytes = 0

    def add(self, span: Span, size_bytes: int) -> None:
        self.drop(span.span_id)  # an exporter that retries sends a span twice
        self.spans[span.span_id] = (span, size_bytes)
        self.size_bytes += size_bytes

    def drop(self, span_id: str) -> None:
        _, size_bytes = self.spans.pop(span_id, (None, 0))
        self.size_bytes -= size_bytes

    def is_complete(self) -> bool:
        spans = [span for span, _ in self.spans.values()]
        rooted = any(span.parent_id is None and span.kind in ("client", "server") for span in spans)
        return rooted and all(span.parent_id is None or span.parent_id in self.spans for span in spans)

    def summary(self, trace_id: str) -> Summary:
        spans = [span for span, _ in self.spans.values()]
        first = min(spans, key=lambda span: (span.parent_id is not None, span.start_ns))
        return Summary(
            trace_id=trace_id,
            root=first.name,
            spans=len(spans),
            complete=self.is_complete(),
            start_ns=min(span.start_ns for span in spans),
            end_ns=max(span.end_ns for span in spans),
        )


class TraceStore:
    """Keeps the newest traces, by the arrival of their first span; beyond any bound the oldest goes first.

    A trace is *complete* when it has a root of kind client or server (a request) and no span lacks its
    parent. Later spans may still arrive: completeness is what can be seen, not a promise.
    """

    def __init__(self, max_traces: int = 512, max_spans_per_trace: int = 4096, max_bytes: int = 64 << 20) -> None:
        if min(max_traces, max_spans_per_trace, max_bytes) < 1:
            raise ValueError("the bounds of a trace store must be positive")
        self._max_traces = max_traces
        self._max_spans = max_spans_per_trace
        self._max_bytes = max_bytes
        self._traces: OrderedDict[str, _Trace] = OrderedDict()
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._traces)

    @property
    def size_bytes(self) -> int:
        """The sum of the sizes that `add` was told."""
        return self._size_bytes

    def add(self, span: Span, size_bytes: int) -> None:
        """Keep a span; `size_bytes` is what it counts against the bound."""
        trace = self._traces.setdefault(span.trace_id, _Trace())
        before = trace.size_bytes
        trace.add(span, size_bytes)
        if len(trace.spans) > self._max_spans:
            trace.drop(next(iter(trace.spans)))
        self._size_bytes += trace.size_bytes - before
        while len(self._traces) > self._max_traces or self._size_bytes > self._max_bytes:
            _, oldest = self._traces.popitem(last=False)
            self._size_bytes -= oldest.size_bytes

    def get(self, trace_id: str) -> tuple[Span, ...] | None:
        """The spans of a trace in order of arrival, or None if it is not (or no longer) here."""
        trace = self._traces.get(trace_id)
        return None if trace is None else tuple(span for span, _ in trace.spans.values())

    def latest(self) -> tuple[Span, ...] | None:
        """The newest complete trace; failing that, the newest at all; None where there is none."""
        for trace_id in reversed(self._traces):
            if self._traces[trace_id].is_complete():
                return self.get(trace_id)
        return self.get(next(reversed(self._traces))) if self._traces else None

    def recent(self, limit: int) -> list[Summary]:
        """At most `limit` traces, the newest first."""
        newest = [trace_id for trace_id, _ in zip(reversed(self._traces), range(limit), strict=False)]
        return [self._traces[trace_id].summary(trace_id) for trace_id in newest]
