"""One gate, put together: its engine, its sessions, its server; how it begins, how it ends."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

from penstock.executor.step import ModelInfo
from penstock.rpc import reflection
from penstock.rpc.errors import RpcError
from penstock.rpc.health import OVERALL, Health
from penstock.rpc.server import Server
from penstock.rpc.tls import server_credentials
from penstock.scheduler.gate.admission import Admission, draining, not_serving, scheduler_lost
from penstock.scheduler.gate.attempts import AttemptTable
from penstock.scheduler.gate.checks import ModelLimits
from penstock.scheduler.gate.config import SchedulerConfig
from penstock.scheduler.gate.engine_process import EngineProcess
from penstock.scheduler.gate.intake import Intake
from penstock.scheduler.gate.liveness import Liveness
from penstock.scheduler.gate.outputs import EngineOutputs
from penstock.scheduler.gate.server import SERVICE, Scheduler
from penstock.scheduler.gate.sessions import Sessions
from penstock.scheduler.gate.spans import Spans
from penstock.scheduler.gate.status import ReplicaStatus
from penstock.scheduler.gate.stream import StreamSettings
from penstock.scheduler.gate.tokenizer import TokenizerFiles
from penstock.scheduler.records import commands, events
from penstock.scheduler.records.startup import EngineArguments
from penstock.telemetry.logging import get_logger
from penstock.telemetry.tracing import Tracing
from penstock.v1 import ConnectResponse, Draining, SchedulerState

MAX_MESSAGE_BYTES: Final = 8 << 20
GOAWAY_GRACE_MS: Final = 250
IDLE_POLL_SECONDS: Final = 0.02
LAST_WORDS_SECONDS: Final = 2.0
"""For what was said last to reach the services, also one whose stream broke just now."""
STOP_SECONDS: Final = 1.0
"""For calls that are being answered when the server stops."""

log = get_logger(__name__)


class Gate:
    """Made and used on one event loop: ``start``, ``ready``, then ``drain`` or ``lose_engine``, and ``close``."""

    def __init__(
        self,
        config: SchedulerConfig,
        tokenizer: TokenizerFiles,
        tracing: Tracing,
        engine_command: Callable[[EngineArguments], list[str]] = EngineArguments.argv,
    ) -> None:
        self._config = config
        self._table = AttemptTable()
        self._admission = Admission(config.max_waiting, config.max_waiting_tokens, config.sequences)
        self._spans = Spans(tracing, self._table.samples)
        self._outputs = EngineOutputs(self._table, self._admission, self._spans)
        self.engine = EngineProcess(config.engine_spec(), self._take_record, engine_command)
        self._liveness = Liveness(self.engine.vitals, self._state_changed)
        self._sessions = Sessions(self._table, self.engine.send, config.session_grace)
        self.status = ReplicaStatus(config, tokenizer.digest, time.time_ns())
        self._started = asyncio.Event()
        self.drain_asked = asyncio.Event()
        """Set when someone wants the scheduler to end."""
        self._drain_grace = config.drain_grace
        self._is_draining = False
        self._scheduler = Scheduler(self, tokenizer, self._sessions, _stream_settings(config))
        self._server = _make_server(config)
        self._server.add(SERVICE, self._scheduler)
        self._health = Health((SERVICE,))
        self._health.attach(self._server)
        reflection.enable(self._server)
        self._watch: asyncio.Task[None] | None = None

    # ---- the beginning ----

    async def start(self) -> str:
        """Listen, and start the engine; returns the address. Raises BindError, OSError."""
        address = await self._server.start()
        self.status.address = address
        self.engine.start()
        self._spans.engine_started(self.engine.pid)
        self._watch = asyncio.create_task(self._liveness.watch(), name="liveness")
        log.info("gate.listening", address=address, engine_pid=self.engine.pid)
        return address

    async def ready(self) -> None:
        """Wait until the engine serves."""
        await self._started.wait()

    def _take_record(self, record: events.Event) -> None:
        match record:
            case events.Step():
                self._outputs.take(record)
            case events.LoadReport(load):
                self.status.load = load
                self._admission.observe(load)
            case events.Started(info):
                self._engine_started(info)

    def _engine_started(self, info: ModelInfo) -> None:
        self.status.info = info
        limits = ModelLimits.of(info, self.engine.max_command_bytes)
        self.status.limits = limits
        intake = Intake(limits, self._table, self._admission, self.engine, self._spans, lambda: self._liveness.state)
        self._scheduler.intake = intake
        log.info("engine.started", pid=self.engine.pid, device=info.device, dtype=info.dtype, blocks=info.num_blocks)
        self._serving_soon()

    def _serving_soon(self) -> None:
        """The engine says that it serves right after it said that it started."""
        self._liveness.look()
        if self._liveness.state == SchedulerState.STARTING:
            asyncio.get_running_loop().call_later(IDLE_POLL_SECONDS, self._serving_soon)

    # ---- how it is ----

    @property
    def state(self) -> SchedulerState:
        """Whether attempts are taken."""
        return SchedulerState.DRAINING if self._is_draining else self._liveness.state

    @property
    def attempts(self) -> int:
        """Attempts that are not forgotten."""
        return len(self._table)

    @property
    def engine_pid(self) -> int:
        """Process id of the engine."""
        return self.engine.pid

    def refusal(self) -> RpcError | None:
        """Why no new session can be opened now, if so."""
        if self._is_draining:
            return draining()
        return not_serving() if self.status.info is None else None

    def _state_changed(self, state: SchedulerState) -> None:
        log.info("engine.state", pid=self.engine.pid, state=(state.name or "").lower())
        self._tell_health()
        if state == SchedulerState.SERVING and self.status.info is not None:
            self._started.set()
        for stream in self._sessions.streams():
            stream.say_load()

    def _tell_health(self) -> None:
        serving = self.state == SchedulerState.SERVING
        self._health.set(SERVICE, serving)
        self._health.set(OVERALL, serving)

    # ---- the end ----

    def ask_to_drain(self, grace_s: float | None) -> None:
        """Admit nobody from now on, and end when all is done, or after the grace (None: the configured one)."""
        self._admission.drain()
        if not self._is_draining:
            self._is_draining = True
            self._drain_grace = self._config.drain_grace if grace_s is None else grace_s
            self.engine.send(commands.Drain())
            self._tell_health()
            self._say_draining()
        self.drain_asked.set()

    def _say_draining(self) -> None:
        log.info("gate.draining", attempts=self.attempts, grace_s=self._drain_grace)
        grace_ms = min(round(self._drain_grace * 1000), (1 << 32) - 1)
        for session in self._sessions.all():
            session.outbox.say(ConnectResponse(draining=Draining(grace_ms=grace_ms)))
        for stream in self._sessions.streams():
            stream.say_load()

    async def drain(self) -> None:
        """Finish what runs, within the grace; what is left then fails with UNAVAILABLE."""
        self.ask_to_drain(None)
        if not await self._within(self._drain_grace, lambda: not self._admission.inside and self._all_said()):
            log.warning("gate.cut_off", attempts=self.attempts)
            self._outputs.fail_all(draining)
        await self._end_streams(draining())

    async def lose_engine(self) -> None:
        """The engine is gone: every attempt fails with UNAVAILABLE."""
        self._health.set_all(False)
        self._admission.drain()
        self._is_draining = True
        self._outputs.fail_all(scheduler_lost)
        await self._end_streams(scheduler_lost())

    def _all_said(self) -> bool:
        """Nothing waits for a stream that is there."""
        return all(session.stream is None or session.outbox.empty for session in self._sessions.all())

    async def _end_streams(self, error: RpcError) -> None:
        """End them when every end was acknowledged: what a stream that broke has swallowed, the next one says again."""
        await self._within(LAST_WORDS_SECONDS, lambda: not self.attempts and self._all_said())
        for stream in self._sessions.streams():
            stream.end(error)
        self._sessions.close()

    async def _within(self, seconds: float, done: Callable[[], bool]) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not done():  # noqa: ASYNC110  # many things together, and only at the end
                    await asyncio.sleep(IDLE_POLL_SECONDS)
        return done()

    async def close(self) -> None:
        """End everything that was started. Idempotent."""
        self._sessions.close()
        await self._server.stop(STOP_SECONDS)
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self.engine.stop()


def _stream_settings(config: SchedulerConfig) -> StreamSettings:
    return StreamSettings(silence=config.silence, stall=config.stall, flush=config.flush_ms / 1000)


def _make_server(config: SchedulerConfig) -> Server:
    credentials = None
    if config.tls_certificate is not None and config.tls_key is not None:
        credentials = server_credentials(config.tls_certificate, config.tls_key, config.client_ca)
    options: list[tuple[str, str | int]] = []
    if config.max_connection_age_s is not None:
        options.append(("grpc.max_connection_age_ms", round(config.max_connection_age_s * 1000)))
        options.append(("grpc.max_connection_age_grace_ms", GOAWAY_GRACE_MS))
    return Server(
        config.grpc_address,
        credentials=credentials,
        on_error=_log_failure,
        max_message_bytes=MAX_MESSAGE_BYTES,
        options=options,
    )


def _log_failure(method: str, error: BaseException) -> None:
    log.error("call.failed", method=method, exc_info=error)
