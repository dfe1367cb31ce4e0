"""What an executor tells its worker process on the command line, and what the worker tells it through the ring."""

from __future__ import annotations

import sys
from typing import Final

import msgspec

from penstock.executor.ring import RingHandle
from penstock.executor.step import ModelSpec

RESULT: Final = b"r"
"""Then an encoded StepResult."""
PROGRESS: Final = b"p"
"""Then an encoded :class:`Stage`."""
READY: Final = b"i"
"""Then an encoded ModelInfo."""
FAILED: Final = b"f"
"""Then one line, UTF-8: the worker's last words."""
END: Final = b""
"""Instead of a plan: end."""


class Stage(msgspec.Struct, frozen=True, array_like=True):
    """How far the start is."""

    name: str
    done: int
    total: int


class WorkerArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of a worker process. The descriptors are inherited."""

    spec: ModelSpec
    plans: str
    """RingHandle.encode of the ring executor → worker."""
    results: str
    """RingHandle.encode of the ring worker → executor."""
    parent_pid: int
    log_level: str = "info"

    def argv(self) -> list[str]:
        """The command that starts the worker; pass ``fds`` on to it."""
        return [sys.executable, "-m", "penstock.executor.worker.main", msgspec.json.encode(self).decode()]

    def fds(self) -> tuple[int, ...]:
        """The descriptors that the worker must inherit."""
        return (*RingHandle.decode(self.plans).fds(), *RingHandle.decode(self.results).fds())

    @classmethod
    def parse(cls, text: str) -> WorkerArguments:
        """From the command line. Raises msgspec.DecodeError."""
        return msgspec.json.decode(text, type=cls)
