"""Work of a device as CUDA graphs that share one pool of memory."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Recorder:
    """Captures on a stream of its own. No capture may go on elsewhere in the process."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is captured."""
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def captured(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
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
        return graph
