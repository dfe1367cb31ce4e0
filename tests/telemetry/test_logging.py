import io
import json
import logging as stdlib_logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext

from penstock.telemetry import logging
from penstock.telemetry.redaction import FORBIDDEN, is_forbidden


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    root = stdlib_logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_a_line_says_who_when_and_what(capsys: pytest.CaptureFixture[str]) -> None:
    early = logging.get_logger("early")  # made before configure, as modules do
    logging.configure("gate")
    early.info("session opened", session=7, path=Path("/x"))
    (line,) = lines(capsys)
    assert datetime.fromisoformat(str(line.pop("timestamp"))).utcoffset() == timedelta(0)
    assert line == {
        "event": "session opened",
        "level": "info",
        "role": "gate",
        "pid": os.getpid(),
        "source": "early",
        "session": 7,
        "path": "/x",
    }


def test_levels(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("gate", "warning")
    log = logging.get_logger("x")
    log.info("no")
    log.warning("yes")
    assert [line["event"] for line in lines(capsys)] == ["yes"]
    with pytest.raises(ValueError, match="unknown log level 'loud'"):
        logging.configure("gate", "loud")


@pytest.mark.parametrize("name", [*FORBIDDEN, "API-Key", "prompt_text", "stop_token_ids", "Authorization"])
def test_forbidden_fields_never_appear(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("service")
    log = logging.get_logger("x").bind(**{name: "SECRET"})
    log.info("a", request={"deep": {name: "SECRET", "fine": 1}})
    structlog.contextvars.bind_contextvars(**{name: "SECRET"})
    log.info("b")
    structlog.contextvars.clear_contextvars()
    logged = capsys.readouterr().err
    assert "SECRET" not in logged
    first, second = map(json.loads, logged.splitlines())
    assert first["redacted"] == sorted([name, f"request.deep.{name}"])
    assert first["request"] == {"deep": {"fine": 1}}
    assert second["redacted"] == [name]


@pytest.mark.parametrize("name", ["prompt_tokens", "keyboard", "span_id", "context", "outputs", "event"])
def test_innocent_names_stay(name: str) -> None:
    assert not is_forbidden(name)


def test_unknown_objects_and_locals_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    class Request:
        def __repr__(self) -> str:
            return "SECRET"

    logging.configure("service")
    log = logging.get_logger("x")
    log.info("got", request=Request(), several=[Request()])
    try:
        hidden = "SEC" + "RET"
        raise RuntimeError(f"of length {len(hidden)}")
    except RuntimeError:
        log.exception("failed")
    logged = capsys.readouterr().err
    assert "SECRET" not in logged
    assert json.loads(logged.splitlines()[0])["request"] == "<Request>"
    assert "RuntimeError: of length 6" in json.loads(logged.splitlines()[1])["exception"]


def test_trace_and_span_ids_of_the_current_span(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("service")
    with trace.use_span(NonRecordingSpan(SpanContext(0xA, 0xB, is_remote=False))):
        logging.get_logger("x").info("inside")
        stdlib_logging.getLogger("library").warning("also %s", "inside")
    logging.get_logger("x").info("outside")
    inside, library, outside = lines(capsys)
    assert (inside["trace_id"], inside["span_id"]) == (f"{0xA:032x}", f"{0xB:016x}")
    assert (library["trace_id"], library["event"]) == (f"{0xA:032x}", "also inside")
    assert "trace_id" not in outside


def test_other_libraries_speak_json_from_warning_upwards(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("service", "debug")
    stdlib_logging.getLogger("grpc").info("chatter")
    stdlib_logging.getLogger("grpc").error("broken")
    (line,) = lines(capsys)
    assert (line["source"], line["level"], line["role"]) == ("grpc", "error", "service")


def test_lines_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("service", json=False)
    logging.get_logger("x").info("ready", port=1, prompt="SECRET")
    logged = capsys.readouterr().err
    assert "ready" in logged
    assert "SECRET" not in logged
    assert not logged.startswith("{")


def test_a_reader_that_went_away_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    logging.configure("engine")
    monkeypatch.setattr(sys, "stderr", Broken())
    logging.get_logger("x").error("nobody hears this")
    stdlib_logging.getLogger("library").error("nor this")


def test_the_engine_can_log_without_grpc_and_opentelemetry() -> None:
    program = (
        "import sys\n"
        "from penstock.telemetry import logging\n"
        "logging.configure('engine')\n"
        "logging.get_logger('x').info('hello')\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'grpc', 'opentelemetry', 'google', 'torch'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert json.loads(done.stderr)["event"] == "hello"
