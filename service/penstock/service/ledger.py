"""The attempts of one link: known by id until the scheduler accepts them, by handle from then on."""

from array import array
from collections.abc import Iterator

from penstock.rpc.errors import RpcError, from_failure
from penstock.service import errors
from penstock.service.attempts import Attempt
from penstock.service.columns import BadColumn, pack_u32, unpack_u32
from penstock.v1 import Accepted, Ack, Failure, Hello, Outputs, Rejected, Welcome


class ProtocolFault(Exception):
    """The scheduler said what it must not say: the stream is given up, the session resumed on a new one."""


class Ledger:
    """Applies the scheduler's messages to the attempts that wait for them."""

    __slots__ = ("_by_handle", "_finished", "_unaccepted")

    def __init__(self) -> None:
        self._unaccepted: dict[bytes, Attempt] = {}
        self._by_handle: dict[int, Attempt] = {}
        self._finished = array("I")
        """Handles whose end is known and not yet acknowledged."""

    def __len__(self) -> int:
        return len(self._unaccepted) + len(self._by_handle)

    def __contains__(self, attempt: Attempt) -> bool:
        if attempt.handle is None:
            return attempt.submit.attempt_id in self._unaccepted
        return self._by_handle.get(attempt.handle) is attempt  # a scheduler that started anew gives handles again

    def add(self, attempt: Attempt) -> None:
        """A new attempt."""
        self._unaccepted[attempt.submit.attempt_id] = attempt

    def remove(self, attempt: Attempt) -> None:
        """Its owner waits for it no longer; what still comes is dropped."""
        self._unaccepted.pop(attempt.submit.attempt_id, None)
        if attempt.handle is not None and attempt in self:
            del self._by_handle[attempt.handle]
            if attempt.finished:
                self._finished.append(attempt.handle)

    def unaccepted(self) -> Iterator[Attempt]:
        """Attempts that the scheduler has not answered."""
        return iter(list(self._unaccepted.values()))

    # What the scheduler says.

    def accepted(self, message: Accepted) -> None:
        """An attempt has a handle."""
        attempt = self._unaccepted.pop(message.attempt_id, None)
        if attempt is not None:
            attempt.handle = message.first_handle
            self._by_handle[message.first_handle] = attempt

    def rejected(self, message: Rejected) -> None:
        """An attempt will not be made."""
        attempt = self._unaccepted.pop(message.attempt_id, None)
        if attempt is not None:
            attempt.fail(from_failure(message.failure or Failure()))

    def outputs(self, message: Outputs) -> None:
        """New tokens and ends. Raises `ProtocolFault` if tokens are missing or columns do not fit."""
        try:
            self._runs(message)
        except BadColumn as error:
            raise ProtocolFault(str(error)) from error
        for finish in message.finished:
            if (attempt := self._by_handle.get(finish.handle)) is not None:
                attempt.finish(finish)
            self._settle(finish.handle)
        for failed in message.failed:
            if (attempt := self._by_handle.get(failed.handle)) is not None:
                attempt.fail(from_failure(failed.failure or Failure()))
            self._settle(failed.handle)

    def _runs(self, message: Outputs) -> None:
        handles, offsets = unpack_u32(message.handles), unpack_u32(message.offsets)
        counts, ids = unpack_u32(message.counts), unpack_u32(message.ids)
        if not len(handles) == len(offsets) == len(counts):
            raise BadColumn("handles, offsets and counts differ in length")
        if sum(counts) != len(ids):
            raise BadColumn("the counts do not add up to the ids")
        attempts, start = self._by_handle, 0
        for handle, offset, count in zip(handles, offsets, counts, strict=True):
            end = start + count
            attempt = attempts.get(handle)
            if attempt is not None and not attempt.extend(offset, ids[start:end]):
                raise ProtocolFault(f"tokens {attempt.received} to {offset} of a sample are missing")
            start = end

    def _settle(self, handle: int) -> None:
        """The scheduler may forget a sample whose last word is here, or for which nobody waits."""
        attempt = self._by_handle.get(handle)
        if attempt is None or attempt.complete:
            self._by_handle.pop(handle, None)
            self._finished.append(handle)

    # What is said to the scheduler.

    @property
    def has_ends_to_tell(self) -> bool:
        """Whether the next acknowledgement tells of an end."""
        return bool(self._finished)

    def ack(self) -> Ack:
        """What has arrived since the last one; empty, it is a heartbeat alone."""
        handles, offsets = array("I"), array("I")
        for handle, attempt in self._by_handle.items():
            if attempt.received != attempt.acknowledged:
                attempt.acknowledged = attempt.received
                handles.append(handle)
                offsets.append(attempt.received)
        finished, self._finished = self._finished, array("I")
        return Ack(pack_u32(handles), pack_u32(offsets), pack_u32(finished))

    def resume(self, hello: Hello) -> None:
        """Write into `hello` what is still waited for."""
        hello.handles = pack_u32(self._by_handle)
        hello.offsets = pack_u32(attempt.received for attempt in self._by_handle.values())
        self._finished = array("I")  # what is not named is forgotten by the scheduler

    def resumed(self, welcome: Welcome) -> None:
        """Fail what the scheduler does not know any more."""
        lost = _column(welcome.lost_handles) if welcome.resumed else list(self._by_handle)
        if not welcome.resumed:
            self._finished = array("I")
        for handle in lost:
            self._lose(handle, errors.scheduler_lost())

    def interrupt(self, error: RpcError) -> None:
        """Fail what is waited for. The scheduler works on it until its owners let go."""
        for attempt in (*self._unaccepted.values(), *self._by_handle.values()):
            attempt.fail(error)

    def fail_all(self, error: RpcError) -> None:
        """The scheduler is given up."""
        for attempt in self._unaccepted.values():
            attempt.fail(error)
        self._unaccepted.clear()
        for handle in list(self._by_handle):
            self._lose(handle, error)

    def _lose(self, handle: int, error: RpcError) -> None:
        attempt = self._by_handle.pop(handle, None)
        if attempt is not None:
            attempt.fail(error)


def _column(data: bytes) -> "array[int]":
    try:
        return unpack_u32(data)
    except BadColumn as error:
        raise ProtocolFault(str(error)) from error
