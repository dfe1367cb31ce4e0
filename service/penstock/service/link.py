"""The link to one scheduler: one session, kept over as many streams as it takes.

A stream that breaks, or on which nothing is heard for `silence`, is replaced by one on a new channel; the session
goes on where it was, and attempts notice nothing unless that takes longer than `session_grace`.
"""

import asyncio
import random
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import grpc.aio

from penstock.rpc.calls import MessageStream
from penstock.rpc.errors import RpcError
from penstock.rpc.stubs import SchedulerStub
from penstock.service import errors
from penstock.service.attempts import Attempt
from penstock.service.catalogue import ModelFacts, Tokenizers
from penstock.service.ledger import Ledger, ProtocolFault
from penstock.service.outbox import Outbox
from penstock.service.text.errors import TokenizerFilesError
from penstock.telemetry.logging import get_logger
from penstock.v1 import (
    CancelReason,
    ConnectRequest,
    ConnectResponse,
    ErrorReason,
    GetTokenizerRequest,
    Hello,
    Load,
    ProtocolVersion,
    SchedulerState,
    Welcome,
)

PROTOCOL: Final = ProtocolVersion(major=1, minor=0)
HEARTBEAT_SECONDS: Final = 0.1
BACKOFF_SECONDS: Final = (0.05, 0.25)
REFUSED_BACKOFF_SECONDS: Final = 1.0
TOKENIZER_SECONDS: Final = 60.0
TOKENIZER_RETRY_SECONDS: Final = 1.0
FINAL_REASONS: Final = frozenset({ErrorReason.PROTOCOL_MISMATCH, ErrorReason.DRAINING})
"""After these words of the scheduler's own there is nothing to resume."""

log = get_logger(__name__)


ConnectCall = MessageStream[ConnectRequest, ConnectResponse]


