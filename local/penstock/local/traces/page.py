"""A trace as a page that stands alone: no script, nothing fetched."""

import html
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from penstock.local.traces.spans import Attribute, Row, Span, build_tree, sign

_COLOURS: Final = ("#3b76c4", "#3c9a5f", "#b5683a", "#8a5bb5", "#b23f57", "#5a7d8c", "#a08a2e", "#3aa0a0")
_STYLE: Final = """\
body { font: 13px system-ui, sans-serif; margin: 2em; color: #222; }
table { border-collapse: collapse; width: 100%; }
td { padding: 1px 6px; vertical-align: top; white-space: nowrap; }
td.bar { width: 55%; position: relative; }
.track { position: relative; height: 13px; background: #f2f2f2; }
.track i { position: absolute; top: 1px; bottom: 1px; min-width: 2px; border-radius: 2px; }
.track b { position: absolute; top: -2px; color: #c22; font-size: 11px; }
summary { cursor: pointer; } details dl { margin: 2px 0 6px 14px; display: grid; grid-template-columns: auto 1fr; }
dt { color: #777; padding-right: 8px; } dd { margin: 0; white-space: normal; overflow-wrap: anywhere; }
.pid { color: #777; } .error { color: #c22; }
"""


def render(spans: Sequence[Span]) -> str:
    """One trace as HTML. Times are relative to its start; a click on a span opens its attributes and events."""
    rows = build_tree(spans).rows
    start = min(span.start_ns for span in spans)
    total = max(1, max(span.start_ns + span.duration_ns for span in spans) - start)
    processes = list(dict.fromkeys(_process(row.span) for row in rows))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(processes)}
    when = datetime.fromtimestamp(start / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    title = f"trace {rows[0].span.trace_id}"
    facts = f"{len(rows)} spans · {len(processes)} processes · {_duration(total)} · {when}"
    body = "\n".join(_row(row, start, total, colours[_process(row.span)]) for row in rows)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>\n{_STYLE}</style>\n<h1>{html.escape(title)}</h1>\n<p>{facts}</p>\n<table>\n{body}\n</table></html>\n"
    )


def _process(span: Span) -> str:
    return f"{span.service} {span.pid or ''}".strip()


def _row(row: Row, start: int, total: int, colour: str) -> str:
    span = row.span
    left = 100 * (span.start_ns - start) / total
    bar = f'<i style="left:{left:.3f}%;width:{100 * span.duration_ns / total:.3f}%;background:{colour}"></i>'
    marks = "".join(
        f'<b style="left:{100 * (event.unix_ns - start) / total:.3f}%" title="{html.escape(event.name)}">◆</b>'
        for event in span.events
    )
    error = ' class="error"' if span.status == "error" else ""
    return (
        f'<tr><td style="padding-left:{14 * row.depth}px"><details><summary{error}>{html.escape(span.name)}</summary>'
        f"{_facts(span, start)}</details></td>"
        f'<td class="pid" style="color:{colour}">{html.escape(_process(span))}</td>'
        f"<td>{_duration(span.start_ns - start)}</td><td>{_duration(span.duration_ns)}</td>"
        f'<td class="bar"><div class="track">{bar}{marks}</div></td></tr>'
    )


def _facts(span: Span, start: int) -> str:
    pairs = [(key, _value(value)) for key, value in span.attributes.items()]
    for event in span.events:
        more = " ".join(f"{key}={_value(value)}" for key, value in event.attributes.items())
        since = event.unix_ns - start
        pairs.append((f"◆ {event.name}", f"{sign(since)}{_duration(abs(since))} {more}"))
    if span.status_message:
        pairs.append(("status", span.status_message))
    items = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in pairs)
    return f"<dl>{items}</dl>"


def _value(value: Attribute) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _duration(ns: int) -> str:
    if abs(ns) >= 10**9:
        return f"{ns / 1e9:.3f} s"
    return f"{ns / 1e6:.2f} ms" if abs(ns) >= 10**6 else f"{ns / 1e3:.0f} µs"
