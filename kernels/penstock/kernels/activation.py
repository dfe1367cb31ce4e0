"""The gate of a SwiGLU feed-forward block (Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from penstock.kernels.dispatch import uses_triton


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) · up`` of ``gate_up`` [rows, 2 · inner], gate first, contiguous → [rows, inner] of its dtype.

    ``silu(gate)`` is rounded before it is multiplied.
    """
    if uses_triton(gate_up):
        from penstock.kernels.activation_kernel import silu_mul_triton

        return silu_mul_triton(gate_up)
    return silu_mul_reference(gate_up)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """The same in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
