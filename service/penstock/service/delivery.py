"""One attempt's ids as what its caller gets: text, the tokens that it accounts for, and how it ended."""

from array import array
from typing import NamedTuple

from penstock.service import errors
from penstock.service.attempts import Attempt
from penstock.service.text.stream import OutputText
from penstock.v1 import FinishReason


class Piece(NamedTuple):
    """What the output grew by; perhaps nothing, in the last one."""

    text: str
    token_ids: "array[int]"


class Delivery:
    """Iterates over what an attempt's output grows by, until it ends; raises what the attempt failed with.

    Ids are kept while their text is held back because of a stop text. A token of `end_ids` can only be the last one,
    since the scheduler ends there: it is reported, but has no text.
    """

    __slots__ = ("_attempt", "_end", "_end_ids", "_held", "_output", "completion_tokens", "finish_reason")

    def __init__(self, attempt: Attempt, output: OutputText, end_ids: frozenset[int]) -> None:
        self._attempt = attempt
        self._output = output
        self._end_ids = end_ids
        self._end = array("I")
        """The end token, until the scheduler says that it is one."""
        self._held = array("I")
        """Tokens whose text is not released."""
        self.completion_tokens = 0
        """Reported so far."""
        self.finish_reason = FinishReason.UNSPECIFIED
        """How the output ended, once it has."""

    @property
    def stop(self) -> str | None:
        """The stop text that ended the output, if one did."""
        return self._output.stop

    def __aiter__(self) -> "Delivery":
        return self

    async def __anext__(self) -> Piece:
        """All that there is to report; waits for something."""
        while self.finish_reason == FinishReason.UNSPECIFIED:
            ids = await self._attempt.take()
            piece = self._grow(ids)
            end = self._attempt.end
            if end is not None and self.finish_reason == FinishReason.UNSPECIFIED:
                piece = self._finish(piece, end.reason)
            if piece.text or piece.token_ids:
                self.completion_tokens += len(piece.token_ids)
                return piece
        raise StopAsyncIteration

    def _grow(self, ids: "array[int]") -> Piece:
        body = self._end + ids if self._end else ids
        if body and body[-1] in self._end_ids:
            self._end, body = body[-1:], body[:-1]
        elif self._end:
            self._end = array("I")
        text, count, stopped = self._output.feed(body)
        if stopped:
            self.finish_reason = FinishReason.STOP_SEQUENCE
        return Piece(text, self._hand_out(body, count))

    def _finish(self, piece: Piece, reason: FinishReason) -> Piece:
        if reason == FinishReason.CANCELLED:
            raise errors.scheduler_lost()  # not on our word
        text, count, stopped = self._output.finish()
        self.finish_reason = FinishReason.STOP_SEQUENCE if stopped else reason
        token_ids = piece.token_ids + self._hand_out(array("I"), count)
        return Piece(piece.text + text, token_ids if stopped else token_ids + self._end)

    def _hand_out(self, ids: "array[int]", count: int) -> "array[int]":
        """The first `count` of what is held and `ids`; the others are held."""
        if not self._held and count == len(ids):
            return ids
        held = self._held + ids
        self._held = held[count:]
        return held[:count]
