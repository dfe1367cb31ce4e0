"""The kernels of :mod:`penstock.kernels.product`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.ahead import launch
from penstock.kernels.overlap import launch_options, overlaps
from penstock.kernels.overlap_kernel import release_next, wait_for_previous
from penstock.kernels.product import ProductShape


@triton.jit(do_not_specialize=["rows"])
def split_product_kernel(
    x, weight, partial, rows,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    ROW_TILE: tl.constexpr, OUTPUT_TILE: tl.constexpr, INPUT_TILE: tl.constexpr,
    SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    output = tl.program_id(0) * OUTPUT_TILE + tl.arange(0, OUTPUT_TILE)
    split = tl.program_id(2)
    SHARE: tl.constexpr = INPUTS // SPLITS
    place = tl.arange(0, INPUT_TILE)
    inside = (row < rows)[:, None]
    left = x + row.to(tl.int64)[:, None] * INPUTS + split * SHARE + place[None, :]
    right = weight + output.to(tl.int64)[None, :] * INPUTS + split * SHARE + place[:, None]
    acc = tl.zeros([ROW_TILE, OUTPUT_TILE], tl.float32)
    release_next(OVERLAP)
    wait_for_previous(OVERLAP)
    for first in range(0, SHARE, INPUT_TILE):
        a = tl.load(left + first, mask=inside, other=0.0)
        b = tl.load(right + first)
        acc = tl.dot(a, b, acc)
    target = partial + (split * rows + row).to(tl.int64)[:, None] * OUTPUTS + output[None, :]
    tl.store(target, acc, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gated_product_kernel(
    x, weight, out, rows,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    ROW_TILE: tl.constexpr, OUTPUT_TILE: tl.constexpr, INPUT_TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    output = tl.program_id(0) * OUTPUT_TILE + tl.arange(0, OUTPUT_TILE)
    place = tl.arange(0, INPUT_TILE)
    inside = (row < rows)[:, None]
    left = x + row.to(tl.int64)[:, None] * INPUTS + place[None, :]
    gate_from = weight + output.to(tl.int64)[None, :] * INPUTS + place[:, None]
    up_from = gate_from + OUTPUTS * INPUTS
    gate = tl.zeros([ROW_TILE, OUTPUT_TILE], tl.float32)
    up = tl.zeros([ROW_TILE, OUTPUT_TILE], tl.float32)
    release_next(OVERLAP)
    wait_for_previous(OVERLAP)
    for first in range(0, INPUTS, INPUT_TILE):
        a = tl.load(left + first, mask=inside, other=0.0)
        gate = tl.dot(a, tl.load(gate_from + first), gate)
        up = tl.dot(a, tl.load(up_from + first), up)
    gate = gate.to(x.dtype.element_ty).to(tl.float32)
    up = up.to(x.dtype.element_ty).to(tl.float32)
    value = (gate / (1 + tl.exp(-gate))).to(x.dtype.element_ty).to(tl.float32) * up
    tl.store(out + row.to(tl.int64)[:, None] * OUTPUTS + output[None, :], value.to(x.dtype.element_ty), mask=inside)


def split_product_triton(x: Tensor, weight: Tensor, shape: ProductShape) -> Tensor:
    """See :func:`penstock.kernels.product.split_product`."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    partial = torch.empty(shape.splits, rows, outputs, dtype=torch.float32, device=x.device)
    grid = (outputs // shape.outputs, triton.cdiv(rows, shape.rows), shape.splits)
    launch(split_product_kernel, grid)(
        x, weight, partial, rows, outputs, inputs, shape.rows, shape.outputs, shape.inputs, shape.splits,
        overlaps(rows), num_warps=shape.warps, num_stages=shape.stages, **launch_options(rows),
    )  # fmt: skip
    return partial


def gated_product_triton(x: Tensor, weight: Tensor, shape: ProductShape) -> Tensor:
    """See :func:`penstock.kernels.product.gated_product`."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2
    out = x.new_empty(rows, outputs)
    grid = (outputs // shape.outputs, triton.cdiv(rows, shape.rows))
    launch(gated_product_kernel, grid)(
        x, weight, out, rows, outputs, inputs, shape.rows, shape.outputs, shape.inputs,
        overlaps(rows), num_warps=shape.warps, num_stages=shape.stages, **launch_options(rows),
    )  # fmt: skip
    return out
