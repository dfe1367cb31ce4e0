"""Root mean square normalisation (Zhang and Sennrich 2019), with the residual addition before it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm

from penstock.kernels.dispatch import uses_triton


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual += x``, then normalise the sum over its last dimension.

    ``x`` and ``residual`` [rows, size], contiguous; ``weight`` [size]. The residual is changed in place; None: ``x``
    becomes the residual. The mean is taken in float32 of the sum as it is stored. Returns (normalised, residual).
    """
    if uses_triton(x):
        from penstock.kernels.norm_kernel import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def add_rms_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    residual = x if residual is None else residual.add_(x)
    return torch_rms_norm(residual, weight.shape, weight, eps), residual
