"""The engine as the gate has it: a child process behind two rings and a page of vitals.

Nothing here waits for the engine. Commands that the ring does not take are kept in order and offered again; records are
taken a bounded number at a time, so that whatever else the event loop has to do is not starved by a fast engine.
"""

import asyncio
import contextlib
import os
import subprocess
from collections import deque
from collections.abc import Callable
from typing import Final

from penstock.executor.ring import RingHandle, RingReader, RingWriter, create_ring
from penstock.scheduler.records import commands, events
from penstock.scheduler.records.startup import EngineArguments, EngineSpec
from penstock.scheduler.records.vitals import Vitals
from penstock.telemetry.logging import get_logger

COMMAND_RING_BYTES: Final = 16 << 20
EVENT_RING_BYTES: Final = 8 << 20
RECORDS_A_TURN: Final = 32
BACKLOG_BYTES: Final = 64 << 20
BACKLOG_RETRY_S: Final = 0.002
SHUTDOWN_SECONDS: Final = 3.0

log = get_logger(__name__)


class EngineProcess:
    """Owned by whoever starts it, who must ``stop`` it. All methods belong to one event loop's main thread."""

    def __init__(
        self,
        spec: EngineSpec,
        on_record: Callable[[events.Event], None],
        command: Callable[[EngineArguments], list[str]] = EngineArguments.argv,
    ) -> None:
        """``on_record`` is called on the event loop for each record but Failed; if it raises, the engine is killed.

        ``command`` makes the command line of the process.
        """
        self._spec = spec
        self._command = command
        self._on_record = on_record
        self._commands = create_ring(COMMAND_RING_BYTES)
        self._events = create_ring(EVENT_RING_BYTES)
        self._writer = RingWriter(self._commands)
        self._reader = RingReader(self._events)
        self.vitals = Vitals.create()
        """What the engine says of itself."""
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._retry: asyncio.TimerHandle | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._ended: asyncio.Future[str] | None = None
        self._last_words = ""
        self._given_up = False
        self._closed = False

    @property
    def pid(self) -> int:
        """Of the engine; 0 before it is started."""
        return 0 if self._process is None else self._process.pid

    @property
    def max_command_bytes(self) -> int:
        """Largest command that the ring takes."""
        return self._writer.max_message

    def start(self) -> None:
        """Start the process. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        arguments = EngineArguments(
            spec=self._spec,
            commands=self._commands.encode(),
            events=self._events.encode(),
            vitals_fd=self.vitals.memfd,
            parent_pid=os.getpid(),
        )
        command = self._command(arguments)
        # Its output is for the operator, like ours; standard output is kept for those who asked for something.
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=arguments.fds())
        self._pidfd = os.pidfd_open(self._process.pid)
        loop.add_reader(self._pidfd, self._process_ended)
        loop.add_reader(self._reader.fileno(), self._take_records)
        self._take_records()

    # ---- in ----

    def send(self, command: commands.Command) -> None:
        """Hand a command to the engine, in order. Raises ValueError if it is larger than max_command_bytes."""
        data = commands.encode(command)
        if self._backlog or not self._writer.put(data):
            self._backlog.append(data)
            self._backlog_bytes += len(data)
            self._offer_later()

    @property
    def congested(self) -> bool:
        """Whether so much waits for the engine that no new attempt should be added."""
        return self._backlog_bytes > BACKLOG_BYTES

    def _offer(self) -> None:
        self._retry = None
        backlog = self._backlog
        while backlog and self._writer.put(backlog[0]):
            self._backlog_bytes -= len(backlog.popleft())
        if backlog:
            self._offer_later()

    def _offer_later(self) -> None:
        if self._retry is None and not self._closed:
            self._retry = asyncio.get_running_loop().call_later(BACKLOG_RETRY_S, self._offer)

    # ---- out ----

    def _take_records(self) -> None:
        """Hand on the records that are there; when there are none, ask to be woken."""
        if self._closed:
            return
        reader = self._reader
        reader.end_sleep()
        for _ in range(RECORDS_A_TURN):
            data = reader.get()
            if data is not None:
                self._hand_on(data)
            elif reader.prepare_sleep():
                return
        asyncio.get_running_loop().call_soon(self._take_records)

    def _hand_on(self, data: bytes) -> None:
        """Nothing of the engine may be lost unnoticed: if a record cannot be handled, the engine is given up.

        What comes behind such a record is not looked at: a stream must not go on with a gap in it.
        """
        if self._given_up:
            return
        try:
            record = events.decode(data)
            if isinstance(record, events.Failed):
                self._last_words = record.message
            else:
                self._on_record(record)
        except Exception as error:  # a callback of the loop has nobody to raise to
            log.error("engine.bad_record", pid=self.pid, exc_info=error)
            self._give_up(f"a record of the engine (pid {self.pid}) could not be handled")

    def _give_up(self, why: str) -> None:
        self._given_up = True
        self._last_words = self._last_words or why
        if self._process is not None:
            self._process.kill()

    # ---- the end ----

    async def ended(self) -> str:
        """Wait for the end of the process, and say why in one line."""
        assert self._ended is not None, "not started"
        return await asyncio.shield(self._ended)

    def _process_ended(self) -> None:
        assert self._process is not None
        assert self._ended is not None
        code = self._process.poll()
        if code is None:
            return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        while (data := self._reader.get()) is not None:
            self._hand_on(data)
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        if not self._ended.done():
            self._ended.set_result(self._last_words or f"the engine (pid {self.pid}) ended {how}")

    async def stop(self) -> None:
        """End the process: told to, then killed. Idempotent."""
        if self._closed:
            return
        if self._process is not None and self._process.poll() is None:
            self.send(commands.Shutdown())
            await self._ends_within(SHUTDOWN_SECONDS)
        self._close()

    async def _ends_within(self, seconds: float) -> None:
        assert self._process is not None
        try:
            async with asyncio.timeout(seconds):
                await self.ended()
        except TimeoutError:
            log.warning("engine.killed", pid=self.pid)
            self._process.kill()
            await self.ended()

    def _close(self) -> None:
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        if self._process is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._pidfd)
            loop.remove_reader(self._reader.fileno())
            os.close(self._pidfd)
        for ring in (self._writer, self._reader):
            ring.close()
        for handle in (self._commands, self._events):
            _close_ring(handle)
        self.vitals.close()
        with contextlib.suppress(OSError):
            os.close(self.vitals.memfd)


def _close_ring(handle: RingHandle) -> None:
    with contextlib.suppress(OSError):
        handle.close()
