"""A progress bar on stderr; a few plain lines where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 30
REDRAW_SECONDS = 0.1
LINE_SECONDS = 5.0


class ProgressBar:
    """Call it with a stage's name, bytes done and bytes in all, as often as you like, from one thread."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """``stream`` is stderr unless given."""
        self._stream = sys.stderr if stream is None else stream
        self._interval = REDRAW_SECONDS if self._stream.isatty() else LINE_SECONDS
        self._drawn_at = -float("inf")

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Draw, unless something was drawn a moment ago and this is not the end."""
        now, ended = time.monotonic(), done >= total
        if not ended and now - self._drawn_at < self._interval:
            return
        self._drawn_at = now
        share = done / total if total else 1.0
        text = f"{stage} {done / 2**20:.1f} of {total / 2**20:.1f} MiB"
        if self._stream.isatty():
            filled = round(share * WIDTH)
            self._stream.write(f"\r[{'█' * filled}{' ' * (WIDTH - filled)}] {text}" + ("\n" if ended else ""))
        else:
            self._stream.write(f"{text} ({share:.0%})\n")
        self._stream.flush()
