"""Kernels that begin while the one before them ends: programmatic dependent launch (CUDA C++ programming guide).

In a step of few rows a kernel works for a few microseconds, and about one more passes before the next one starts.
Inside ``with overlapped():`` kernels are launched so that a kernel's programs may be on the device before the kernel in
front of it is done; they load what never changes, and wait before they touch anything else
(:mod:`penstock.kernels.overlap_kernel`).

What keeps the order: every kernel that is launched so waits, in all of its programs, before its first write and before
it reads anything that a kernel of the same step made since the last launch of the ordinary kind, which waits by itself.
A kernel may let the next one come as soon as it has begun. The programs of that one then take up room beside those that
still run, so that a kernel which lives on having many programs at once, as decode attention does, had better not.

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

_OVERLAPPED: ContextVar[bool] = ContextVar("overlapped", default=False)


@functools.cache
def can_overlap() -> bool:
    """Whether there is a GPU that knows such launches: from Hopper, compute capability 9, on."""
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def overlap_pays(rows: int, size: int) -> bool:
    """Whether the kernels of a decode step of so many ``rows`` of ``size`` elements had better overlap."""
    return rows <= 16 or (size <= SMALL_MODEL and 40 <= rows <= 64)


@contextmanager
def overlapped(pays: bool = True) -> Iterator[None]:
    """Launches of this thread inside may overlap, if it ``pays`` and the GPU can."""
    token = _OVERLAPPED.set(pays and can_overlap())
    try:
        yield
    finally:
        _OVERLAPPED.reset(token)


def overlaps() -> bool:
    """Whether launches overlap here: an argument of the kernels that can."""
    return _OVERLAPPED.get()


def launch_options() -> dict[str, bool]:
    """The launch's side of it."""
    return {"launch_pdl": True} if _OVERLAPPED.get() else {}
