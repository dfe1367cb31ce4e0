"""Several service processes on one port.

The parent serves nothing itself: it holds the port, starts the processes, replaces those that die and ends them all.
They listen on the same port by SO_REUSEPORT, and the kernel gives each new connection to one of them (socket(7)). Each
is a whole service with its own sessions to the schedulers, so that one that dies takes only its own streams along.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final, NoReturn, Self

import msgspec

from penstock.config import secret_environ, to_argv
from penstock.config.process import report_ready
from penstock.rpc.server import BindError
from penstock.service.config import ServiceConfig
from penstock.telemetry.logging import get_logger

MAX_DEATHS: Final = 5
"""So many processes that end by themselves within `DEATHS_WINDOW_S` are replaced; one more ends the service."""
DEATHS_WINDOW_S: Final = 60.0
READY_S: Final = 60.0
DRAIN_MARGIN_S: Final = 3.0
"""What a process may take beyond its own grace to leave."""
_LAST_WORDS_S: Final = 5.0
_REPORT_BYTES: Final = 4096

log = get_logger(__name__)


class ProcessFailed(Exception):
    """The service cannot go on; the message is one line."""

    def __init__(self, message: str, *, code: int = 1, explained: bool = False) -> None:
        super().__init__(message)
        self.code = code
        """What the command exits with for it."""
        self.explained = explained
        """Whether the process has already said why, on the standard error that it shares with us."""


async def serve(config: ServiceConfig) -> int:
    """Run `config.service_processes` processes until SIGTERM or SIGINT; the exit code."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        with reserve_port(config.grpc_address) as port:
            return await _serve_on(config, port, stop)
    except BindError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


async def _serve_on(config: ServiceConfig, port: socket.socket, stop: asyncio.Event) -> int:
    address = f"{config.grpc_address.rpartition(':')[0]}:{port.getsockname()[1]}"
    processes = Processes(config, address)
    try:
        await _first(_run(processes, config.ready_fd, address), stop.wait())
    except ProcessFailed as error:
        if not error.explained:
            print(f"error: {error}", file=sys.stderr)
        processes.kill()
        return error.code
    finally:
        undrained = await processes.stop(config.drain_grace + DRAIN_MARGIN_S)
    return 1 if undrained else 0


async def _run(processes: "Processes", ready_fd: int | None, address: str) -> NoReturn:
    """Start all, say so, and keep them running. Raises ProcessFailed."""
    await processes.start()
    if ready_fd is not None:
        report_ready(ready_fd, {"address": address, "pid": os.getpid(), "role": "service"})
    await processes.keep()


async def _first(*works: Coroutine[Any, Any, object]) -> None:
    """Until one is done, whose error is raised; the others are cancelled."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def reserve_port(address: str) -> socket.socket:
    """A bound socket of HOST:PORT that never listens: others of this user can listen on its port, nobody else can.

    Port 0 takes a free one. Raises BindError if the port is taken, be it by somebody who would share it.
    """
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        if int(port) != 0:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not matter
                probe.bind(where)
        holder = socket.socket(family, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(where)
    except OSError as error:
        raise BindError(f"cannot listen on {address}: is the port taken, the address of this host?") from error
    return holder


class Processes:
    """The processes of one service: `start`, then `keep` for as long as it is to run, then `stop` in any case."""

    def __init__(self, config: ServiceConfig, address: str) -> None:
        self._count = config.service_processes
        self._config = msgspec.structs.replace(
            config, grpc_address=address, service_processes=1, reuse_port=True, parent_pid=os.getpid()
        )
        self._children: set[_Child] = set()
        self._deaths: deque[float] = deque()

    async def start(self) -> None:
        """Start all and wait until they listen. Raises ProcessFailed, after one process has said what is wrong."""
        await (await self._spawn()).ready()
        others = [await self._spawn() for _ in range(self._count - 1)]
        for child in others:
            await child.ready()

    async def keep(self) -> NoReturn:
        """Replace whatever ends. Raises ProcessFailed when too many do."""
        keepers = [asyncio.create_task(self._keep(child)) for child in self._children]
        try:
            done, _ = await asyncio.wait(keepers, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)

    async def stop(self, patience_s: float) -> int:
        """Drain all; how many did not end as they should and were killed, or had failed."""
        for child in self._children:
            child.terminate()
        ended = [asyncio.create_task(child.process.wait()) for child in self._children]
        if ended:
            await asyncio.wait(ended, timeout=patience_s)
        self.kill()
        codes = [await wait for wait in ended]
        return sum(code not in (0, -signal.SIGTERM) for code in codes)

    def kill(self) -> None:
        """End everything at once; `stop` still has to be awaited."""
        for child in self._children:
            child.kill()

    async def _keep(self, child: "_Child") -> NoReturn:
        while True:
            code = await child.process.wait()
            self._children.discard(child)
            self._count_death(child, code)
            child = await self._spawn()
            with contextlib.suppress(ProcessFailed):  # then it ends, and that counts
                await child.ready()

    def _count_death(self, child: "_Child", code: int) -> None:
        now = asyncio.get_running_loop().time()
        self._deaths.append(now)
        while self._deaths[0] < now - DEATHS_WINDOW_S:
            self._deaths.popleft()
        log.warning("service.process_ended", pid=child.process.pid, code=code, recently=len(self._deaths))
        if len(self._deaths) > MAX_DEATHS:
            how = f"{len(self._deaths)} processes ended within {DEATHS_WINDOW_S:g} s"
            raise ProcessFailed(f"the service gives up: {how}, the last (pid {child.process.pid}) with {code}")

    async def _spawn(self) -> "_Child":
        child = await _Child.start(self._config)
        self._children.add(child)
        return child


class _Child:
    """One process, from its start to its report that it listens."""

    def __init__(self, process: asyncio.subprocess.Process, report: int) -> None:
        self.process = process
        self._report = report

    @classmethod
    async def start(cls, config: ServiceConfig) -> Self:
        """Start a process with these settings; secrets go by its environment. Raises OSError."""
        read_end, write_end = os.pipe()
        own = msgspec.structs.replace(config, ready_fd=write_end)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "penstock.service.main", *to_argv(own)),
                pass_fds=(write_end,),
                env={**os.environ, **secret_environ(own)},
                stdin=asyncio.subprocess.DEVNULL,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        return cls(process, read_end)

    async def ready(self) -> None:
        """Wait until it listens; to be called once. Raises ProcessFailed, and then the process is gone."""
        try:
            async with asyncio.timeout(READY_S):
                listens = await _is_written(self._report)
        except TimeoutError:
            self.kill()
            raise ProcessFailed(f"a service process is not ready after {READY_S:g} s") from None
        if not listens:
            raise await self._failure()

    async def _failure(self) -> ProcessFailed:
        """The report's pipe is closed without a report: the process is about to end."""
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                code = await self.process.wait()
        except TimeoutError:
            self.kill()
            return ProcessFailed("a service process closed its report without being ready")
        message = f"a service process (pid {self.process.pid}) ended with {code} before it was ready"
        return ProcessFailed(message, code=code if code in (1, 2) else 1, explained=code in (1, 2))

    def terminate(self) -> None:
        """Ask it to drain."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


async def _is_written(pipe: int) -> bool:
    """Wait until something is written to a pipe; False if it is closed without a word. The descriptor is closed."""
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe, readable.set)
    try:
        await readable.wait()
        return os.read(pipe, _REPORT_BYTES) != b""
    finally:
        loop.remove_reader(pipe)
        os.close(pipe)
