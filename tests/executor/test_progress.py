"""The progress bar on a terminal and elsewhere."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

from penstock.executor.models.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_one_bar_that_ends_with_a_line() -> None:
    stream = Terminal()
    bar = ProgressBar(stream)
    for done in range(0, 11):
        bar("weights", done * 2**20, 10 * 2**20)
    drawn = stream.getvalue()
    assert drawn.count("\n") == 1
    assert drawn.endswith(f"\r\x1b[K[{'█' * 30}] weights 10.0 of 10.0 MiB\n")
    assert drawn.count("\r") == 2, "a burst of calls draws the first and the last"


def test_a_log_sees_few_lines() -> None:
    stream = io.StringIO()
    bar = ProgressBar(stream)
    for done in range(0, 1001):
        bar("weights", done, 1000)
    assert len(stream.getvalue().splitlines()) == 2
    assert "\r" not in stream.getvalue()
    assert stream.getvalue().endswith("(100%)\n")


def test_only_weights_are_bytes() -> None:
    stream = io.StringIO()
    ProgressBar(stream)("graphs", 7, 7)
    assert stream.getvalue() == "graphs 7 of 7 (100%)\n"


def test_any_thread_may_call() -> None:
    stream = io.StringIO()
    bar = ProgressBar(stream)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda stage: bar(stage, 1, 1), ["weights", "graphs"] * 200))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 400
    assert set(lines) == {"weights 0.0 of 0.0 MiB (100%)", "graphs 1 of 1 (100%)"}


def test_what_a_start_took() -> None:
    stream = io.StringIO()
    ProgressBar(stream).started(9.96, {"weights": 5780, "graphs": 1349, "pages": 12, "waiting": 0})
    assert stream.getvalue() == "ready in 10.0 s: weights loaded beside the rest 5.8, graphs captured 1.3\n"
    stream = io.StringIO()
    ProgressBar(stream).started(0.2, {})
    assert stream.getvalue() == "ready in 0.2 s\n"


def test_nothing_to_do_is_done() -> None:
    stream = io.StringIO()
    ProgressBar(stream)("weights", 0, 0)
    assert stream.getvalue().endswith("(100%)\n")
