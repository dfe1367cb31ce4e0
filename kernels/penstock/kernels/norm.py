"""Root mean square normalisation (Zhang and Sennrich 2019), with the residual addition before it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm

from penstock.kernels.dispatch import SMALL_MODEL, uses_triton


class Late(NamedTuple):
    """A normalisation that a product left to whoever reads its result.

    ``norm(x) Wᵀ`` is ``scale(x) · (x Wᵀ)`` where the norm's own weight is part of ``W``: a factor for each row, which
    whatever runs over the result anyway may as well find and apply.
    """

    stream: Tensor
    """``x`` [rows, size], contiguous, a row for each row of the product"""
    eps: float

    def scale(self) -> Tensor:
        """float32 [rows, 1]: one over the root mean square of each row."""
        return self.stream.float().square().mean(-1, keepdim=True).add(self.eps).rsqrt()


def finish_product(product: Tensor, late: Late | None, bias: Tensor | None) -> Tensor:
    """``product`` [rows, size] with what was left to whoever reads it: the factor of each row, then ``bias`` [size].

    Computed in float32 and rounded once.
    """
    if late is None and bias is None:
        return product
    wide = product.float() if late is None else product * late.scale()
    return (wide if bias is None else wide + bias).to(product.dtype)


def late_pays(rows: int, size: int) -> bool:
    """Whether a step of so many ``rows`` of ``size`` elements is faster if it normalises late, as measured on an H200.

    With fewer rows products split over their inputs (:mod:`penstock.kernels.product`) are faster, whose parts the norm
    adds; with many the row's factor is found too often.
    """
    return 64 < rows <= 512 if size <= SMALL_MODEL else 32 <= rows <= 144


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual += x``, then normalise the sum over its last dimension.

    ``x`` and ``residual`` [rows, size], contiguous; ``weight`` [size], all of one dtype. The residual is changed in
    place; None: ``x`` becomes the residual. ``x`` may also be float32 [parts, rows, size], the partial sums of a
    product split over its inputs; where there is no residual a new tensor is then one.

    What is rounded is what Llama was trained with: the sum, as the residual stores it; its normalised value, the mean
    taken in float32; and the product with the weight. Returns (normalised, residual).
    """
    if uses_triton(x):
        from penstock.kernels.norm_kernel import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def add_rms_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    if x.dim() == 3:
        x = x.sum(0).to(weight.dtype)
    residual = x if residual is None else residual.add_(x)
    return rms_norm_reference(residual, weight, eps), residual


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` [..., size] normalised, rounded, and multiplied by ``weight`` [size]."""
    return torch_rms_norm(x, weight.shape, None, eps) * weight
