"""Sessions: what a service process and this gate are in the middle of, over as many streams as it takes.

A session begins with its first hello. When its stream is lost its attempts live on for the grace period; a new stream
of the same session goes on where the service says that it is. What it does not name then is cancelled, but for attempts
whose Accepted may have been lost with the stream: those are kept a moment for their Submit to come again.
"""

import asyncio
from array import array
from collections.abc import Callable, Iterable
from typing import Final

from penstock.executor.step import pack_u32, unpack_u32
from penstock.rpc.errors import RpcError, cancelled, exhausted, invalid, to_failure
from penstock.scheduler.gate.admission import scheduler_lost
from penstock.scheduler.gate.attempts import Attempt, AttemptTable, Sample
from penstock.scheduler.gate.outbox import Outbox, nobody_listens
from penstock.scheduler.gate.parts import Assembly
from penstock.scheduler.gate.stream import Stream
from penstock.scheduler.records import commands
from penstock.telemetry.logging import get_logger
from penstock.v1 import Accepted, Ack, Cancel, CancelReason, ConnectResponse, ErrorReason, Hello, Rejected

SESSION_BYTES: Final = 16
MAX_SESSIONS: Final = 256
CLAIM_SECONDS: Final = 2.0
RETRY_SECONDS: Final = 1.0

log = get_logger(__name__)

Send = Callable[[commands.Command], None]


