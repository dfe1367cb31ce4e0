"""Structured logs: one JSON object a line on stderr.

Every line has `timestamp` (ISO 8601, UTC), `level`, `event`, `role`, `pid` and `source`, and `trace_id` and
`span_id` while a span is current. Lines of libraries that use the standard `logging` take the same form.
This module needs structlog and the standard library alone; OpenTelemetry is consulted only where the
process has loaded it already.
"""

import json as stdlib_json
import logging as stdlib_logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from penstock.telemetry.redaction import redact

__all__ = ["Level", "configure", "get_logger"]

Level = Literal["debug", "info", "warning", "error"]

_LEADING = ("timestamp", "level", "event", "role", "pid", "source")
_LEVELS: dict[str, int] = {
    "debug": stdlib_logging.DEBUG,
    "info": stdlib_logging.INFO,
    "warning": stdlib_logging.WARNING,
    "error": stdlib_logging.ERROR,
}


def configure(role: str, level: str = "info", json: bool = True) -> None:
    """Set up logging for this process; called once, by its main. A second call replaces the first.

    `role` names the process in every line. Lines below `level` cost almost nothing. With `json=False`
    the lines are for a person to read. Raises ValueError for an unknown level.
    """
    if level not in _LEVELS:
        raise ValueError(f"unknown log level {level!r}: expected one of {', '.join(_LEVELS)}")
    shared = _shared_processors(role)
    rendering = _rendering(json)
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: structlog.WriteLogger(_Stderr()),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
    _adopt_standard_logging(shared, rendering, _LEVELS[level])


def get_logger(name: str) -> FilteringBoundLogger:
    """The logger of a module. It may be made before `configure` is called; it follows the latest one."""
    return cast(FilteringBoundLogger, structlog.get_logger(source=name))


class _Stderr:
    """The current `sys.stderr`; a reader that went away does not end the process that logs."""

    def write(self, line: str) -> int:
        try:
            return sys.stderr.write(line)
        except (OSError, ValueError):  # a broken pipe, a closed file
            return 0

    def flush(self) -> None:
        try:
            sys.stderr.flush()
        except (OSError, ValueError):
            return


def _shared_processors(role: str) -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _Identity(role),
        _add_trace,
        _drop_forbidden,
        _leading_first,
    ]


def _rendering(json: bool) -> list[Processor]:
    """The last processors. Tracebacks are rendered without local variables, which hold prompts and keys."""
    if json:
        to_line = structlog.processors.JSONRenderer(serializer=stdlib_json.dumps, default=_opaque)
        return [structlog.processors.format_exc_info, to_line]
    return [
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
    ]


def _adopt_standard_logging(shared: Sequence[Processor], rendering: Sequence[Processor], level: int) -> None:
    """Give the lines of other libraries the same form; theirs are kept from WARNING upwards."""
    handler = stdlib_logging.StreamHandler(_Stderr())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_add_source, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = stdlib_logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(level, stdlib_logging.WARNING))


class _Identity:
    """Adds which process speaks."""

    def __init__(self, role: str) -> None:
        self._role = role

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        event["role"] = self._role
        event["pid"] = os.getpid()
        return event


def _add_source(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    event["source"] = event["_record"].name
    return event


def _add_trace(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return event
    context = api.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
        event["span_id"] = f"{context.span_id:016x}"
    return event


def _drop_forbidden(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    kept, dropped = redact(event)
    if dropped:
        kept["redacted"] = sorted(dropped)
    return kept


def _leading_first(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return {**{name: event.pop(name) for name in _LEADING if name in event}, **event}


def _opaque(value: object) -> str:
    """What stands for a value that JSON does not know: never its repr, which may show what it holds."""
    return str(value) if isinstance(value, Path) else f"<{type(value).__name__}>"
