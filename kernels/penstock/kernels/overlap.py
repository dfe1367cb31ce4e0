"""Kernels that begin while the one before them ends: programmatic dependent launch (CUDA C++ programming guide).

In a step of few rows a kernel works for a few microseconds, and about one more passes before the next one starts.
Inside ``with overlapped(size):`` kernels of few rows are launched so that a kernel's programs may be on the device
before the kernel in front of it is done; they load what never changes, and wait before they touch anything else
(:mod:`penstock.kernels.overlap_kernel`).

What keeps the order: every kernel that is launched so waits, in all of its programs, before its first write and before
it reads anything that a kernel of the same step made since the last launch of the ordinary kind, which waits by itself.
There is one way to read more before waiting: a kernel that lets the next one come only behind its own wait
(``late_release`` in :mod:`penstock.kernels.gemv`) tells it that all before itself is done.
A kernel may otherwise let the next one come as soon as it has begun. The programs of that one then take up room beside
those that still run, so that a kernel which lives on having many programs at once, as decode attention does, had better
not.

Measured on an H200: decode steps of up to 16 rows gain 4–8% with a model of 0.6 billion parameters and 2.6% with one of
8 billion (nothing there for a single row), those of 40 to 64 rows of the small one 1–2%; others gain nothing, or lose.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from penstock.kernels.dispatch import INTERPRETED, SMALL_MODEL

_SIZE: ContextVar[int | None] = ContextVar("size of an overlapped model's rows", default=None)


@functools.cache
def can_overlap() -> bool:
    """Whether there is a GPU that knows such launches: from Hopper, compute capability 9, on."""
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def overlap_pays(rows: int, size: int) -> bool:
    """Whether a kernel over so many ``rows`` had better overlap, in a model of rows of ``size`` elements.

    It depends on nothing else, so that a kernel which was compiled for a decode step serves others as well.
    """
    return rows <= 16 or (size <= SMALL_MODEL and 40 <= rows <= 64)


@contextmanager
def overlapped(size: int) -> Iterator[None]:
    """Launches of this thread inside, of a model of rows of ``size`` elements, may overlap, where the GPU can."""
    token = _SIZE.set(size if can_overlap() else None)
    try:
        yield
    finally:
        _SIZE.reset(token)


def overlaps(rows: int) -> bool:
    """Whether a launch over so many ``rows`` overlaps here: an argument of the kernels that can."""
    size = _SIZE.get()
    return size is not None and overlap_pays(rows, size)


def launch_options(rows: int) -> dict[str, bool]:
    """The launch's side of it."""
    return {"launch_pdl": True} if overlaps(rows) else {}
