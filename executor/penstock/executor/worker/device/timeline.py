"""The order in which a device works: a main stream of steps, a side stream that brings results to the host.

On a GPU both are CUDA streams, on a CPU everything is done when the call returns; the runner does not see which.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A point of the main or the side stream."""

    def wait(self) -> None:
        """Until the stream has passed it; the interpreter lock is free meanwhile."""
        ...

    def since(self, earlier: Mark) -> int:
        """Nanoseconds of the device between two marks that have passed."""
        ...


class Timeline(Protocol):
    """Where a runner's work goes."""

    def mark(self) -> Mark:
        """A point of the main stream: all that was launched so far lies before it."""
        ...

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copy from pinned host memory, in the order of the main stream."""
        ...

    def download(self, pairs: list[tuple[Tensor, Tensor]]) -> Mark:
        """Copy (host, device) pairs once the main stream comes here, without holding it; the mark is their end.

        What the main stream does next must not change the device tensors before :meth:`settle` of that mark.
        """
        ...

    def settle(self, mark: Mark | None) -> None:
        """Let the main stream go on only when the mark has passed."""
        ...

    def memory(self, count: int) -> Tensor:
        """Host memory for copies: int32 [count]."""
        ...


class HostMark:
    """A moment of the host."""

    __slots__ = ("_at",)

    def __init__(self) -> None:
        """Now."""
        self._at = time.perf_counter_ns()

    def wait(self) -> None:
        """It has passed."""

    def since(self, earlier: Mark) -> int:
        """Host time."""
        assert isinstance(earlier, HostMark)
        return self._at - earlier._at


class HostTimeline:
    """A CPU: everything is done when the call returns."""

    def mark(self) -> Mark:
        """Now."""
        return HostMark()

    def upload(self, target: Tensor, source: Tensor) -> None:
        """A copy."""
        target.copy_(source)

    def download(self, pairs: list[tuple[Tensor, Tensor]]) -> Mark:
        """Copies."""
        for host, device in pairs:
            host.copy_(device)
        return HostMark()

    def settle(self, mark: Mark | None) -> None:
        """Nothing is under way."""

    def memory(self, count: int) -> Tensor:
        """Plain memory."""
        return torch.empty(count, dtype=torch.int32)


class CudaMark:
    """A CUDA event. A host that waits for it sleeps."""

    __slots__ = ("event",)

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """Recorded now on ``stream``."""
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def wait(self) -> None:
        """Sleep until it has passed."""
        self.event.synchronize()

    def since(self, earlier: Mark) -> int:
        """Device time, to half a microsecond."""
        assert isinstance(earlier, CudaMark)
        return int(earlier.event.elapsed_time(self.event) * 1e6)


class CudaTimeline:
    """A GPU: the stream that was current when this was made, and one beside it."""

    def __init__(self, device: torch.device) -> None:
        """Work is to be launched on the stream that is current now."""
        self._main = torch.cuda.current_stream(device)
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> Mark:
        """An event of the main stream."""
        return CudaMark(self._main)

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Asynchronous, from pinned memory."""
        target.copy_(source, non_blocking=True)

    def download(self, pairs: list[tuple[Tensor, Tensor]]) -> Mark:
        """On the side stream."""
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            for host, device in pairs:
                host.copy_(device, non_blocking=True)
        return CudaMark(self._side)

    def settle(self, mark: Mark | None) -> None:
        """The main stream waits, the host does not."""
        if mark is not None:
            assert isinstance(mark, CudaMark)
            self._main.wait_event(mark.event)

    def memory(self, count: int) -> Tensor:
        """Pinned memory."""
        return torch.empty(count, dtype=torch.int32, pin_memory=True)
