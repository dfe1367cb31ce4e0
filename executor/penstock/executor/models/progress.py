"""What a start tells on stderr: a progress bar, a few plain lines where that is no terminal; and what took how long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import Final, TextIO

WIDTH = 30
REDRAW_SECONDS = 0.1
LINE_SECONDS = 5.0
STAGES: Final = {
    "device": "device",
    "parameters": "parameters allocated",
    "weights": "weights loaded beside the rest",
    "products": "matrix products compared",
    "attention": "attention kernels imported",
    "profile": "a full step measured",
    "pages": "pages",
    "warm_up": "kernels launched",
    "graphs": "graphs captured",
    "waiting": "then waiting for weights",
}
"""Of :attr:`penstock.executor.step.ModelInfo.startup_ms`, in the order of a start."""


class ProgressBar:
    """Call it with a stage's name, what is done and what there is to do, as often as you like, from any thread.

    Of weights that is bytes.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """``stream`` is stderr unless given."""
        self._stream = sys.stderr if stream is None else stream
        self._interval = REDRAW_SECONDS if self._stream.isatty() else LINE_SECONDS
        self._drawn_at = -float("inf")
        self._drawing = threading.Lock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Draw, unless something was drawn a moment ago and this is not the end."""
        with self._drawing:
            now, ended = time.monotonic(), done >= total
            if not ended and now - self._drawn_at < self._interval:
                return
            self._drawn_at = now
            self._draw(told(stage, done, total), done / total if total else 1.0, ended)

    def _draw(self, text: str, share: float, ended: bool) -> None:
        if self._stream.isatty():
            filled = round(share * WIDTH)
            # What another stage has drawn may have been longer.
            line = f"\r\x1b[K[{'█' * filled}{' ' * (WIDTH - filled)}] {text}"
            self._stream.write(line + ("\n" if ended else ""))
        else:
            self._stream.write(f"{text} ({share:.0%})\n")
        self._stream.flush()

    def started(self, seconds: float, stages: Mapping[str, int]) -> None:
        """Tell how long a start took, and of that each stage, ``stages`` in milliseconds."""
        parts = [f"{text} {stages[name] / 1000:.1f}" for name, text in STAGES.items() if stages.get(name, 0) >= 50]
        with self._drawing:
            self._stream.write(f"ready in {seconds:.1f} s" + (f": {', '.join(parts)}" if parts else "") + "\n")
            self._stream.flush()


def told(stage: str, done: int, total: int) -> str:
    """How far a stage is, in words."""
    if stage == "weights":
        return f"{stage} {done / 2**20:.1f} of {total / 2**20:.1f} MiB"
    return f"{stage} {done} of {total}"
