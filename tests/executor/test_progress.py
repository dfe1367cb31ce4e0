"""The progress bar on a terminal and elsewhere."""

from __future__ import annotations

import io

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
    assert drawn.endswith(f"\r[{'█' * 30}] weights 10.0 of 10.0 MiB\n")
    assert drawn.count("\r") == 2, "a burst of calls draws the first and the last"


def test_a_log_sees_few_lines() -> None:
    stream = io.StringIO()
    bar = ProgressBar(stream)
    for done in range(0, 1001):
        bar("weights", done, 1000)
    assert len(stream.getvalue().splitlines()) == 2
    assert "\r" not in stream.getvalue()
    assert stream.getvalue().endswith("(100%)\n")


def test_nothing_to_do_is_done() -> None:
    stream = io.StringIO()
    ProgressBar(stream)("weights", 0, 0)
    assert stream.getvalue().endswith("(100%)\n")
