"""Weights that are loaded on a thread of their own, while kernels are loaded, measured and captured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from penstock.executor.worker.model_runner import LoadedModel


class Loading:
    """A model that is being loaded."""

    def __init__(self, future: Future[LoadedModel]) -> None:
        """``future``: of the thread that loads it."""
        self._future = future
        self.seconds = 0.0
        """How long it took, once it is done."""

    def check(self) -> None:
        """Raise what went wrong, if something has by now."""
        if self._future.done():
            self._future.result()

    def wait(self) -> LoadedModel:
        """The model, loaded. Raises what went wrong."""
        return self._future.result()


@contextmanager
def loading_beside(load: Callable[[], LoadedModel], device: torch.device) -> Iterator[Loading]:
    """Call ``load`` on a thread; it has ended when the block has."""
    with ThreadPoolExecutor(1, "penstock-weights") as pool:
        loading = Loading(Future())

        def timed() -> LoadedModel:
            started = time.perf_counter()
            if device.type == "cuda":
                torch.cuda.set_device(device)
            try:
                return load()
            finally:
                loading.seconds = time.perf_counter() - started

        loading._future = pool.submit(timed)
        yield loading
