"""The kernel of :mod:`penstock.kernels.activation`: a program takes a piece of one row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch
from penstock.kernels.norm import Late
from penstock.kernels.norm_kernel import late_scale
from penstock.kernels.overlap import launch_options, overlaps
from penstock.kernels.overlap_kernel import release_next, wait_for_previous


@triton.jit
def silu_mul_kernel(
    gate_up, stream, eps, out,
    INNER: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, SIZE_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """SIZE: of a row of ``stream``, 0 without one."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < INNER
    element = out.dtype.element_ty
    release_next(OVERLAP)
    wait_for_previous(OVERLAP)
    gate = tl.load(gate_up + row * 2 * INNER + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * INNER + INNER + column, mask=inside, other=0.0).to(tl.float32)
    if SIZE > 0:
        scale = late_scale(stream, row, eps, SIZE, SIZE_TILE)
        gate = (gate * scale).to(element).to(tl.float32)
        up = (up * scale).to(element).to(tl.float32)
    gate = (gate / (1 + tl.exp(-gate))).to(element).to(tl.float32)
    tl.store(out + row * INNER + column, (gate * up).to(element), mask=inside)


def program_shape(rows: int) -> tuple[int, int]:
    """Elements and warps of a program: eight elements a thread, and small programs while there are few of them."""
    return (256, 1) if rows < 16 else (1024, 4)


def silu_mul_triton(gate_up: Tensor, late: Late | None = None) -> Tensor:
    """See :func:`penstock.kernels.activation.silu_mul`."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    if rows:
        tile, warps = program_shape(rows)
        stream, eps = late or (gate_up, 0.0)
        size = stream.shape[1] if late else 0
        launch(silu_mul_kernel, (rows, triton.cdiv(inner, tile)))(
            gate_up, stream, eps, out, inner, tile, size, triton.next_power_of_2(max(1, size)), overlaps(rows),
            num_warps=warps, **launch_options(rows),
        )  # fmt: skip
    return out
