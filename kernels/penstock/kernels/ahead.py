"""Kernels compiled side by side before any of them is launched.

Triton compiles a kernel when it is launched for the first time, one after the other, which makes most of a model's
start where its cache is empty. Inside ``with compiled_ahead(device):`` launches compile and launch nothing; the
compilers run on the threads of a pool (``triton.AsyncCompileMode``), and all are done when the block has ended.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch

from penstock.kernels.dispatch import INTERPRETED

MOST_THREADS: Final = 16
"""More would wait for each other: a part of what a compiler does is Python."""

_AHEAD: ContextVar[bool] = ContextVar("kernels are compiled and not launched", default=False)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """A launch of the ``triton.jit`` function over ``grid``, to be called with its arguments: ``kernel[grid]``."""
    return functools.partial(kernel.warmup, grid=grid) if _AHEAD.get() else kernel[grid]


def can_compile_ahead() -> bool:
    """Whether there is a GPU to compile for."""
    return not INTERPRETED and torch.cuda.is_available()


class _Compilers(ThreadPoolExecutor):
    """Threads that do all that a first launch would have done.

    They compile kernels, build what launches them, which some releases of Triton leave to a C compiler, and load both.
    """

    def __init__(self, device: torch.device) -> None:
        threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
        super().__init__(threads, "penstock-compile", _use, (device,))

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:  # type: ignore[override]
        """As ``AsyncCompileMode`` calls it."""
        return super().submit(_ready, compile_kernel)


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _ready(compile_kernel: Callable[[], Any]) -> Any:
    kernel = compile_kernel()
    _ = kernel.run
    return kernel


@contextmanager
def compiled_ahead(device: torch.device) -> Iterator[None]:
    """Launches of this thread inside, all on ``device``, only compile. To be used where :func:`can_compile_ahead`.

    A kernel that cannot be compiled is passed over: its first real launch says why.
    """
    import triton

    with _Compilers(device) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        token = _AHEAD.set(True)
        try:
            yield
        finally:
            _AHEAD.reset(token)
