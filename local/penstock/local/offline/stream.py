"""The output of one request on its way from the engine's thread to the task that reads it."""

import asyncio
import threading
from dataclasses import replace
from typing import Final

from penstock.local.offline.outputs import CompletionOutput, RequestOutput


class RequestStream:
    """One writer, the engine's thread; one reader, a task of an event loop.

    What the reader has not taken is merged: however slow it is, no more is kept than the request's own output. What it
    takes is its own, and nobody changes it later; only the list of prompt ids is the same one every time.
    """

    __slots__ = ("_ended", "_failure", "_fresh", "_latest", "_lock", "_whole", "_written", "arrived", "request_id")

    def __init__(self, request_id: str, samples: int) -> None:
        """``samples``: how many continuations it has."""
        self.request_id: Final = request_id
        self.arrived: Final = asyncio.Event()
        """There may be something to take. The loop alone touches it."""
        self._lock = threading.Lock()
        self._fresh = _blank(samples)
        self._latest: RequestOutput | None = None
        """All but the continuations, which are empty; None: there is nothing to take."""
        self._failure: Exception | None = None
        self._ended = False
        self._written = [(0, 0)] * samples
        """Characters and ids of each continuation that were put. The writer's own."""
        self._whole = _blank(samples)
        """All that was taken. The reader's own."""

    # ---- the writer ----

    def put(self, request: RequestOutput) -> bool:
        """Take over what the engine's own, growing object has that was not put before; whether that is anything."""
        with self._lock:
            news = [self._put(index, made) for index, made in enumerate(request.outputs)]
            if not any(news):
                return False
            self._latest = replace(request, request_id=self.request_id, outputs=[])
            self._ended = request.finished
            return True

    def _put(self, index: int, made: CompletionOutput) -> bool:
        chars, ids = self._written[index]
        more = replace(made, text=made.text[chars:], token_ids=made.token_ids[ids:])
        if not (more.text or more.token_ids or more.finish_reason != self._fresh[index].finish_reason):
            return False
        self._written[index] = (len(made.text), len(made.token_ids))
        _append(self._fresh[index], more)
        return True

    def fail(self, failure: Exception) -> None:
        """Raise this in the reader, unless its output is complete. Any thread may call it."""
        with self._lock:
            if not self._ended and self._failure is None:
                self._failure = failure

    # ---- the reader ----

    async def next(self, *, delta: bool) -> RequestOutput:
        """Wait for something new. The output so far, or, with ``delta``, text and ids of it that are new.

        Raises what ``fail`` was given. Not to be called after the output that is finished.
        """
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            fresh = self._take()
            if fresh is None:  # an earlier look has had it
                continue
            for whole, more in zip(self._whole, fresh.outputs, strict=True):
                _append(whole, more)
            return fresh if delta else replace(fresh, outputs=[_copy(whole) for whole in self._whole])

    def _take(self) -> RequestOutput | None:
        with self._lock:
            if self._failure is not None:
                raise self._failure
            latest, self._latest = self._latest, None
            if latest is None:
                return None
            fresh = self._fresh
            self._fresh = [replace(made, text="", token_ids=[]) for made in fresh]
            return replace(latest, outputs=fresh)


def _blank(samples: int) -> list[CompletionOutput]:
    return [CompletionOutput(index) for index in range(samples)]


def _append(output: CompletionOutput, more: CompletionOutput) -> None:
    output.text += more.text
    output.token_ids += more.token_ids
    output.finish_reason, output.stop_reason, output.error = more.finish_reason, more.stop_reason, more.error


def _copy(output: CompletionOutput) -> CompletionOutput:
    return replace(output, token_ids=output.token_ids.copy())
