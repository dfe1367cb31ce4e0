"""One role as a child process: started, heard of when ready, drained, or killed with all that it started."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Self

import msgspec

from penstock.local.roles import role_command

_READY_LINE_BYTES = 64 << 10
_LAST_WORDS_S = 5.0
_REFUSED = 2
"""Exit code of a role whose configuration cannot be used."""


class Ready(msgspec.Struct, frozen=True):
    """What a role reports when it listens and can do its first duty."""

    address: str
    pid: int
    role: str


class RoleFailed(Exception):
    """A role ended, or did not get ready in time; the message is one line."""

    def __init__(self, message: str, *, explained: bool = False, code: int = 1) -> None:
        super().__init__(message)
        self.explained = explained
        """Whether the role itself has already said why, on the standard error that it shares with us."""
        self.code = code
        """What the command exits with for it: 2 if the role refused its configuration."""


class RoleProcess:
    """A running role. It leads a process group, so that a Ctrl-C reaches the supervisor alone."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, ready_pipe: int) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._ready_pipe = ready_pipe
        self._was_ready = False

    @classmethod
    async def start(cls, name: str, module: str, argv: Sequence[str]) -> Self:
        """Start `python -m module argv…`, with `--ready-fd` and `--parent-pid`. Raises OSError."""
        read_end, write_end = os.pipe()
        own = ["--ready-fd", str(write_end), "--parent-pid", str(os.getpid())]
        try:
            process = await asyncio.create_subprocess_exec(
                *role_command(module, [*argv, *own]),
                pass_fds=(write_end,),
                process_group=0,
                stdin=asyncio.subprocess.DEVNULL,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        return cls(name, process, read_end)

    async def ready(self, timeout_s: float) -> Ready:
        """Wait for the role's report; to be called once. Raises RoleFailed."""
        try:
            async with asyncio.timeout(timeout_s):
                line = await read_line(self._ready_pipe)
        except TimeoutError:
            raise RoleFailed(f"the {self.name} is not ready after {timeout_s:g} s") from None
        if not line:
            raise await self._failure()
        self._was_ready = True
        return msgspec.json.decode(line, type=Ready)

    async def ended(self) -> RoleFailed:
        """Wait for the process to end, and say how."""
        return self._account(await self._process.wait())

    async def drain(self, timeout_s: float) -> RoleFailed | None:
        """Ask it to finish (SIGTERM), kill it after `timeout_s`; what went wrong, if anything did."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                code = await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
            return RoleFailed(f"the {self.name} did not drain within {timeout_s:g} s and was killed")
        self.kill()  # whatever it may have left behind
        stopped_early = code == -signal.SIGTERM and not self._was_ready
        return None if code == 0 or stopped_early else self._account(code)

    def kill(self) -> None:
        """Kill the role and all processes of its group, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _failure(self) -> RoleFailed:
        """The report's pipe is closed without a report: the process is about to end."""
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                return await self.ended()
        except TimeoutError:
            return RoleFailed(f"the {self.name} closed its report without being ready")

    def _account(self, code: int) -> RoleFailed:
        if code < 0:
            return RoleFailed(f"the {self.name} (pid {self.pid}) was ended by {signal.Signals(-code).name}")
        explained = code in (1, 2) and not self._was_ready
        return RoleFailed(
            f"the {self.name} (pid {self.pid}) ended with exit code {code}",
            explained=explained,
            code=_REFUSED if explained and code == _REFUSED else 1,
        )


async def read_line(descriptor: int) -> bytes:
    """One line from a pipe, b"" at its end; the descriptor is closed."""
    reader = asyncio.StreamReader(limit=_READY_LINE_BYTES)
    pipe = os.fdopen(descriptor, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        return await reader.readline()
    finally:
        transport.close()
