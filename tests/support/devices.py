"""Where a kernel is tested: interpreted on a CPU, compiled on a GPU; its reference wherever there is one."""

from __future__ import annotations

import pytest

from penstock.kernels.dispatch import INTERPRETED

CPU = pytest.param("cpu", id="interpreted" if INTERPRETED else "reference")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_every_device = pytest.mark.parametrize("device", [CPU, GPU])
"""The kernel, or its reference on a CPU where nothing is interpreted."""
on_every_kernel = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")), GPU],
)
"""The kernel only."""
