"""The engine in an asyncio program: ``async for output in AsyncLLM(model).generate(prompt, params)``."""

import asyncio
import inspect
import itertools
import threading
from array import array
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, Final, Self

from penstock.local.offline.engine import LLMEngine
from penstock.local.offline.engine_thread import EngineThread, Submission
from penstock.local.offline.errors import EngineClosed, ExecutorError
from penstock.local.offline.outputs import RequestOutput
from penstock.local.offline.params import SamplingParams
from penstock.local.offline.stream import RequestStream
from penstock.service.text.encode import Tokenizer
from penstock.service.text.errors import Busy, PromptTooLong
from penstock.service.text.pool import EncodePool

MAX_WAITING: Final = 1024
"""Requests with the engine that have no output yet; further ones wait in their callers' tasks."""
CLOSE_S: Final = 30.0
_ENCODE_S: Final = 600.0


class AsyncLLM:
    """A model and its engine, which runs in a thread of its own. Use it in an ``async with``, or close it.

    It belongs to the event loop that it is first used in: elsewhere RuntimeError, but for ``close``. If that loop is
    closed while requests run, the engine ends. Once it has failed, every ``generate`` that waits and every later one
    raises ExecutorError; once it is closed, EngineClosed.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        """Takes what :class:`LLMEngine` takes; TypeError for what that does not know. Nothing is loaded yet."""
        inspect.signature(LLMEngine).bind(model, **settings)
        self._model, self._settings = model, settings
        self._starting = threading.Lock()
        self._thread: EngineThread | None = None
        self._closed = False
        self._encoding = EncodePool(queue_limit=2 * MAX_WAITING, max_wait_seconds=_ENCODE_S)
        self._room = asyncio.Semaphore(MAX_WAITING)
        self._requests: dict[str, _Request] = {}
        """Those that are being read, by the caller's id."""
        self._count = 0

    async def start(self) -> None:
        """Load the model, in the engine's thread; the first ``generate`` would do it otherwise. Idempotent.

        Raises ExecutorError with one line if it cannot be loaded.
        """
        await _loaded(self._use())

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        delta: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue a prompt, text or token ids: its output so far, whenever there is more; the last one is finished.

        ``delta``: each has only the text and the ids that the one before did not have. What a slow reader has not taken
        is merged into one. An output is the reader's own and does not change. To leave early, by ``break``, ``aclose``
        or cancellation, aborts the request. ``request_id``: for ``abort``; None: drawn.

        Raises, for the first output, ValueError for an id that is taken and for a prompt that does not fit, TypeError
        for params of another kind; at any time ExecutorError.
        """
        thread = self._use()
        request = self._enter(request_id, SamplingParams() if params is None else params)
        try:
            async with self._room:
                await self._submit(thread, request, prompt)
                await request.stream.arrived.wait()
            finished = False
            while not finished:
                output = await request.stream.next(delta=delta)
                finished = output.finished
                yield output
        finally:
            del self._requests[request.stream.request_id]
            thread.leave(request.key)

    async def abort(self, request_id: str) -> None:
        """End a request: its reader's last output has what was made, with ``finish_reason`` "abort".

        An unknown one is ignored.
        """
        thread = self._bound()
        request = self._requests.get(request_id)
        if thread is not None and request is not None:
            request.aborted = True
            thread.abort(request.key)

    @property
    def is_running(self) -> bool:
        """Whether the model is loaded and the engine has neither failed nor been closed."""
        return self._thread is not None and self._thread.is_running

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None: the model's folder has none. Raises ExecutorError if the model is not loaded."""
        if self._thread is None or not self._thread.loaded.done():
            raise ExecutorError("the model is not loaded yet")
        return self._thread.loaded.result().tokenizer

    async def close(self) -> None:
        """End every ``generate`` with EngineClosed, then the engine and its thread. Idempotent; any loop may call it.

        Raises ExecutorError if they do not end within 30 s: a step or a model that is being loaded cannot be cut short.
        """
        with self._starting:
            self._closed = True
        self._encoding.close()
        if self._thread is None:
            return
        self._thread.stop()
        try:
            async with asyncio.timeout(CLOSE_S):
                await asyncio.wrap_future(self._thread.ended)
        except TimeoutError:
            raise ExecutorError(f"the engine's thread did not end within {CLOSE_S:.0f} s") from None
        self._thread.join()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except asyncio.CancelledError:  # the model is let go as soon as it is loaded
            self._closed = True
            if self._thread is not None:
                self._thread.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---- the engine ----

    def _bound(self) -> EngineThread | None:
        """The thread, if there is one. Raises RuntimeError in a loop that is not its own."""
        thread = self._thread
        if thread is not None and thread.loop is not asyncio.get_running_loop():
            raise RuntimeError("this AsyncLLM belongs to the event loop that it was first used in: make one for each")
        return thread

    def _use(self) -> EngineThread:
        """The thread, begun if need be. Raises why nothing is computed any more."""
        with self._starting:
            if self._thread is None:
                if self._closed:
                    raise EngineClosed("the engine was closed")
                self._thread = EngineThread(asyncio.get_running_loop(), self._model, self._settings)
            thread = self._bound() or self._thread
        thread.check()
        return thread

    # ---- requests ----

    def _enter(self, request_id: str | None, params: SamplingParams) -> "_Request":
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, not {params!r:.60}")
        name = self._draw_id() if request_id is None else request_id
        if name in self._requests:
            raise ValueError(f"request {name!r} is there already")
        self._count += 1
        request = _Request(str(self._count), params, RequestStream(name, params.n))
        self._requests[name] = request
        return request

    def _draw_id(self) -> str:
        return next(
            name for number in itertools.count(self._count) if (name := f"generate-{number}") not in self._requests
        )

    async def _submit(self, thread: EngineThread, request: "_Request", prompt: str | Sequence[int]) -> None:
        ids = await self._encode(await _loaded(thread), prompt)
        text = prompt if isinstance(prompt, str) else None
        thread.submit(Submission(request.key, text, ids, request.params, request.stream))
        if request.aborted:
            thread.abort(request.key)

    async def _encode(self, engine: LLMEngine, prompt: str | Sequence[int]) -> "array[int]":
        """Long texts are encoded in other threads: neither the loop nor the engine waits for one."""
        if not isinstance(prompt, str) or engine.tokenizer is None:
            return engine.encode(prompt)
        try:
            room = engine.info.max_model_tokens
            return engine.encode(await self._encoding.encode(engine.tokenizer, prompt, max_tokens=room))
        except PromptTooLong as error:
            raise ValueError(str(error)) from error
        except Busy as error:  # not full: MAX_WAITING leaves it room, so it was closed
            raise EngineClosed("the engine was closed") from error


class _Request:
    """One that is being read."""

    __slots__ = ("aborted", "key", "params", "stream")

    def __init__(self, key: str, params: SamplingParams, stream: RequestStream) -> None:
        self.key, self.params, self.stream = key, params, stream
        self.aborted = False
        """Perhaps before the engine knows it."""


async def _loaded(thread: EngineThread) -> LLMEngine:
    if not thread.loaded.done():
        await asyncio.wrap_future(thread.loaded)
    return thread.loaded.result()
