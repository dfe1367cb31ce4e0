"""The gate of a SwiGLU feed-forward block (Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from penstock.kernels.dispatch import uses_triton
from penstock.kernels.norm import Late


def silu_mul(gate_up: Tensor, late: Late | None = None) -> Tensor:
    """``silu(gate) · up`` of ``gate_up`` [rows, 2 · inner], gate first, contiguous → [rows, inner] of its dtype.

    ``silu(gate)`` is rounded before it is multiplied. ``late``: ``gate_up`` is still to be scaled by it, and rounded.
    """
    if uses_triton(gate_up):
        from penstock.kernels.activation_kernel import silu_mul_triton

        return silu_mul_triton(gate_up, late)
    return silu_mul_reference(gate_up, late)


def silu_mul_reference(gate_up: Tensor, late: Late | None = None) -> Tensor:
    """The same in plain torch."""
    if late is not None:
        gate_up = (gate_up * late.scale()).to(gate_up.dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
