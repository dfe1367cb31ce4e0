"""The kernel of :mod:`penstock.kernels.norm`: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_rms_norm_kernel(x, residual, weight, out, eps, SIZE: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < SIZE
    value = tl.load(x + row * SIZE + column, mask=inside, other=0.0)
    if ADD:
        value = value.to(tl.float32) + tl.load(residual + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty)
        tl.store(residual + row * SIZE + column, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, (wide * scale * factor).to(x.dtype.element_ty), mask=inside)


def add_rms_norm_triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`penstock.kernels.norm.add_rms_norm`."""
    rows, size = x.shape
    out = torch.empty_like(x)
    summed = x if residual is None else residual
    if rows:
        tile = triton.next_power_of_2(size)
        add_rms_norm_kernel[(rows,)](
            x, summed, weight, out, eps, size, tile, residual is not None, num_warps=min(8, max(1, tile // 512))
        )
    return out, summed
