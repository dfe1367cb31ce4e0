"""What the service has to say on one stream, in the order in which it is said."""

import asyncio
import copy
from collections import deque
from collections.abc import Iterator
from typing import Final

from penstock.v1 import Ack, Cancel, CancelReason, ConnectRequest, Submit, SubmitPart

PART_BYTES: Final = 1 << 16


class Outbox:
    """Cancels first, then the acknowledgement, then submissions, whose parts take turns.

    At most one submission and one cancel an attempt, so it is bounded by the attempts in flight.
    """

    __slots__ = ("_ack", "_cancels", "_submissions", "_wake")

    def __init__(self) -> None:
        self._cancels: deque[Cancel] = deque()
        self._ack: Ack | None = None
        self._submissions: dict[bytes, Iterator[ConnectRequest]] = {}
        self._wake = asyncio.Event()

    def submit(self, submit: Submit) -> None:
        """Say `submit`, in parts if its prompt is long."""
        self._submissions[submit.attempt_id] = iter(messages_of(submit))
        self._wake.set()

    def cancel(self, attempt_id: bytes, reason: CancelReason) -> None:
        """Say that an attempt is cancelled, and no more of its prompt."""
        self._submissions.pop(attempt_id, None)
        self._cancels.append(Cancel(attempt_id=attempt_id, reason=reason))
        self._wake.set()

    def acknowledge(self, ack: Ack) -> None:
        """Say `ack` once; there must be none waiting, see `acknowledging`."""
        self._ack = ack
        self._wake.set()

    @property
    def acknowledging(self) -> bool:
        """Whether an acknowledgement still waits to be said."""
        return self._ack is not None

    async def next(self) -> ConnectRequest:
        """What to say next; waits until there is something."""
        while (message := self._next()) is None:
            self._wake.clear()
            await self._wake.wait()
        return message

    def _next(self) -> ConnectRequest | None:
        if self._cancels:
            return ConnectRequest(cancel=self._cancels.popleft())
        if self._ack is not None:
            ack, self._ack = self._ack, None
            return ConnectRequest(ack=ack)
        while self._submissions:
            attempt_id = next(iter(self._submissions))
            parts = self._submissions.pop(attempt_id)
            if (message := next(parts, None)) is not None:
                self._submissions[attempt_id] = parts
                return message
        return None


def messages_of(submit: Submit) -> Iterator[ConnectRequest]:
    """`submit`, and what of its prompt is beyond `PART_BYTES` in parts of that size."""
    prompt = submit.prompt_ids
    first = submit
    if len(prompt) > PART_BYTES:
        first = copy.copy(submit)
        first.prompt_ids = prompt[:PART_BYTES]
    yield ConnectRequest(submit=first)
    for index, start in enumerate(range(PART_BYTES, len(prompt), PART_BYTES), 1):
        part = SubmitPart(submit.attempt_id, index, prompt[start : start + PART_BYTES])
        yield ConnectRequest(submit_part=part)
