"""SchedulerService: its methods, and what each message of a session does."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol

import grpc

from penstock.executor.step import pack_u32
from penstock.rpc.errors import RpcError, cancelled, internal, invalid
from penstock.rpc.handlers import Context
from penstock.scheduler.gate.intake import Intake
from penstock.scheduler.gate.sessions import Session, Sessions
from penstock.scheduler.gate.status import PROTOCOL, ReplicaStatus
from penstock.scheduler.gate.stream import Stream, StreamSettings
from penstock.scheduler.gate.tokenizer import TokenizerFiles
from penstock.telemetry.logging import get_logger
from penstock.v1 import (
    ConnectRequest,
    ConnectResponse,
    DrainRequest,
    DrainResponse,
    ErrorReason,
    GetStatusRequest,
    GetStatusResponse,
    GetTokenizerRequest,
    GetTokenizerResponse,
    Hello,
    Load,
    SchedulerState,
)

SERVICE: Final = "penstock.v1.SchedulerService"
HELLO_SECONDS: Final = 5.0

log = get_logger(__name__)


class Replica(Protocol):
    """What the methods ask of the gate as a whole."""

    status: ReplicaStatus

    @property
    def state(self) -> SchedulerState:
        """Whether attempts are taken."""
        ...

    @property
    def attempts(self) -> int:
        """Attempts that are not forgotten."""
        ...

    @property
    def engine_pid(self) -> int:
        """Process id of the engine."""
        ...

    def refusal(self) -> RpcError | None:
        """Why no new session can be opened now, if so."""
        ...

    def ask_to_drain(self, grace_s: float | None) -> None:
        """Begin to end; None: within the configured grace."""
        ...


class Scheduler:
    """The methods that are built; LoadAdapter and UnloadAdapter answer UNIMPLEMENTED."""

    def __init__(
        self, replica: Replica, tokenizer: TokenizerFiles, sessions: Sessions, settings: StreamSettings
    ) -> None:
        self._replica = replica
        self._tokenizer = tokenizer
        self._sessions = sessions
        self._settings = settings
        self.intake: Intake | None = None
        """None until the engine has started."""

    async def get_status(self, request: GetStatusRequest, context: Context) -> GetStatusResponse:
        """How the scheduler is doing, also while it does badly."""
        replica = self._replica
        return replica.status.to_status(
            replica.state, sessions=len(self._sessions), attempts=replica.attempts, engine_pid=replica.engine_pid
        )

    async def drain(self, request: DrainRequest, context: Context) -> DrainResponse:
        """Stop admission; the scheduler ends when what runs is done, or after the grace."""
        self._replica.ask_to_drain(None if request.grace_ms is None else request.grace_ms / 1000)
        return DrainResponse(attempts=self._replica.attempts)

    async def get_tokenizer(
        self, request: GetTokenizerRequest, context: Context
    ) -> AsyncIterator[GetTokenizerResponse]:
        """The tokenizer's files. Raises NOT_FOUND for another digest."""
        async for piece in self._tokenizer.pieces(request.digest):
            yield piece

    # ---- sessions ----

    async def connect(
        self, requests: AsyncIterator[ConnectRequest], context: Context
    ) -> AsyncIterator[ConnectResponse]:
        """One stream of a session."""
        hello = await _first(requests)
        intake = self._check(hello)
        session, resumed, lost = self._sessions.open(hello)
        stream = Stream(session.outbox, self._load, self._settings, _this_task())
        session.attach(stream)
        log.info("session.open", service=session.service_id, resumed=resumed, lost=len(lost))
        reader = asyncio.create_task(_Reader(session, intake, stream).run(requests), name="session reader")
        try:
            welcome = self._replica.status.to_welcome(self._replica.state, resumed=resumed, lost_handles=pack_u32(lost))
            yield ConnectResponse(welcome=welcome)
            while True:
                yield await stream.next()
        finally:
            stream.close()
            self._sessions.lose(session, stream)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            log.info("session.stream_ended", service=session.service_id, attempts=len(session.attempts))

    def _load(self) -> Load:
        return self._replica.status.to_load(self._replica.state)

    def _check(self, hello: Hello) -> Intake:
        """Raise FAILED_PRECONDITION if the two sides do not understand each other, UNAVAILABLE if not now.

        A session that is known may go on at any time: what it runs is finished also while draining.
        """
        theirs, ours = hello.protocol, PROTOCOL
        if theirs is None or theirs.major != ours.major or abs(theirs.minor - ours.minor) > 1:
            raise RpcError(
                grpc.StatusCode.FAILED_PRECONDITION,
                ErrorReason.PROTOCOL_MISMATCH,
                f"the scheduler speaks protocol {ours.major}.{ours.minor}",
            )
        refusal = None if self._sessions.knows(hello.session) else self._replica.refusal()
        if refusal is not None or self.intake is None:
            raise refusal or cancelled()
        return self.intake


class _Reader:
    """Applies what a service says, message by message."""

    def __init__(self, session: Session, intake: Intake, stream: Stream) -> None:
        self._session = session
        self._intake = intake
        self._stream = stream

    async def run(self, requests: AsyncIterator[ConnectRequest]) -> None:
        """Until the service says no more; what it must not say ends the stream, and nothing else."""
        try:
            async for request in requests:
                await self._stream.heard()
                if self._stream.ended:
                    return
                self._take(request)
            self._stream.end(cancelled("the service said its last word"))
        except RpcError as error:
            self._stream.end(error)
        except Exception as error:  # a defect: this stream ends, and others go on
            log.error("session.failed", service=self._session.service_id, exc_info=error)
            self._stream.end(internal())

    def _take(self, request: ConnectRequest) -> None:
        """A message without a kind that is known comes from a newer minor version, and is passed over."""
        if request.ack is not None:
            self._session.acknowledge(request.ack)
        elif request.submit is not None:
            self._intake.submit(self._session, request.submit)
        elif request.submit_part is not None:
            self._intake.part(self._session, request.submit_part)
        elif request.cancel is not None:
            self._session.cancel(request.cancel)
        elif request.hello is not None:
            raise invalid([("hello", "only opens a stream")])


async def _first(requests: AsyncIterator[ConnectRequest]) -> Hello:
    """The hello. Raises INVALID_ARGUMENT if something else comes first, CANCELLED if nothing does in time."""
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            request = await anext(requests, None)
    except TimeoutError:
        raise cancelled("no hello came") from None
    if request is None or request.hello is None:
        raise invalid([("hello", "must come first")])
    return request.hello


def _this_task() -> "asyncio.Task[Any]":
    task = asyncio.current_task()
    assert task is not None
    return task
