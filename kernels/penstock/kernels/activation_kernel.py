"""The kernel of :mod:`penstock.kernels.activation`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024


@triton.jit
def silu_mul_kernel(gate_up, out, INNER: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < INNER
    gate = tl.load(gate_up + row * 2 * INNER + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * INNER + INNER + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * INNER + column, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """See :func:`penstock.kernels.activation.silu_mul`."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    if rows:
        tile = min(_TILE, triton.next_power_of_2(inner))
        silu_mul_kernel[(rows, triton.cdiv(inner, tile))](gate_up, out, inner, tile, num_warps=4)
    return out
