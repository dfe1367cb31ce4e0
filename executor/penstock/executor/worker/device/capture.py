"""Work of a device as CUDA graphs that share one pool of memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Captured:
    """Work that was captured."""

    _graph: torch.cuda.CUDAGraph
    _lock: threading.Lock
    """Held by whoever replays or drops one of the recorder's graphs."""

    def replay(self) -> None:
        """Launch it again. Raises RuntimeError if it has been dropped."""
        with self._lock:
            self._graph.replay()


class Recorder:
    """Captures on a stream of its own. No capture may go on elsewhere in the process."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is captured."""
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def captured(self, work: Callable[[], None]) -> Captured:
        """``work`` as a graph. Not through ``torch.cuda.graph``: that collects garbage before each of many captures."""
        work()  # compiles kernels, chooses algorithms and takes work space: none of it may happen while capturing
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graphs.append(graph)
        return Captured(graph, self._lock)

    def drop(self) -> None:
        """Let go of all graphs; what of them is under way goes on. From any thread."""
        with self._lock:
            for graph in self._graphs:
                graph.reset()
            self._graphs.clear()
