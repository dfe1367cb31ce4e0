"""Streams of chunks, for asyncio and for threads."""

from types import TracebackType
from typing import Self

from penstock.client.fold import StreamFold, is_empty
from penstock.client.span import CallSpan
from penstock.client.types import Chunk, Completion
from penstock.rpc.calls import ResponseStream
from penstock.rpc.sync_calls import SyncResponseStream
from penstock.v1 import StreamResponse


class _Progress:
    """What has arrived of a stream, and its span."""

    def __init__(self, span: CallSpan) -> None:
        self._span = span
        self._fold = StreamFold()
        self._has_tokens = False
        self.ended = False

    def take(self, response: StreamResponse) -> Chunk | None:
        """The chunk of a message, or None if it tells the reader nothing."""
        chunk = self._fold.add(response)
        if chunk.token_ids and not self._has_tokens:
            self._has_tokens = True
            self._span.event("first_token")
        return None if is_empty(chunk) else chunk

    def completion(self) -> Completion:
        return self._fold.completion(self._span.trace_id)

    def end(self, error: BaseException | None = None) -> None:
        """The stream has ended, or failed."""
        self.ended = True
        if error is None:
            self._span.describe(self.completion())
        self._span.end(error)

    def leave(self) -> None:
        """The reader has left the stream."""
        self.ended = True
        self._span.leave()


class _Shared:
    """What both kinds of stream say of themselves."""

    def __init__(
        self, call: ResponseStream[StreamResponse] | SyncResponseStream[StreamResponse], span: CallSpan
    ) -> None:
        self._progress = _Progress(span)
        self._cancel_call = call.cancel
        self.trace_id = span.trace_id
        """32 hexadecimal digits; empty where the client does not trace."""

    @property
    def completion(self) -> Completion:
        """What has arrived so far, added up; whole once the stream has ended."""
        return self._progress.completion()

    def cancel(self) -> None:
        """Leave the stream: nothing more is generated for it, and iteration ends. Idempotent."""
        if not self._progress.ended:
            self._cancel_call()
            self._progress.leave()


class AsyncStream(_Shared):
    """Iterate it once for the chunks; `async with` ends it whenever the block does. Raises RpcError."""

    def __init__(self, call: ResponseStream[StreamResponse], span: CallSpan) -> None:
        super().__init__(call, span)
        self._call = call

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        progress = self._progress
        while not progress.ended:
            try:
                response = await self._call.read()
            except BaseException as error:
                progress.end(error)
                raise
            if response is None:
                progress.end()
            elif (chunk := progress.take(response)) is not None:
                return chunk
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """The same as `cancel`, for `contextlib.aclosing`."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


class Stream(_Shared):
    """Iterate it once for the chunks; `with` ends it whenever the block does. Raises RpcError.

    `cancel` may be called from another thread; the iteration then raises RpcError (CANCELLED).
    """

    def __init__(self, call: SyncResponseStream[StreamResponse], span: CallSpan) -> None:
        super().__init__(call, span)
        self._call = call

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        progress = self._progress
        while not progress.ended:
            try:
                response = next(self._call, None)
            except BaseException as error:
                progress.end(error)
                raise
            if response is None:
                progress.end()
            elif (chunk := progress.take(response)) is not None:
                return chunk
        raise StopIteration

    def close(self) -> None:
        """The same as `cancel`, for `contextlib.closing`."""
        self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()
