"""The kernels' side of :mod:`penstock.kernels.overlap`."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Until the kernel launched before this one is done and what it wrote can be read."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def release_next(OVERLAP: tl.constexpr):
    """Let the next kernel begin, as far as this program is concerned."""
    if OVERLAP:
        gdc_launch_dependents()