class Session:
    """What one service process has here."""

    def __init__(self, session_id: bytes, service_id: str, table: AttemptTable, send: Send) -> None:
        self.session_id = session_id
        self.service_id = service_id
        self.attempts: dict[bytes, Attempt] = {}
        self.assemblies: dict[bytes, Assembly] = {}
        """Attempts whose prompt is not complete."""
        self.outbox = Outbox()
        self.unacknowledged = 0
        """Samples that have ended and are kept because the service has not said that it knows."""
        self.stream: Stream | None = None
        self.timer: asyncio.TimerHandle | None = None
        """Without a stream: the end of the grace period. With one: the time by which attempts must be claimed."""
        self._table = table
        self._send = send

    # ---- what is answered ----

    def accept(self, attempt: Attempt) -> None:
        """Say that the attempt is queued."""
        answer = Accepted(attempt_id=attempt.attempt_id, first_handle=attempt.first_handle)
        self.outbox.say(ConnectResponse(accepted=answer))

    def reject(self, attempt_id: bytes, error: RpcError) -> None:
        """Say that the attempt will not be made."""
        self.outbox.say(ConnectResponse(rejected=Rejected(attempt_id=attempt_id, failure=to_failure(error))))

    # ---- what is heard ----

    def acknowledge(self, ack: Ack) -> None:
        """Forget what the service has; unknown handles are ignored. Raises INVALID_ARGUMENT for bad columns."""
        handles, offsets = columns(("ack.handles", ack.handles), ("ack.offsets", ack.offsets))
        (finished,) = columns(("ack.finished", ack.finished))
        for handle, offset in zip(handles, offsets, strict=True):
            if (sample := self._sample(handle)) is not None:
                sample.attempt.claimed = True
                sample.acknowledge(offset)
        for handle in finished:
            if (sample := self._sample(handle)) is not None and sample.end_sent:
                self.forget(sample)

    def cancel(self, cancel: Cancel) -> None:
        """End an attempt, or some of its samples. How it ended is told only to who ends it for a stop text."""
        assembly = self.assemblies.pop(cancel.attempt_id, None)
        if assembly is not None:
            assembly.drop()
        attempt = self.attempts.get(cancel.attempt_id)
        if attempt is None:
            return
        wanted = frozenset(cancel.samples)
        samples = [sample for sample in attempt.samples if not wanted or sample.index in wanted]
        self._cancel(samples, wants_end=cancel.reason == CancelReason.STOP_SEQUENCE)

    def _cancel(self, samples: Iterable[Sample], *, wants_end: bool) -> None:
        handles = array("I")
        for sample in list(samples):
            if sample.end is not None:
                if not wants_end:
                    self.forget(sample)
                continue
            if not wants_end:
                sample.mute()
            if not sample.cancelled:
                sample.cancelled = True
                handles.append(sample.handle)
        if handles:
            self._send(commands.Cancel(pack_u32(handles)))

    # ---- streams come and go ----

    def resume(self, hello: Hello) -> "array[int]":
        """Prepare for a new stream, which goes on where the service is; an older one ends.

        Returns the handles that are not known here. Raises INVALID_ARGUMENT.
        """
        handles, offsets = columns(("hello.handles", hello.handles), ("hello.offsets", hello.offsets))
        if self.stream is not None:
            self.stream.end(cancelled("a newer stream of the session took over"))
            self.detach()
        self.outbox.clear()
        named: set[int] = set()
        lost = array("I")
        for handle, offset in zip(handles, offsets, strict=True):
            sample = self._sample(handle)
            if sample is not None and not sample.muted and sample.resume(offset):
                sample.attempt.claimed = True
                named.add(handle)
            else:
                lost.append(handle)
        self._doubt_or_cancel(named)
        return lost

    def _doubt_or_cancel(self, named: set[int]) -> None:
        """What the service did not name it does not wait for, unless it does not know the handles yet."""
        for attempt in list(self.attempts.values()):
            if attempt.claimed:
                self._cancel([sample for sample in attempt.samples if sample.handle not in named], wants_end=False)
            else:
                attempt.doubt()

    def attach(self, stream: Stream) -> None:
        """The stream is the session's from now on."""
        self.stream = stream
        self.outbox.on_output = stream.notify
        self.outbox.add_all(sample for attempt in self.attempts.values() for sample in attempt.samples)
        self._set_timer(CLAIM_SECONDS, self._drop_doubtful)

    def accept_again(self, attempt: Attempt) -> None:
        """Its Submit came again; too late, if it is being cancelled by now."""
        if all(sample.muted for sample in attempt.samples):
            self.reject(attempt.attempt_id, scheduler_lost())
            return
        self.accept(attempt)
        if attempt.in_doubt:
            attempt.confirm()
            self.outbox.add_all(attempt.samples)

    def detach(self) -> None:
        """The stream is lost: what was only half said is void, and comes again."""
        self.stream = None
        self.outbox.on_output = nobody_listens
        for assembly in self.assemblies.values():
            assembly.drop()
        self.assemblies.clear()

    def _drop_doubtful(self) -> None:
        """Attempts of an earlier stream whose Submit did not come again."""
        self.timer = None
        for attempt in list(self.attempts.values()):
            if attempt.in_doubt:
                self._cancel(attempt.samples, wants_end=False)

    def abandon(self) -> None:
        """The service did not come back: its attempts end."""
        for attempt in list(self.attempts.values()):
            self._cancel(attempt.samples, wants_end=False)

    def expire_after(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back when the grace period is over, unless a stream comes."""
        self._set_timer(seconds, callback)

    def _set_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self.stop_timer()
        self.timer = asyncio.get_running_loop().call_later(seconds, callback)

    def stop_timer(self) -> None:
        """Nothing happens by itself any more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    # ---- samples ----

    def _sample(self, handle: int) -> Sample | None:
        """The sample of that handle, if it is this session's."""
        sample = self._table.samples.get(handle)
        return sample if sample is not None and sample.attempt.session is self else None

    def forget(self, sample: Sample) -> None:
        """Nothing is known of the sample any more."""
        sample.mute()  # the outbox may have it on its list
        self.unacknowledged -= sample.end is not None
        if self._table.forget(sample):
            self.attempts.pop(sample.attempt.attempt_id, None)


class Sessions:
    """All sessions by their ids."""

    def __init__(self, table: AttemptTable, send: Send, grace_s: float) -> None:
        self._table = table
        self._send = send
        self._grace_s = grace_s
        self._sessions: dict[bytes, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def streams(self) -> list[Stream]:
        """The streams that are open."""
        return [session.stream for session in self._sessions.values() if session.stream is not None]

    def all(self) -> list[Session]:
        """Every session, with a stream or in its grace period."""
        return list(self._sessions.values())

    def knows(self, session_id: bytes) -> bool:
        """Whether a stream of that session would resume it."""
        return session_id in self._sessions

    def open(self, hello: Hello) -> tuple[Session, bool, "array[int]"]:
        """The session of a hello, whether it was known, and the handles that were lost.

        Raises INVALID_ARGUMENT, and RESOURCE_EXHAUSTED if there are too many sessions.
        """
        if len(hello.session) != SESSION_BYTES:
            raise invalid([("hello.session", f"must have {SESSION_BYTES} bytes")])
        known = self._sessions.get(hello.session)
        session = known or Session(hello.session, hello.service_id[:128], self._table, self._send)
        lost = session.resume(hello)
        if known is None:
            if len(self._sessions) >= MAX_SESSIONS:
                raise exhausted(ErrorReason.SERVICE_BUSY, "too many sessions", RETRY_SECONDS)
            self._sessions[hello.session] = session
        return session, known is not None, lost

    def lose(self, session: Session, stream: Stream) -> None:
        """A stream has ended. If it was the session's, the grace period begins; a session without attempts ends."""
        if session.stream is not stream:
            return
        session.detach()
        if session.attempts and self.knows(session.session_id):
            session.expire_after(self._grace_s, lambda: self._expire(session))
        else:
            self._remove(session)

    def _expire(self, session: Session) -> None:
        log.info("session.expired", service=session.service_id, attempts=len(session.attempts))
        session.abandon()
        self._remove(session)

    def _remove(self, session: Session) -> None:
        session.stop_timer()
        if self._sessions.get(session.session_id) is session:
            del self._sessions[session.session_id]

    def close(self) -> None:
        """No session is known any more, no timer is left."""
        for session in self._sessions.values():
            session.stop_timer()
        self._sessions.clear()


def columns(*named: tuple[str, bytes]) -> list["array[int]"]:
    """Columns of u32 of one length. Raises INVALID_ARGUMENT."""
    try:
        unpacked = [unpack_u32(data) for _, data in named]
    except ValueError:
        raise invalid([(name, "is no column of u32") for name, data in named if len(data) % 4]) from None
    if len({len(column) for column in unpacked}) > 1:
        raise invalid([(name, "differs in length") for name, _ in named])
    return unpacked
