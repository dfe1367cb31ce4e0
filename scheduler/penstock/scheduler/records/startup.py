"""What the gate tells the engine process on its command line."""

import sys

import msgspec

from penstock.executor.ring import RingHandle
from penstock.executor.step import ModelSpec


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine works."""

    executor: str
    """"multiprocess", "uniproc" or "simulated"."""
    model: ModelSpec
    policy: str = "fcfs"
    log_level: str = "info"
    step_timeout_s: float = 30.0
    """Multiprocess executor: a worker that leaves a plan unanswered for so long is replaced."""
    traced_step_every: int = 16
    """One step in so many is told as a StepSpan, if a traced sequence is in it."""


class EngineArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of the engine process. The descriptors are inherited."""

    spec: EngineSpec
    commands: str
    """RingHandle.encode of the ring gate → engine."""
    events: str
    """RingHandle.encode of the ring engine → gate."""
    vitals_fd: int
    parent_pid: int

    def argv(self) -> list[str]:
        """The command that starts the engine; pass ``fds`` on to it."""
        return [sys.executable, "-m", "penstock.scheduler.engine.main", msgspec.json.encode(self).decode()]

    def fds(self) -> tuple[int, ...]:
        """The descriptors that the engine must inherit."""
        rings = (RingHandle.decode(text) for text in (self.commands, self.events))
        return (*(fd for ring in rings for fd in ring.fds()), self.vitals_fd)

    @classmethod
    def parse(cls, text: str) -> "EngineArguments":
        """From the command line. Raises msgspec.DecodeError."""
        return msgspec.json.decode(text, type=cls)
