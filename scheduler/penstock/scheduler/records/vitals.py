"""A page of shared memory in which the engine says that it lives."""

import enum
import mmap
import os


class EngineState(enum.IntEnum):
    """What the engine does. Readiness is SERVING; liveness is that the tick advances."""

    STARTING = 1
    SERVING = 2
    RECOVERING = 3
    DRAINING = 4


class Vitals:
    """Tick and state: the engine writes, the gate reads. Aligned 64-bit words, each seen whole."""

    def __init__(self, memfd: int) -> None:
        self.memfd = memfd
        self._memory = mmap.mmap(memfd, mmap.PAGESIZE)
        self._words = memoryview(self._memory).cast("Q")

    @classmethod
    def create(cls) -> "Vitals":
        """A new page: tick 0, STARTING."""
        memfd = os.memfd_create("penstock-vitals")
        os.ftruncate(memfd, mmap.PAGESIZE)
        vitals = cls(memfd)
        vitals.set_state(EngineState.STARTING)
        return vitals

    def beat(self) -> None:
        """Advance the tick."""
        self._words[0] += 1

    def set_state(self, state: EngineState) -> None:
        """Say what the engine does."""
        self._words[1] = state

    @property
    def tick(self) -> int:
        """Turns of the engine's loop."""
        return self._words[0]

    @property
    def state(self) -> EngineState:
        """What the engine does."""
        return EngineState(self._words[1])

    def close(self) -> None:
        """Unmap; the descriptor stays open."""
        self._words.release()
        self._memory.close()
