import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.local.traces.spans import Kind, Span, build_tree
from penstock.local.traces.store import TraceStore

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


TRACE = "a" * 32


def span(span_id: str, parent: str | None, start: int = 0, *, trace: str = TRACE, kind: Kind = "internal") -> Span:
    return Span(
        trace_id=trace,
        span_id=span_id,
        parent_id=parent,
        name=span_id,
        start_ns=start,
        end_ns=start + 10,
        kind=kind,
    )


def outline(spans: list[Span]) -> list[tuple[str, int, bool]]:
    return [(row.span.span_id, row.depth, row.orphan) for row in build_tree(spans).rows]


def test_children_stand_below_their_parent_by_start() -> None:
    spans = [span("c", "a", 5), span("d", "b", 3), span("b", "a", 1), span("a", None, 0)]
    assert outline(spans) == [("a", 0, False), ("b", 1, False), ("d", 2, False), ("c", 1, False)]
    tree = build_tree(spans)
    assert [child.span_id for child in tree.children("a")] == ["b", "c"]
    assert [row.lasts for row in tree.rows] == [(), (False,), (False, True), (True,)]
    assert [root.span_id for root in tree.roots] == ["a"]
    assert tree.orphans == ()


def test_several_roots_and_orphans() -> None:
    spans = [span("lost", "nowhere", 0), span("below", "lost", 1), span("r2", None, 9), span("r1", None, 2)]
    assert outline(spans) == [("r1", 0, False), ("r2", 0, False), ("lost", 0, True), ("below", 1, False)]
    assert [orphan.span_id for orphan in build_tree(spans).orphans] == ["lost"]


def test_circles_and_repeats_are_survived() -> None:
    spans = [span("a", "c", 2), span("b", "a", 1), span("c", "b", 3), span("self", "self"), span("b", "a", 1)]
    assert outline(spans) == [("self", 0, True), ("b", 0, True), ("c", 1, False), ("a", 2, False)]


def test_a_very_deep_trace() -> None:
    spans = [span(str(n), str(n - 1) if n else None, n) for n in range(2000)]
    assert build_tree(spans).rows[-1].depth == 1999


ids = st.sampled_from("abcdefgh")


@unhurried
@given(st.lists(st.builds(span, ids, st.none() | ids | st.just("missing"), st.integers(0, 5))))
def test_every_span_appears_exactly_once(spans: list[Span]) -> None:
    rows = build_tree(spans).rows
    assert sorted(row.span.span_id for row in rows) == sorted({span.span_id for span in spans})
    placed: list[str] = []
    for row in rows:
        del placed[row.depth :]
        if row.depth:
            assert row.span.parent_id == placed[-1]
        placed.append(row.span.span_id)


def fill(store: TraceStore, traces: int, spans: int = 1, size: int = 1) -> None:
    for trace in range(traces):
        for number in range(spans):
            store.add(span(f"{number}", None, number, trace=f"t{trace}", kind="server"), size)


def test_the_oldest_traces_go_first() -> None:
    store = TraceStore(max_traces=3)
    fill(store, 5)
    assert [summary.trace_id for summary in store.recent(10)] == ["t4", "t3", "t2"]
    assert store.get("t1") is None
    assert (len(store), store.size_bytes) == (3, 3)


def test_the_oldest_spans_of_a_trace_go_first() -> None:
    store = TraceStore(max_spans_per_trace=4)
    fill(store, 1, spans=10, size=7)
    kept = store.get("t0")
    assert kept is not None
    assert [span.span_id for span in kept] == ["6", "7", "8", "9"]
    assert store.size_bytes == 28


def test_bytes_are_bounded() -> None:
    store = TraceStore(max_bytes=100)
    fill(store, 10, spans=2, size=20)
    assert store.size_bytes == 80
    store.add(span("huge", None, trace="huge"), 101)
    assert (len(store), store.size_bytes) == (0, 0)


@unhurried
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 30)), max_size=60))
def test_the_account_never_drifts(arrivals: list[tuple[int, int, int]]) -> None:
    store = TraceStore(max_traces=3, max_spans_per_trace=2, max_bytes=60)
    sizes: dict[tuple[str, str], int] = {}
    for trace, number, size in arrivals:
        sizes[f"t{trace}", f"{number}"] = size
        store.add(span(f"{number}", None, trace=f"t{trace}"), size)
        kept = [held for summary in store.recent(9) for held in store.get(summary.trace_id) or ()]
        assert store.size_bytes == sum(sizes[held.trace_id, held.span_id] for held in kept) <= 60
        assert len(store) <= 3


def test_a_span_sent_twice_counts_once() -> None:
    store = TraceStore()
    fill(store, 1)
    fill(store, 1)
    kept = store.get("t0")
    assert kept is not None
    assert len(kept) == store.size_bytes == 1


def test_latest_prefers_the_newest_complete_request() -> None:
    store = TraceStore()
    assert store.latest() is None
    store.add(span("half", "missing", trace="t0"), 1)
    assert store.latest() == store.get("t0")
    store.add(span("root", None, trace="t1", kind="client"), 1)
    store.add(span("child", "root", trace="t1"), 1)
    store.add(span("step", None, trace="t2"), 1)  # a root, but not of a request
    store.add(span("server", "not here yet", trace="t3", kind="server"), 1)
    assert store.latest() == store.get("t1")
    assert [summary.complete for summary in store.recent(9)] == [False, False, True, False]
    assert store.recent(9)[2].root == "root"


@pytest.mark.parametrize("bound", ["max_traces", "max_spans_per_trace", "max_bytes"])
def test_bounds_must_be_positive(bound: str) -> None:
    with pytest.raises(ValueError, match="positive"):
        TraceStore(**{bound: 0})
