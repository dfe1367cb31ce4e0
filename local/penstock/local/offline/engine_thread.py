"""The one thread that loads an engine, steps it and closes it, for an event loop that must never wait for a step.

Commands cross to it under a lock: at most one submission and one abort for each request, whose number AsyncLLM bounds.
Outputs cross back through the requests' streams, and at most one wake of the loop is under way, however many steps end
before the loop comes to it. With nothing to compute the thread sleeps until there is a command.
"""

import asyncio
import threading
from array import array
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from penstock.local.offline.engine import LLMEngine
from penstock.local.offline.errors import EngineClosed, ExecutorError
from penstock.local.offline.outputs import RequestOutput
from penstock.local.offline.params import SamplingParams
from penstock.local.offline.stream import RequestStream


class Submission(NamedTuple):
    """A request for the engine."""

    key: str
    """Its id there. Never used again, so that the caller may use its own id as soon as it has left the request."""
    prompt: str | None
    """The text of the prompt, if it was one."""
    ids: "array[int]"
    params: SamplingParams
    stream: RequestStream


class _Commands(NamedTuple):
    submissions: list[Submission]
    aborts: list[str]


class EngineThread:
    """Its methods may be called from any thread; none waits but ``join``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, model: str | Path, settings: Mapping[str, Any]) -> None:
        """Start to load. ``loop``: of those who read; ``settings``: those of LLMEngine."""
        self.loop = loop
        self.loaded: Future[LLMEngine] = _pending()
        """Fails with what LLMEngine raises."""
        self.ended: Future[None] = _pending()
        """The executor is shut down; fails if it could not be."""
        self._model, self._settings = model, settings
        self._changed = threading.Condition()
        """Guards all that follows."""
        self._submissions: dict[str, Submission] = {}
        self._aborts: dict[str, None] = {}
        self._streams: dict[str, RequestStream] = {}
        """Of the requests that have not ended and whose readers have not left."""
        self._woken: dict[RequestStream, None] = {}
        self._wakes = False
        self._end: Exception | None = None
        """Why nothing is computed any more."""
        self._thread = threading.Thread(target=self._main, name="penstock-engine", daemon=True)
        self._thread.start()

    # ---- commands ----

    def submit(self, request: Submission) -> None:
        """Queue a request. Raises ExecutorError if nothing is computed any more."""
        with self._changed:
            self._check()
            self._submissions[request.key] = request
            self._streams[request.key] = request.stream
            self._changed.notify()

    def abort(self, key: str) -> None:
        """End a request, whose stream then ends with what there is; one that has ended is ignored."""
        with self._changed:
            if key in self._streams:
                self._aborts[key] = None
                self._changed.notify()

    def leave(self, key: str) -> None:
        """End a request that nobody reads any more; one that has ended is ignored."""
        with self._changed:
            known = self._streams.pop(key, None) is not None
            if known and self._submissions.pop(key, None) is None:
                self._aborts[key] = None
                self._changed.notify()

    def stop(self) -> None:
        """Fail all that runs or loads with EngineClosed, and let the thread end. Idempotent."""
        self._finish(EngineClosed("the engine was closed"))
        if self.loaded.done() and self.loaded.exception() is None:
            self.loaded.result().interrupt()

    def join(self) -> None:
        """Wait for the thread. At once after ``ended``."""
        self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether it is loaded and has neither failed nor been stopped."""
        with self._changed:
            return self._end is None and self.loaded.done()

    def check(self) -> None:
        """Raise why nothing is computed any more, if that is so."""
        with self._changed:
            self._check()

    def _check(self) -> None:
        if self._end is not None:
            raise _again(self._end)

    # ---- the thread ----

    def _main(self) -> None:
        engine = self._load()
        if engine is None:
            self.ended.set_result(None)
            return
        self._serve(engine)
        try:
            engine.close()
        except BaseException as error:  # noqa: BLE001  # handed to whoever closes
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    def _load(self) -> LLMEngine | None:
        try:
            engine = LLMEngine(self._model, **self._settings)
        except (ExecutorError, ValueError) as error:
            self._finish(error)
            return None
        except BaseException as error:  # noqa: BLE001  # handed to whoever starts
            self._finish(_named(error))
            return None
        with self._changed:
            if self._end is None:
                self.loaded.set_result(engine)
        return engine

    def _serve(self, engine: LLMEngine) -> None:
        try:
            while (commands := self._take(engine.has_unfinished_requests)) is not None:
                for request in commands.submissions:
                    self._add(engine, request)
                for key in commands.aborts:
                    engine.abort_request(key)
                if engine.has_unfinished_requests:
                    self._publish(engine.step())
        except ExecutorError as error:
            self._finish(error)
        except BaseException as error:  # noqa: BLE001  # nobody else would learn of it
            self._finish(_named(error))

    def _take(self, busy: bool) -> _Commands | None:
        """The commands that came, waited for unless there is something to compute; None: it is over."""
        with self._changed:
            while not (busy or self._submissions or self._aborts or self._end):
                self._changed.wait()
            if self._end is not None:
                return None
            commands = _Commands(list(self._submissions.values()), list(self._aborts))
            self._submissions.clear()
            self._aborts.clear()
            return commands

    def _add(self, engine: LLMEngine, request: Submission) -> None:
        try:
            engine.add_encoded(request.key, request.prompt, request.ids, request.params)
        except ValueError as error:  # of this request alone
            with self._changed:
                self._streams.pop(request.key, None)
                request.stream.fail(error)
                self._wake([request.stream])

    def _publish(self, outputs: Iterable[RequestOutput]) -> None:
        with self._changed:
            read = [(output, self._streams.get(output.request_id)) for output in outputs]
        changed = [stream for output, stream in read if stream is not None and stream.put(output)]
        with self._changed:
            for output, _ in read:
                if output.finished:
                    self._streams.pop(output.request_id, None)
            self._wake(changed)

    # ---- the loop ----

    def _wake(self, streams: Iterable[RequestStream]) -> None:
        self._woken.update(dict.fromkeys(streams))
        if self._woken and not self._wakes:
            self._wakes = True
            with suppress(RuntimeError):  # it is closed
                self.loop.call_soon_threadsafe(self._wake_readers)
        if self.loop.is_closed():  # perhaps with a wake under way: nobody can read any more
            self._end = self._end or EngineClosed("the event loop of the engine was closed")

    def _wake_readers(self) -> None:
        with self._changed:
            woken, self._woken = self._woken, {}
            self._wakes = False
        for stream in woken:
            stream.arrived.set()

    def _finish(self, error: Exception) -> None:
        """Let every reader, and whoever comes later, have the error; the first one counts."""
        with self._changed:
            if self._end is not None:
                return
            self._end = error
            if not self.loaded.done():
                self.loaded.set_exception(error)
            for stream in self._streams.values():
                stream.fail(_again(error))
            self._wake(self._streams.values())
            self._streams.clear()
            self._submissions.clear()
            self._changed.notify()


def _pending() -> "Future[Any]":
    """A future that the cancellation of one who waits does not cancel for the others."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def _named(error: BaseException) -> ExecutorError:
    """For what nobody foresaw."""
    failure = ExecutorError(f"the engine failed: {error!r:.300}")
    failure.__cause__ = error
    return failure


def _again(error: Exception) -> Exception:
    """An error of the same kind for one more caller: a shared one would collect the frames of all of them."""
    if not isinstance(error, ExecutorError):
        return error
    copy = type(error)(str(error))
    copy.__cause__ = error
    return copy
