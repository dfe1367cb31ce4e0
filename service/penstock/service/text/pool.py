"""`EncodePool`: rendering and encoding off the event loop, so that one huge prompt stalls nobody.

Long prompts have a thread to themselves, where they wait for one another only; the others share a few. A text
so short that encoding it costs less than handing it to a thread is encoded where it is.
"""

import asyncio
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import BoundedSemaphore
from typing import Any

from penstock.service.text.encode import Tokenizer
from penstock.service.text.errors import Busy


class EncodePool:
    """Owns its threads; `close` ends it.

    `queue_limit` bounds, for long and for other prompts each, those that wait or run; more are refused with
    `Busy`. Deadlines are times of the running loop's clock; a wait without one ends after `max_wait_seconds`.
    A prompt whose caller gave up while it waited is never encoded; one that a thread has begun is finished
    and thrown away. The `tokenizers` library's own threads are switched off by its environment variable,
    unless the operator has set it.
    """

    __slots__ = ("_inline_chars", "_long_chars", "_max_wait_seconds", "_others", "_slow")

    def __init__(
        self,
        *,
        threads: int = 2,
        queue_limit: int = 256,
        inline_chars: int = 512,
        long_chars: int = 1 << 16,
        max_wait_seconds: float = 60.0,
    ) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._inline_chars = inline_chars
        self._long_chars = long_chars
        self._max_wait_seconds = max_wait_seconds
        self._others = _Lane("encode", threads, queue_limit)
        self._slow = _Lane("encode-long", 1, queue_limit)

    async def encode(
        self,
        tokenizer: Tokenizer,
        text: str,
        *,
        max_tokens: int,
        add_special_tokens: bool = True,
        deadline: float | None = None,
    ) -> "array[int]":
        """The ids of `text`; perhaps more than `max_tokens`: only what cannot possibly fit is refused.

        Raises `PromptTooLong`, `Busy`, and `TimeoutError` at the deadline.
        """
        tokenizer.check_length(text, max_tokens)
        if len(text) <= self._inline_chars:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        work = partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self._run(work, len(text), deadline)

    async def encode_chat(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int,
        deadline: float | None = None,
        **options: Any,
    ) -> "array[int]":
        """The ids of a conversation; `options` are those of `ChatTemplate.render`.

        Always in a thread, since templates loop. Raises `TemplateError` too.
        """

        def work() -> "array[int]":
            text = tokenizer.render_chat(messages, **options)
            tokenizer.check_length(text, max_tokens)
            return tokenizer.encode(text, add_special_tokens=False)

        return await self._run(work, _chars(messages), deadline)

    def close(self) -> None:
        """Refuse what waits and what comes, with `Busy`. Threads end after what they have begun."""
        self._others.close()
        self._slow.close()

    async def _run(self, work: Callable[[], "array[int]"], chars: int, deadline: float | None) -> "array[int]":
        lane = self._slow if chars > self._long_chars else self._others
        latest = asyncio.get_running_loop().time() + self._max_wait_seconds
        async with asyncio.timeout_at(latest if deadline is None else min(deadline, latest)):
            return await lane.run(work)


class _Lane:
    """Threads with a bounded queue."""

    __slots__ = ("_executor", "_places")

    def __init__(self, name: str, threads: int, queue_limit: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._places = BoundedSemaphore(queue_limit)

    async def run(self, work: Callable[[], "array[int]"]) -> "array[int]":
        future = self._submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                raise Busy("encoding is being shut down") from None  # `close` cancelled it, nobody the task
            raise

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self, work: Callable[[], "array[int]"]) -> "Future[array[int]]":
        if not self._places.acquire(blocking=False):
            raise Busy("too many prompts wait to be encoded")
        try:
            future = self._executor.submit(work)
        except RuntimeError:
            self._places.release()
            raise Busy("encoding is being shut down") from None
        future.add_done_callback(self._leave)  # when its thread is done with it, not when its caller is
        return future

    def _leave(self, _: "Future[array[int]]") -> None:
        self._places.release()


def _chars(value: object) -> int:
    """The characters of all texts in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_chars, value.values()))
    return sum(map(_chars, value)) if isinstance(value, list | tuple) else 0