class Lost(Exception):
    """The stream is of no use any more; the session is."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """How a link behaves; all in seconds."""

    silence: float = 1.0
    session_grace: float = 10.0


class Link:
    """Owned by the task that runs `run`; handlers call `submit` and `release` at any time."""

    def __init__(
        self,
        address: str,
        *,
        service_id: str,
        tokenizers: Tokenizers,
        settings: LinkSettings,
        open_channel: Callable[[str], grpc.aio.Channel],
        on_change: Callable[[], None],
    ) -> None:
        self.address = address
        self._service_id = service_id
        self._session = secrets.token_bytes(16)
        self._tokenizers = tokenizers
        self._settings = settings
        self._open_channel = open_channel
        self._on_change = on_change
        self._ledger = Ledger()
        self._outbox: Outbox | None = None
        self._cancels: dict[bytes, CancelReason] = {}
        """Not said yet, for lack of a stream; so an attempt that was accepted unheard does not run for nobody."""
        self._facts: ModelFacts | None = None
        self._load = Load()
        self._replica = address
        self._heard = 0.0
        self._unreported = 0
        self._was_usable = False
        self._reached = False
        self._expiry: asyncio.TimerHandle | None = None
        """Set from the loss of a stream until the next one is open."""
        self._given_up = False

    @property
    def facts(self) -> ModelFacts | None:
        """What the scheduler last said of its model; None before it was first reached."""
        return self._facts

    @property
    def replica(self) -> str:
        """The scheduler's name; its address before it said one."""
        return self._replica

    @property
    def load(self) -> Load:
        """The latest that it said."""
        return self._load

    @property
    def unreported(self) -> int:
        """Attempts given to it since."""
        return self._unreported

    @property
    def in_flight(self) -> int:
        """Attempts that wait for an answer or an end."""
        return len(self._ledger)

    @property
    def usable(self) -> bool:
        """Whether it is heard, serves, and its tokenizer is here."""
        return (
            self._outbox is not None
            and self._load.state == SchedulerState.SERVING
            and self._facts is not None
            and self._tokenizers.get(self._facts.tokenizer_digest) is not None
        )

    @property
    def reconnecting(self) -> bool:
        """Whether its stream broke a moment ago, and is being replaced."""
        return self._outbox is None and self._facts is not None and not self._given_up

    @property
    def settled(self) -> bool:
        """Whether the scheduler was told of every end that is known here, as far as it can be told."""
        outbox = self._outbox
        return outbox is None or not (self._ledger.has_ends_to_tell or outbox.acknowledging)

    def submit(self, attempt: Attempt) -> None:
        """Hand an attempt to the scheduler; at once, or when the stream is back."""
        self._ledger.add(attempt)
        self._unreported += 1
        if self._outbox is not None:
            _submit(attempt, self._outbox)

    def cancel(self, attempt: Attempt, reason: CancelReason) -> None:
        """End an attempt early; its end can still be waited for. Idempotent."""
        if attempt in self._ledger:
            self._cancels[attempt.submit.attempt_id] = reason
            self._say_cancels()

    def release(self, attempt: Attempt, reason: CancelReason) -> None:
        """The attempt's owner is done with it: what has not ended is cancelled. Idempotent."""
        self.cancel(attempt, reason)
        self._ledger.remove(attempt)

    def interrupt(self, error: RpcError) -> None:
        """Fail every attempt; its owner hears it and releases it."""
        self._ledger.interrupt(error)

    async def run(self) -> None:
        """Keep the session until cancelled; what is in flight then fails."""
        delays = _backoff()
        try:
            while True:
                final = await self._try()
                if self._reached:
                    delays = _backoff()
                await asyncio.sleep(REFUSED_BACKOFF_SECONDS if final else next(delays))
        finally:
            self._give_up()

    async def _try(self) -> bool:
        """One stream on a channel of its own. Whether it ended by the scheduler's own final word."""
        final = False
        try:
            async with self._open_channel(self.address) as channel:
                await self._stream(SchedulerStub(channel))
        except* (Lost, ProtocolFault, RpcError) as group:
            final = self._lost(group)
        return final

    async def _stream(self, stub: SchedulerStub) -> None:
        """One stream, until it breaks. Always raises."""
        self._reached = False
        call = stub.connect()
        try:
            welcome = await self._greet(call)
            outbox = self._opened(welcome)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(call))
                tasks.create_task(_write(call, outbox))
                tasks.create_task(self._beat(outbox))
                tasks.create_task(self._watch())
                tasks.create_task(self._fetch_tokenizer(stub, welcome.tokenizer_digest))
        finally:
            self._outbox = None
            call.cancel()
            self._changed()

    async def _greet(self, call: ConnectCall) -> Welcome:
        hello = Hello(service_id=self._service_id, session=self._session, protocol=PROTOCOL)
        self._ledger.resume(hello)
        try:
            async with asyncio.timeout(self._settings.silence):
                await call.write(ConnectRequest(hello=hello))
                answer = await call.read()
        except TimeoutError:
            raise Lost("no answer to hello") from None
        if answer is None:
            raise Lost("the stream ended")
        if answer.welcome is None:
            raise ProtocolFault("the first word was not welcome")
        return answer.welcome

    def _opened(self, welcome: Welcome) -> Outbox:
        """The session is there: resume what the scheduler knows, submit again what it has not accepted."""
        try:
            facts = ModelFacts.of(welcome)
        except ValueError as error:
            raise ProtocolFault(str(error)) from error
        if self._facts is not None and not facts.same_model(self._facts):
            self._ledger.fail_all(errors.scheduler_lost())  # their ids mean nothing to another model
        self._facts = facts
        self._ledger.resumed(welcome)
        self._replica = welcome.replica or self.address
        self._outbox = outbox = Outbox()
        self._say_cancels()
        for attempt in self._ledger.unaccepted():
            _submit(attempt, outbox)
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self._given_up = False
        self._reached = True
        self._heard = asyncio.get_running_loop().time()
        self._loaded(welcome.load or Load())
        log.info("link.open", scheduler=self.address, replica=self._replica, resumed=welcome.resumed)
        return outbox

    async def _read(self, call: ConnectCall) -> None:
        clock = asyncio.get_running_loop().time
        while (message := await call.read()) is not None:
            self._heard = clock()
            self._take(message)
        raise Lost("the stream ended")

    def _take(self, message: ConnectResponse) -> None:
        if message.outputs is not None:
            self._ledger.outputs(message.outputs)
        elif message.accepted is not None:
            self._ledger.accepted(message.accepted)
        elif message.rejected is not None:
            self._ledger.rejected(message.rejected)
        elif message.load is not None:
            self._loaded(message.load)
        elif message.draining is not None:
            self._load.state = SchedulerState.DRAINING
            self._changed()

    def _loaded(self, load: Load) -> None:
        self._load = load
        self._unreported = 0
        self._changed()

    async def _beat(self, outbox: Outbox) -> None:
        """Acknowledge at 10 Hz, also when there is nothing to acknowledge: the scheduler listens for it."""
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            if not outbox.acknowledging:
                outbox.acknowledge(self._ledger.ack())

    async def _watch(self) -> None:
        """Give the stream up when nothing is heard; a pause of this process itself does not count."""
        clock, silence = asyncio.get_running_loop().time, self._settings.silence
        period = silence / 4
        while True:
            slept = clock()
            await asyncio.sleep(period)
            if clock() - slept < 2 * period and clock() - self._heard > silence:
                raise Lost("silence")

    async def _fetch_tokenizer(self, stub: SchedulerStub, digest: str) -> None:
        """Have the model's tokenizer, however often that takes."""
        while self._tokenizers.get(digest) is None:
            pieces = stub.get_tokenizer(GetTokenizerRequest(digest=digest))
            try:
                async with asyncio.timeout(TOKENIZER_SECONDS):
                    await self._tokenizers.fetch(digest, pieces)
            except (TokenizerFilesError, TimeoutError, RpcError) as error:
                log.warning("link.no_tokenizer", scheduler=self.address, error=str(error))
                await asyncio.sleep(TOKENIZER_RETRY_SECONDS)
            finally:
                pieces.cancel()
        self._changed()

    def _lost(self, group: BaseExceptionGroup[Exception]) -> bool:
        """The stream broke. Whether that was the scheduler's own final word."""
        faults = list(_leaves(group))
        tell = log.warning if self._expiry is None else log.debug  # a scheduler that stays away is news once
        tell("link.lost", scheduler=self.address, error="; ".join(map(str, faults)))
        final = any(map(_is_final, faults))
        if final:
            self._give_up()
        elif self._expiry is None:
            loop = asyncio.get_running_loop()
            self._expiry = loop.call_later(self._settings.session_grace, self._give_up)
        return final

    def _give_up(self) -> None:
        self._given_up = True
        self._ledger.fail_all(errors.scheduler_lost())

    def _say_cancels(self) -> None:
        if self._outbox is not None:
            for attempt_id, reason in self._cancels.items():
                self._outbox.cancel(attempt_id, reason)
            self._cancels.clear()

    def _changed(self) -> None:
        if self.usable != self._was_usable:
            self._was_usable = self.usable
            self._on_change()


async def _write(call: ConnectCall, outbox: Outbox) -> None:
    """Say what there is to say, until the stream breaks; what broke it, the reader learns."""
    with suppress(RpcError):
        while True:
            await call.write(await outbox.next())


def _submit(attempt: Attempt, outbox: Outbox) -> None:
    if attempt.deadline is not None:
        remaining_s = attempt.deadline - asyncio.get_running_loop().time()
        attempt.submit.remaining_ms = max(int(remaining_s * 1000), 1)
    outbox.submit(attempt.submit)


def _backoff() -> Iterator[float]:
    """Delays between tries: doubling from the first to the last, up to half of each left to chance."""
    low, high = BACKOFF_SECONDS
    while True:
        yield low * random.uniform(0.5, 1.0)
        low = min(2 * low, high)


def _leaves(group: BaseExceptionGroup[Exception]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _is_final(fault: BaseException) -> bool:
    return isinstance(fault, RpcError) and fault.from_peer and fault.reason in FINAL_REASONS
