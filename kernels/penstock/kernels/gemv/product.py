"""Products of few rows and a weight, with what stands before and behind them in a layer.

``x`` may be normalised on the way in, or be merged from the splits of attention; the result may be gated, or added to
the residual stream. What is rounded is what is written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from penstock.kernels.dispatch import uses_triton
from penstock.kernels.gemv.shapes import GemvShape


class Norm(NamedTuple):
    """Root mean square normalisation of the inputs of a product."""

    weight: Tensor | None
    """[inputs]; None: ones"""
    eps: float


class Splits(NamedTuple):
    """Attention that is not merged yet: each split's mean and how much it weighs."""

    partial: Tensor
    """float32 [rows, heads, splits, head_dim]"""
    lse: Tensor
    """float32 [rows, heads, splits]: base-2 logarithms; -1e30: nothing"""

    def merged(self) -> Tensor:
        """float32 [rows, heads · head_dim]."""
        weights = torch.softmax(self.lse * torch.log(torch.tensor(2.0)).to(self.lse), dim=-1)
        return torch.einsum("rhs,rhsd->rhd", weights, self.partial).flatten(1)


def gemv(
    x: Tensor | Splits,
    weight: Tensor,
    out: Tensor,
    shape: GemvShape,
    *,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    gated: bool = False,
    add: bool = False,
    late_release: bool = False,
) -> None:
    """``out = f(norm(x) Wᵀ + b)`` of few rows.

    ``x`` [rows, inputs] of the dtype of ``weight``, or splits of as many inputs; ``weight`` [outputs, inputs];
    ``out`` [rows, outputs], contiguous. ``gated``: ``weight`` [2 · outputs, inputs], gate first, and the result is
    ``silu(gate) · up``. ``add``: the result is added to ``out``. ``late_release``: the kernel behind may begin
    only when the one in front of this is done; it may then read whatever is older than this before it waits.

    The shape must divide outputs and inputs. A bias is taken by a product that is not gated.
    """
    if uses_triton(weight):
        from penstock.kernels.gemv.product_kernel import gemv_triton

        gemv_triton(x, weight, out, shape, norm, bias, gated, add, late_release)
    else:
        gemv_reference(x, weight, out, norm=norm, bias=bias, gated=gated, add=add)


def gemv_reference(
    x: Tensor | Splits,
    weight: Tensor,
    out: Tensor,
    *,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    gated: bool = False,
    add: bool = False,
) -> None:
    """:func:`gemv` in plain torch, all of it in float32."""
    inputs = x.merged() if isinstance(x, Splits) else x.float()
    if norm is not None:
        inputs = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + norm.eps)
        inputs = inputs if norm.weight is None else inputs * norm.weight.float()
    result = inputs @ weight.float().t()
    if bias is not None:
        result = result + bias.float()
    if gated:
        gate, up = result.chunk(2, dim=-1)
        result = silu(gate) * up
    out.copy_(out.float() + result if add else result)
