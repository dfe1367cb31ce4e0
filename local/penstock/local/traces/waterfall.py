"""A trace drawn for the terminal: who called whom, in which process, when and for how long."""

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from penstock.local.traces.spans import Attribute, Row, Span, SpanEvent, build_tree, sign

_MIN_WIDTH = 72
_NAME_SHARE = 0.45
_TIME_CELLS = 9
_MIN_BAR_CELLS = 10
_PREFIX = "penstock-"
_QUIET_ATTRIBUTES = ("rpc.", "server.", "network.", "client.address", "thread.", "process.", "service.")
_PROCESS_COLOURS = (36, 32, 35, 34, 33, 96, 92, 95)
_RED, _DIM, _BOLD = 31, 2, 1


class _Glyphs(msgspec.Struct, frozen=True):
    branch: str
    last: str
    pipe: str
    bar: str
    tick: str
    event: str
    error: str
    cut: str
    micro: str
    dot: str


_UNICODE = _Glyphs("├ ", "└ ", "│ ", "█", "▏", "◆", "✗", "…", "µs", "·")
_ASCII = _Glyphs("|-", "`-", "| ", "=", "|", "*", "!", "~", "us", "-")


def draw(spans: Sequence[Span], width: int, colour: bool, *, ascii_only: bool = False) -> str:
    """The waterfall of one trace, without a final newline; lines are at most `width` cells (72 at least).

    Bars share one scale from the earliest start to the latest end; marks on them are events. Control
    characters that a sender put into names or values are replaced.
    """
    if not spans:
        return "no spans"
    return _Drawing(spans, max(width, _MIN_WIDTH), colour, _ASCII if ascii_only else _UNICODE).text()


