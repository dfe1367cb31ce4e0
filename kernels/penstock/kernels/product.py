"""Products of few rows, with what follows them: where a kernel of our own beats the library and a kernel behind it.

With few rows a product is bound by reading its weight, and by starting: a decode step makes four of them a layer. Two
things can be saved. The gate of a feed-forward block is applied where its product ends, so that gate and up are never
written. And a product whose result is added to the residual stream may leave its sum in *parts*, one for each share of
the inputs: more programs read the weight at a time, and the norm that adds the residual adds the parts as well.

The tables say where that was measured to pay, on an H200 (``bench/kernels/gemm.py``); elsewhere the caller asks the
library.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from penstock.kernels.activation import silu_mul
from penstock.kernels.dispatch import uses_triton


@dataclass(frozen=True, slots=True)
class ProductShape:
    """One cut of a product."""

    rows: int
    outputs: int
    inputs: int
    """Of one step of a program."""
    splits: int
    """Programs that share the inputs of one tile."""
    warps: int
    stages: int

    def divides(self, outputs: int, inputs: int) -> bool:
        """Whether it fits a weight of that shape: tiles of rows may be ragged, the others not."""
        return not outputs % self.outputs and not inputs % (self.splits * self.inputs)


NARROW = 4096
"""Outputs up to which a product is of a small model."""
GATED_NARROW = ((16, ProductShape(16, 32, 128, 1, 4, 4)), (64, ProductShape(64, 32, 128, 1, 4, 4)))
GATED_WIDE = (
    (16, ProductShape(16, 64, 128, 1, 4, 3)),
    (32, ProductShape(32, 64, 64, 1, 4, 4)),
    (64, ProductShape(64, 64, 64, 1, 4, 4)),
)
SPLIT_NARROW = (
    (16, ProductShape(16, 32, 128, 4, 4, 4)),
    (32, ProductShape(32, 32, 128, 4, 4, 4)),
    (64, ProductShape(64, 32, 128, 4, 4, 4)),
    (128, ProductShape(64, 32, 64, 4, 4, 5)),
)
SPLIT_WIDE = ((16, ProductShape(16, 32, 128, 2, 4, 4)), (32, ProductShape(32, 32, 128, 2, 4, 4)))
"""For each most rows the cut. Wide: outputs of 4,096 and more, inputs up to as many."""


def gated_shape(x: Tensor, weight: Tensor) -> ProductShape | None:
    """The cut for :func:`gated_product`; None: the library is faster, or the shape does not fit."""
    outputs, inputs = weight.shape[0] // 2, weight.shape[1]
    table = GATED_NARROW if outputs <= NARROW else GATED_WIDE
    if outputs <= NARROW and 16 < x.shape[0] <= 32:
        return None
    return _found(table, x, outputs, inputs)


def split_shape(x: Tensor, weight: Tensor) -> ProductShape | None:
    """The cut for :func:`split_product`; None: the library is faster, or the shape does not fit."""
    outputs, inputs = weight.shape
    if outputs < NARROW:
        return _found(SPLIT_NARROW, x, outputs, inputs)
    return _found(SPLIT_WIDE, x, outputs, inputs) if inputs <= outputs else None


def _found(table: tuple[tuple[int, ProductShape], ...], x: Tensor, outputs: int, inputs: int) -> ProductShape | None:
    if x.dtype != torch.bfloat16 or not uses_triton(x):
        return None
    shape = next((shape for most, shape in table if x.shape[0] <= most), None)
    return shape if shape is not None and shape.divides(outputs, inputs) else None


def gated_product(x: Tensor, weight: Tensor, shape: ProductShape) -> Tensor:
    """``silu(x Wgᵀ) · (x Wuᵀ)`` of ``x`` [rows, inputs] and ``weight`` [2 · outputs, inputs], gate first.

    Returns [rows, outputs]. The shape must divide outputs and inputs.
    """
    if uses_triton(x):
        from penstock.kernels.product_kernel import gated_product_triton

        return gated_product_triton(x, weight, shape)
    return silu_mul(linear(x, weight))


def split_product(x: Tensor, weight: Tensor, shape: ProductShape) -> Tensor:
    """``x Wᵀ`` of ``x`` [rows, inputs] and ``weight`` [outputs, inputs] in parts: float32 [splits, rows, outputs].

    Their sum is the product. The shape must divide outputs and inputs.
    """
    if uses_triton(x):
        from penstock.kernels.product_kernel import split_product_triton

        return split_product_triton(x, weight, shape)
    share = weight.shape[1] // shape.splits
    parts = [linear(x[:, i * share : (i + 1) * share].float(), weight[:, i * share : (i + 1) * share].float())
             for i in range(shape.splits)]  # fmt: skip
    return torch.stack(parts)
