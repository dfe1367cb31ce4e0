"""The kernel of :mod:`penstock.kernels.norm`: one program a row, which it holds in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch
from penstock.kernels.overlap import launch_options, overlaps
from penstock.kernels.overlap_kernel import release_next, wait_for_previous


@triton.jit
def late_scale(stream, row, eps, SIZE: tl.constexpr, TILE: tl.constexpr):
    """One over the root mean square of a row: see :class:`penstock.kernels.norm.Late`."""
    column = tl.arange(0, TILE)
    value = tl.load(stream + row * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)


@triton.jit(do_not_specialize=["rows"])
def add_rms_norm_kernel(
    x, residual, weight, out, eps, rows,
    SIZE: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, ADD: tl.constexpr, STORE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < SIZE
    element = out.dtype.element_ty
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    release_next(OVERLAP)
    wait_for_previous(OVERLAP)
    # All loads are issued before anything waits for one of them.
    value = tl.load(x + row * SIZE + column, mask=inside, other=0.0)
    if ADD:
        before = tl.load(residual + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(x + (part * rows + row) * SIZE + column, mask=inside, other=0.0)
    value = value.to(element)
    if ADD:
        value = (value.to(tl.float32) + before).to(element)
    if STORE:
        tl.store(residual + row * SIZE + column, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normalised = (wide * scale).to(element).to(tl.float32)
    tl.store(out + row * SIZE + column, (normalised * factor).to(element), mask=inside)


def warps(size: int) -> int:
    """Warps of a program: 16 elements a thread."""
    count: int = triton.next_power_of_2(size) // 512
    return min(16, max(1, count))


def add_rms_norm_triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`penstock.kernels.norm.add_rms_norm`."""
    rows, size = x.shape[-2:]
    partial = x.dim() == 3
    out = torch.empty(rows, size, dtype=weight.dtype, device=x.device)
    add = residual is not None
    if residual is None:
        residual = torch.empty_like(out) if partial else x
    if rows:
        launch(add_rms_norm_kernel, (rows,))(
            x, residual, weight, out, eps, rows,
            size, triton.next_power_of_2(size), x.shape[0] if partial else 1, add, add or partial,
            overlaps(rows), num_warps=warps(size), **launch_options(rows),
        )  # fmt: skip
    return out, residual