class _Drawing:
    def __init__(self, spans: Sequence[Span], width: int, colour: bool, glyphs: _Glyphs) -> None:
        self._tree = build_tree(spans)
        self._width = width
        self._colour = colour
        self._glyphs = glyphs
        self._start_ns = min(span.start_ns for span in spans)
        self._total_ns = max(span.start_ns + span.duration_ns for span in spans) - self._start_ns
        processes = list(dict.fromkeys(self._process(row.span) for row in self._tree.rows))
        self._colour_of = {name: _PROCESS_COLOURS[i % len(_PROCESS_COLOURS)] for i, name in enumerate(processes)}
        longest = max(len(self._title(row)) for row in self._tree.rows)
        self._name_cells = min(longest, int(width * _NAME_SHARE))
        fixed = self._name_cells + 2 * _TIME_CELLS + 4
        self._process_cells = min(max(map(len, processes)), max(8, width - fixed - _MIN_BAR_CELLS))
        self._bar_cells = max(0, width - fixed - self._process_cells)

    def text(self) -> str:
        lines = [*self._header(), ""]
        announced = False
        for row in self._tree.rows:
            if row.orphan and not announced:
                lines += ["", self._paint("spans whose parent was not received:", _RED)]
                announced = True
            lines.append(self._bar_line(row))
            lines += self._notes(row)
        return "\n".join(line.rstrip() for line in lines)

    def _header(self) -> list[str]:
        rows = self._tree.rows
        facts = [
            f"trace {rows[0].span.trace_id}",
            _count(len(rows), "span"),
            _count(len(self._colour_of), "process", "processes"),
            self._duration(self._total_ns),
            datetime.fromtimestamp(self._start_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        ]
        line = facts[0]
        for fact in facts[1:]:
            longer = f"{line}  {self._glyphs.dot}  {fact}"
            line = longer if len(longer) <= self._width else line
        return [self._paint(line, _BOLD)]

    def _bar_line(self, row: Row) -> str:
        span = row.span
        process = self._process(span)
        tint = _RED if span.status == "error" else self._colour_of[process]
        cells = [
            self._fit(self._title(row), self._name_cells).ljust(self._name_cells),
            self._paint(self._fit(process, self._process_cells).ljust(self._process_cells), tint),
            self._duration(span.start_ns - self._start_ns).rjust(_TIME_CELLS),
            self._duration(span.duration_ns).rjust(_TIME_CELLS),
            self._paint(self._bar(span), tint),
        ]
        return " ".join(cells)

    def _bar(self, span: Span) -> str:
        first = self._cell(span.start_ns)
        last = max(first, self._cell(span.start_ns + span.duration_ns - 1))
        length = (span.duration_ns * self._bar_cells) / max(1, self._total_ns)
        body = self._glyphs.bar * (last - first + 1) if length >= 0.5 else self._glyphs.tick
        cells = list((" " * first + body).ljust(self._bar_cells)[: self._bar_cells])
        for event in span.events:
            if cells:
                cells[self._cell(event.unix_ns)] = self._glyphs.event
        return "".join(cells).rstrip()

    def _cell(self, unix_ns: int) -> int:
        """The cell of the bar in which a moment lies; moments outside the trace go to its ends."""
        offset = (unix_ns - self._start_ns) * self._bar_cells // max(1, self._total_ns)
        return min(max(0, offset), max(0, self._bar_cells - 1))

    def _notes(self, row: Row) -> list[str]:
        """Below a span: its error, its attributes, its events, in a paler shade."""
        span = row.span
        indent = self._below(row) + "  "
        notes: list[str] = []
        if span.status == "error":
            notes.append(f"{self._glyphs.error} {self._clean(span.status_message) or 'error'}")
        about = self._pairs({k: v for k, v in span.attributes.items() if not k.startswith(_QUIET_ATTRIBUTES)})
        if span.links:
            about = f"{about}  linked to {_count(len(span.links), 'span')}".strip()
        if about:
            notes.append(about)
        notes += [self._event(span, event) for event in sorted(span.events, key=lambda event: event.unix_ns)]
        return [self._paint(self._fit(indent + note, self._width), _DIM) for note in notes]

    def _event(self, span: Span, event: SpanEvent) -> str:
        since = event.unix_ns - span.start_ns
        when = f"{sign(since)}{self._duration(abs(since))}"
        return f"{self._glyphs.event} {self._clean(event.name)} {when}  {self._pairs(event.attributes)}".rstrip()

    def _pairs(self, attributes: dict[str, Attribute]) -> str:
        return "  ".join(f"{self._clean(key)}={self._value(value)}" for key, value in attributes.items())

    def _value(self, value: Attribute) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, float):
            return f"{value:.4g}"
        return self._clean(",".join(map(str, value)) if isinstance(value, list) else str(value))

    def _title(self, row: Row) -> str:
        guides = [self._guide(last) for last in row.lasts[:-1]]
        own = [(self._glyphs.last if row.lasts[-1] else self._glyphs.branch)] if row.lasts else []
        return "".join(guides + own) + self._clean(row.span.name)

    def _below(self, row: Row) -> str:
        return "".join(self._guide(last) for last in row.lasts)

    def _guide(self, last: bool) -> str:
        return "  " if last else self._glyphs.pipe

    def _process(self, span: Span) -> str:
        name = self._clean(span.service.removeprefix(_PREFIX))
        return name if span.pid is None else f"{name} {span.pid}"

    def _duration(self, ns: int) -> str:
        if abs(ns) >= 10**9:
            return f"{ns / 1e9:.2f} s"
        if abs(ns) >= 10**8:
            return f"{ns / 1e6:.0f} ms"
        if abs(ns) >= 10**6:
            return f"{ns / 1e6:.1f} ms"
        return f"{ns / 1e3:.0f} {self._glyphs.micro}"

    def _fit(self, text: str, cells: int) -> str:
        return text if len(text) <= cells else text[: max(0, cells - 1)] + self._glyphs.cut

    def _clean(self, text: str) -> str:
        safe = "".join(char if char.isprintable() else "?" for char in text)
        return safe.encode("ascii", "replace").decode() if self._glyphs is _ASCII else safe

    def _paint(self, text: str, code: int) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and text.strip() else text


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
